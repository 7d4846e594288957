"""Chat layouts made into conversations, and prepare-chat.py and prepare-education.py on local files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.dataset import read_info
from data.documents import read_prepared
from data.layouts.chat import conversations, layout_of
from setup_tokenizer import encode_chat, encode_document

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT.parent / "shared" / "data" / "chat"

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def made(*records: dict, **settings) -> tuple[list, dict]:
    """(conversations, what was skipped)."""
    skipped = Counter()
    return list(conversations(records, skipped=skipped, **settings)), dict(skipped)


@pytest.mark.parametrize(
    ("layout", "record"),
    [
        ("messages", {"messages": HELLO, "source": "x"}),
        (
            "messages",
            {
                "messages": [
                    {"role": "User", "content": [{"type": "text", "text": "Hi"}]},
                    {"role": "model", "content": ["Hello!"], "tool_calls": None},
                ]
            },
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}),
        ("sharegpt", {"conversations": HELLO}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello!"}),
        ("dolly", {"instruction": "Hi", "context": None, "response": "Hello!", "category": "x"}),
        (
            "oasst trees",
            {"prompt": {"text": "Hi", "role": "prompter", "replies": [{"text": "Hello!", "role": "assistant"}]}},
        ),
    ],
)
def test_every_layout_gives_the_same_conversation(layout, record):
    assert layout_of(record) == layout
    assert made(record) == ([HELLO], {})


def test_inputs_contexts_and_system_prompts_are_kept():
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": "Add.\n\n1 and 2"}
    answer = {"role": "assistant", "content": "3"}
    assert made({"instruction": "Add.", "input": "1 and 2", "output": "3"})[0] == [[question, answer]]
    assert made({"instruction": "Add.", "context": "1 and 2", "response": "3"})[0] == [[question, answer]]
    assert made({"system": "Be brief.", "instruction": "Add.", "input": "1 and 2", "output": "3"})[0] == [
        [system, question, answer]
    ]
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": question["content"]}]
    assert made({"conversations": [*turns, {"from": "gpt", "value": "3"}]})[0] == [[system, question, answer]]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([*HELLO, {"role": "tool", "content": "1"}, HELLO[1]], "conversation with a function or tool message"),
        ([HELLO[0], {**HELLO[1], "tool_calls": [{"id": 1}]}, HELLO[1]], "conversation with a function or tool message"),
        ([HELLO[0], {"role": "assistant", "content": " \n"}], "conversation with an empty message"),
        ([HELLO[0], {"role": "assistant", "content": None}], "conversation with an empty message"),
        ([HELLO[0], {"role": "narrator", "content": "x"}, HELLO[1]], "conversation with an unknown role"),
        ([HELLO[0], "text", HELLO[1]], "conversation with an unknown role"),
        ([{"role": "user", "content": [{"type": "image"}]}, HELLO[1]], "conversation with content that is not text"),
        ([{"role": "user", "content": 5}, HELLO[1]], "conversation with content that is not text"),
        ([HELLO[0]], "conversation without a question and an answer"),
        ([HELLO[1]], "conversation without a question and an answer"),
        ([], "conversation without a question and an answer"),
    ],
)
def test_what_cannot_be_used_is_counted_by_reason(turns, reason):
    assert made({"messages": turns}, {"messages": HELLO}) == ([HELLO], {reason: 1})


def test_a_conversation_ends_with_the_assistant():
    trailing = [*HELLO, {"role": "user", "content": "Still there?"}, {"role": "user", "content": ""}]
    assert made({"messages": trailing}) == ([HELLO], {"message without an answer, cut off": 2})


def test_an_empty_system_message_is_left_out():
    turns = [{"role": "system", "content": ""}, *HELLO]
    assert made({"messages": turns}) == ([HELLO], {"empty system message": 1})


def test_a_record_of_no_layout_is_counted_and_never_the_end_of_a_run():
    found = made({"messages": HELLO}, {"body": "x", "id": 1}, {"messages": None}, {}, {"messages": HELLO})
    assert found == ([HELLO, HELLO], {"record that is not a conversation": 3})


# ---- OASST ---------------------------------------------------------------------------------------------------------


def row(message_id: str, parent_id: str | None, rank: int | None = None, **fields) -> dict:
    """A message row; ids begin with the letter of the role, and the text is the id."""
    role = {"p": "prompter", "a": "assistant"}[message_id[0]]
    names = {"message_id": message_id, "parent_id": parent_id, "role": role, "text": message_id, "rank": rank}
    return {**names, "deleted": False, "lang": "en", "message_tree_id": "p1", **fields}


ROWS = [
    row("p1", None),
    row("a1", "p1", 1),
    row("a2", "p1", 0),
    row("a3", "p1", 2),
    row("p4", "a2"),
    row("p3", "a2"),
    row("p2", "a2"),  # nobody answered it
    row("a5", "p4", 0),
    row("a6", "p3", 1),
    row("a7", "p3", 0),
    row("p9", "a7"),
    row("p20", None, lang="de"),
    row("a21", "p20", 0, lang="de"),
]


def paths(rows: list[dict], **settings) -> list[str]:
    return [" ".join(message["content"] for message in messages) for messages in made(*rows, **settings)[0]]


def test_the_best_ranked_path_of_each_tree_is_taken():
    assert paths(ROWS) == ["p1 a2 p3 a7", "p20 a21"]
    assert paths(ROWS, language="en") == ["p1 a2 p3 a7"]
    assert made(*ROWS, language="en")[1]["OASST tree in another language"] == 1


def test_every_path_ends_with_an_assistant_and_none_is_the_beginning_of_another():
    found = paths(ROWS, oasst_all_paths=True)
    assert found == ["p1 a2 p3 a7", "p1 a2 p3 a6", "p1 a2 p4 a5", "p1 a1", "p1 a3", "p20 a21"]


def test_the_order_of_the_rows_does_not_matter():
    assert sorted(paths(ROWS[::-1])) == sorted(paths(ROWS))
    assert sorted(paths(ROWS[::-1], oasst_all_paths=True)) == sorted(paths(ROWS, oasst_all_paths=True))


def test_deleted_and_empty_messages_end_their_branch():
    rows = [{**each, "deleted": each["message_id"] == "a2"} for each in ROWS]
    assert paths(rows, language="en") == ["p1 a1"]
    rows = [{**each, "text": "" if each["message_id"] == "a7" else each["text"]} for each in ROWS]
    assert paths(rows, language="en") == ["p1 a2 p3 a6"]
    rows = [{**each, "deleted": each["message_id"] == "p1"} for each in ROWS]
    assert made(*rows, language="en")[1]["OASST tree without an answer"] == 1


def test_orphans_repeats_and_circles_neither_hang_nor_pass_unseen():
    rows = [*ROWS, ROWS[1], row("a30", "p31"), row("p32", "a33", None), row("a33", "p32")]
    found, skipped = made(*rows, language="en")
    assert len(found) == 1
    assert skipped["OASST message that is a repeat"] == 1
    assert skipped["OASST message whose parent is missing"] == 3


def test_a_tree_gives_what_its_rows_give():
    def tree(each: dict) -> dict:
        return {**each, "replies": [tree(reply) for reply in ROWS if reply["parent_id"] == each["message_id"]]}

    trees = [{"message_tree_id": each["message_id"], "prompt": tree(each)} for each in ROWS if not each["parent_id"]]
    for all_paths in (False, True):
        assert paths(trees, oasst_all_paths=all_paths) == paths(ROWS, oasst_all_paths=all_paths)


def test_replies_without_ids_and_ranks_keep_their_order():
    replies = [{"role": "assistant", "text": f"answer {number}"} for number in range(12)]
    record = {"prompt": {"role": "prompter", "text": "ask", "replies": replies}}
    assert paths([record]) == ["ask answer 0"]
    assert paths([record], oasst_all_paths=True) == [f"ask answer {number}" for number in range(12)]


# ---- the scripts on local files ------------------------------------------------------------------------------------


def run(script: str, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data" / script), *map(str, arguments), "--output_dir", str(cwd / "out")]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")


def prepared(folder: Path, name: str, split: str) -> tuple[list, np.ndarray]:
    """(documents, ids) of a prepared split."""
    info = read_info(folder, name)
    files = [np.fromfile(folder / each.file, dtype="<u2") for each in info.splits[split].files]
    return list(read_prepared(folder, info, split)), np.concatenate(files)


def chat_file(path: Path, n: int) -> Path:
    """A JSONL file of n distinct conversations, in turn of three layouts, with an unpaired surrogate and CRLF."""
    records = [
        [
            {
                "messages": [
                    {"role": "user", "content": f"q{number}\r\n\ud800"},
                    {"role": "assistant", "content": "é" * number},
                ]
            },
            {
                "conversations": [
                    {"from": "human", "value": f"q{number}"},
                    {"from": "gpt", "value": f"a{number} <|im_end|>"},
                ]
            },
            {"instruction": f"q{number}", "context": "", "response": f"a{number}"},
        ][number % 3]
        for number in range(1, n + 1)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_a_local_file_becomes_a_data_set(tmp_path):
    chat_file(tmp_path / "mine.jsonl", 40)
    done = run("prepare-chat.py", "--input", "mine.jsonl", "--licence", "MIT", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info = read_info(tmp_path / "out", "chat")
    assert (info.format, info.source, info.licence) == ("chat", "mine.jsonl", "MIT")
    train, train_ids = prepared(tmp_path / "out", "chat", "train")
    val, val_ids = prepared(tmp_path / "out", "chat", "val")
    assert (len(train), len(val)) == (38, 2)
    for documents, ids in ((train, train_ids), (val, val_ids)):
        expected = [encode_chat(messages, end_of_conversation=True) for messages in documents]
        assert ids.tolist() == [each for document in expected for each in document]
    contents = {message["content"] for messages in train + val for message in messages}
    assert "q3\n�" in contents and "a4 <|im_end|>" in contents
    assert done.stdout.count("MIT") == 1


def test_every_path_of_a_tree_goes_to_one_split(tmp_path):
    rows = []
    for tree in range(20):
        rows.append(row(f"p{tree}", None))
        rows += [row(f"a{tree}-{reply}", f"p{tree}", reply) for reply in range(5)]
    (tmp_path / "trees.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run("prepare-chat.py", "--input", "trees.jsonl", "--all_paths", "--val_fraction", "0.2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train, val = (prepared(tmp_path / "out", "chat", split)[0] for split in ("train", "val"))
    assert (len(train), len(val)) == (80, 20)
    openings = [{messages[0]["content"] for messages in documents} for documents in (train, val)]
    assert not openings[0] & openings[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl not found"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", '{"messages": []}\n{"messages', "a.jsonl line 2: broken JSON"),
        ("a.jsonl", '{"messages": []}', "no usable conversation in a.jsonl (conversation without a question"),
        ("a.json", "[]", "no usable conversation in a.json (no record)"),
        ("a.txt", "Hi", "a.txt is of unknown kind"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_what_was_there(tmp_path, name, content, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "chat.json").write_text("before")
    if content is not None:
        (tmp_path / name).write_text(content)
    done = run("prepare-chat.py", "--input", name, cwd=tmp_path)
    assert done.returncode == 1
    assert f"error: {message}" in done.stderr and "Traceback" not in done.stderr
    files = [path.name for path in (tmp_path / "out").iterdir() if path.name != ".chat.lock"]
    assert files == ["chat.json"] and (tmp_path / "out" / "chat.json").read_text() == "before"


@pytest.mark.skipif(not SAMPLES.exists(), reason="the OASST1 sample lies in ../shared, which is not here")
def test_the_oasst_sample_gives_one_conversation_a_tree(tmp_path):
    done = run("prepare-chat.py", "--input", SAMPLES / "oasst1_en_validation.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info = read_info(tmp_path / "out", "chat")
    assert sum(split.documents for split in info.splits.values()) == 188
    assert info.report["OASST message whose parent is missing"] == 3
    for messages in prepared(tmp_path / "out", "chat", "train")[0]:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)


def test_educational_text_is_read_from_a_field_or_a_text_file(tmp_path):
    texts = [f"Lesson {number}.\n\nWater boils at 100 °C." for number in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts[:15]))
    (tmp_path / "b.txt").write_text("\n<|endoftext|>\n".join(texts[15:]), "utf-8")
    arguments = ("--input", "a.jsonl", "b.txt", "--field", "body", "--shard_tokens", "100")
    done = run("prepare-education.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    documents = []
    for split in ("train", "val"):
        found, ids = prepared(tmp_path / "out", "education", split)
        assert ids.tolist() == [each for document in found for each in encode_document(document)]
        documents += found
    assert sorted(documents) == sorted(texts)
    assert len(read_info(tmp_path / "out", "education").splits["train"].files) > 1
    done = run("prepare-education.py", "--input", "a.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and "--field (body)" in done.stderr
