"""Every record that is read is kept, or counted under one reason, and both scripts say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from data.counts import Skipped, n_dropped
from data.dataset import read_info
from data.layouts.chat import conversations
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare
from data.readers.recognize import first_document, read_documents, recognize
from tests.test_layouts import HELLO, ROOT

# --- nothing is dropped without a count ---

GOOD = [
    {"messages": [{"role": "user", "content": "Hi #"}, {"role": "assistant", "content": "Hello #!"}]},
    [{"role": "user", "content": "Hi #"}, {"role": "assistant", "content": "A list #"}],
    {"prompt": "Hi #", "completion": "Pair #"},
    {"conversations": [{"from": "human", "value": "Hi #"}, {"from": "bing", "value": "Share #"}], "messages": None},
]
BAD = [
    {"messages": None},
    {"messages": []},
    {"messages": [*HELLO, {"role": "tool", "content": "1"}, HELLO[1]]},
    {"messages": [{"role": "narrator", "content": "x"}]},
    {"messages": [HELLO[0], {"role": "assistant", "content": None}]},
    {"messages": [HELLO[0], {"role": "assistant", "content": 7}]},
    {"messages": 5},
    {"body": "x"},
    {},
    None,
    17,
    "a text",
    [],
    [1, 2],
    {"prompt": "x", "chosen": "y", "rejected": "z"},
    {"messages": HELLO, "label": False},
    {"messages": [HELLO[0], {**HELLO[1], "weight": 0}]},
]


def numbered(record, number: int):
    return json.loads(json.dumps(record).replace("#", str(number)))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 100)), min_size=3, max_size=40), st.booleans())
def test_records_read_are_kept_or_counted_by_reason(tmp_path_factory, choices, as_list):
    folder = tmp_path_factory.mktemp("in")
    records = [
        numbered(GOOD[kind % len(GOOD)], number) if is_good else BAD[kind % len(BAD)]
        for number, (is_good, kind) in enumerate(choices)
    ]
    n_good = sum(is_good for is_good, _ in choices)
    path = folder / ("a.json" if as_list else "a.jsonl")
    path.write_text(json.dumps(records) if as_list else "\n".join(map(json.dumps, records)))
    skipped = Skipped()
    if n_good < 2 or recognize(path).kind != "chat":
        return
    corpus = Corpus(read_documents(recognize(path), skipped), files=[path], skipped=skipped)
    info = prepare(Dataset("mine", "chat", "a test", "MIT"), PrepareOptions(output_dir=str(folder), workers=1), corpus)
    kept = sum(split.documents for split in info.splits.values())
    assert kept == n_good
    assert info.report["read"] == len(records) == kept + n_dropped(info.report)


def run(script: str, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *map(str, arguments), "--workers", "1", "--output_dir", "out"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")


def test_both_scripts_say_the_same_of_the_same_file(tmp_path):
    records = [
        *BAD[:-6],
        *(numbered(GOOD[n % 4], n) for n in range(4)),
        *BAD[-3:],
        *(numbered(GOOD[0], n) for n in (0, 8)),
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    own = run("prepare_with_extended_tokenizer.py", "--input", "mine.jsonl", "--name", "mine", cwd=tmp_path)
    chat = run("data/prepare-chat.py", "--input", "mine.jsonl", cwd=tmp_path)
    assert own.returncode == chat.returncode == 0, own.stderr + chat.stderr
    reports = [read_info(tmp_path / "out", name).report for name in ("mine", "chat")]
    assert reports[0] == reports[1]
    assert reports[0]["read"] == len(records) == 5 + n_dropped(reports[0])
    lines = [[line for line in done.stdout.splitlines() if line.startswith("  ")] for done in (own, chat)]
    assert lines[0] == lines[1] and "  duplicates: 1" in lines[0]
    assert "  conversation with an unknown role: 1" in lines[0]
    for done in (own, chat):
        assert "warning: 14 of the first 20 records of mine.jsonl cannot be used (" in done.stdout
        assert done.stdout.index("warning: 14") < done.stdout.index("licence:"), "said first"


def test_where_nothing_is_usable_both_say_the_same_with_the_reasons(tmp_path):
    turns = [{"role": "narrator", "content": "x"}, {"role": "hero", "content": "y"}]
    records = [{"messages": turns}] * 3 + [{"messages": [*turns[1:], *HELLO]}, {"messages": None}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    own = run("prepare_with_extended_tokenizer.py", "--input", "mine.jsonl", cwd=tmp_path)
    chat = run("data/prepare-chat.py", "--input", "mine.jsonl", cwd=tmp_path)
    reasons = "(conversation with an unknown role (narrator, hero): 4; record that is not a conversation (its fields: "
    for done in (own, chat):
        assert done.returncode == 1
        assert f"error: no usable conversation in mine.jsonl {reasons}messages): 1)" in done.stderr
        assert "prompt/completion" in done.stderr, "the known layouts are named"
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("", None)))
    done = run("prepare_with_extended_tokenizer.py", "--input", "texts.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_file_in_which_most_records_are_bad_says_so_first(tmp_path, capsys):
    lines = [json.dumps({"text": "One"})] + [json.dumps({"body": "x"})] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert first_document([recognize(tmp_path / "a.jsonl")]) == "One"
    assert "warning: 3 of the first 4 records" in capsys.readouterr().out


def test_counts_may_be_a_plain_counter():
    skipped = Counter()
    assert list(conversations([{"messages": [{"role": "x", "content": "y"}]}, {"a": 1}], skipped=skipped)) == []
    assert n_dropped(skipped) == 2
