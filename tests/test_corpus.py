"""The preparation pipeline: what is written can be read back, and does not depend on workers, order or repeats."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.cli import UserError
from data import cleaning, corpus, prepared
from data.corpus import Dataset, PrepareOptions, prepare
from data.prepared import read_description, read_prepared
from data.sources import read_records
from setup_tokenizer import (
    ENDOFTEXT_ID,
    IM_END_ID,
    IM_START_ID,
    ROLES,
    encode_chat,
    encode_document,
    encode_documents,
    get_base_tokenizer,
    get_extended_tokenizer,
)

ROOT = Path(__file__).resolve().parent.parent
TEXT = Dataset("mine", "text", "a test", "MIT")
CHAT = Dataset("mine", "chat", "a test", "MIT", non_commercial=True)


def stories(count: int) -> list[str]:
    return [f"Story {n}. Once upon a time there were {n * n} cats.\n\nThe end of {n}." for n in range(count)]


def talk(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


def options(folder: Path, **changes) -> PrepareOptions:
    return PrepareOptions(output_dir=str(folder), **{"workers": 1, **changes})


def ids_of(folder: Path, split: str) -> list[int]:
    description = read_description(folder, "mine")
    parts = [np.fromfile(folder / entry["file"], dtype="<u2") for entry in description["splits"][split]["files"]]
    return np.concatenate(parts).tolist()


def test_text_is_written_as_the_contract_says(tmp_path):
    documents = stories(200)
    description = prepare(TEXT, options(tmp_path, val_fraction=0.1), documents)
    assert description == json.loads((tmp_path / "mine.json").read_text("utf-8"))
    found = []
    for split in ("train", "val"):
        kept = list(read_prepared(tmp_path, description, split))
        totals = description["splits"][split]
        assert ids_of(tmp_path, split) == [token for document in kept for token in encode_document(document)]
        assert totals["documents"] == len(kept)
        assert totals["tokens"] == len(ids_of(tmp_path, split))
        assert totals["text_bytes"] == sum(len(document.encode()) for document in kept)
        content = (tmp_path / f"mine-{split}.bin").read_bytes()
        assert totals["files"][0]["sha256"] == hashlib.sha256(content).hexdigest()
        text = (tmp_path / f"mine-{split}.txt").read_text("utf-8")
        assert text == "".join(f"{document}\n<|endoftext|>\n" for document in kept)
        found += kept
    assert sorted(found) == sorted(documents)
    assert description["splits"]["val"]["documents"] == 20, "a small corpus gets exactly its share"
    assert (description["tokenizer"], description["n_vocab"], description["dtype"]) == ("gpt2_chatml", 50259, "uint16")


def test_chat_is_written_as_the_contract_says(tmp_path, capsys):
    train = [talk(f"Hi, I am {n}.", "Hello “you”!") for n in range(30)]
    description = prepare(CHAT, options(tmp_path), train, [talk("Bye", "See you")])
    assert list(read_prepared(tmp_path, description, "train")) == train
    expected = [token for messages in train for token in encode_chat(messages, end_of_conversation=True)]
    assert ids_of(tmp_path, "train") == expected
    line = (tmp_path / "mine-val.jsonl").read_text("utf-8")
    assert line == json.dumps({"messages": talk("Bye", "See you")}) + "\n"
    assert "“you”" in (tmp_path / "mine-train.jsonl").read_text("utf-8"), "characters are kept readable"
    assert capsys.readouterr().out.count("licence: MIT (non-commercial use only)") == 1


def test_the_result_does_not_depend_on_workers_order_or_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr("data.workers.BATCH_CHARACTERS", 500)  # many batches, so that processes are really started
    documents = stories(300)
    changes = {"val_fraction": 0.3, "shard_tokens": 1000}
    alone = prepare(TEXT, options(tmp_path / "1", **changes), documents)
    several = prepare(TEXT, options(tmp_path / "3", workers=3, **changes), documents)
    assert alone == several
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")
    turned = prepare(TEXT, options(tmp_path / "t", **changes), [*documents[::-1], *documents[:50]])
    assert turned["report"]["duplicates"] == 50
    for split in ("train", "val"):
        kept = (set(read_prepared(folder, alone, split)) for folder in (tmp_path / "1", tmp_path / "t"))
        assert next(kept) == next(kept)
    other = prepare(TEXT, options(tmp_path / "s", seed=2, **changes), documents)
    assert set(read_prepared(tmp_path / "s", other, "val")) != set(read_prepared(tmp_path / "1", alone, "val"))


def test_shards_are_one_stream_and_leftovers_of_an_earlier_run_go(tmp_path):
    whole = prepare(TEXT, options(tmp_path), stories(100))
    stream = {split: ids_of(tmp_path, split) for split in ("train", "val")}
    (tmp_path / "mine-notes.txt").write_text("not ours")
    (tmp_path / "mine2-train.bin").write_text("not ours")
    sharded = prepare(TEXT, options(tmp_path, shard_tokens=500), stories(100))
    assert {split: ids_of(tmp_path, split) for split in ("train", "val")} == stream
    entries = sharded["splits"]["train"]["files"]
    assert [entry["file"] for entry in entries] == [f"mine-train-{n:05d}.bin" for n in range(len(entries))]
    assert {entry["tokens"] for entry in entries[:-1]} == {500} and 0 < entries[-1]["tokens"] <= 500
    for entry in entries:
        assert hashlib.sha256((tmp_path / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    assert not (tmp_path / "mine-train.bin").exists()
    assert (tmp_path / "mine-notes.txt").exists() and (tmp_path / "mine2-train.bin").exists()
    assert prepare(TEXT, options(tmp_path), stories(100)) == whole
    assert not list(tmp_path.glob("mine-train-*.bin"))


def test_validation_wins_over_train_and_repeats_go(tmp_path):
    train = [talk("a", "b"), talk("a", "b"), talk("c", "d"), talk("e", "f")]
    description = prepare(CHAT, options(tmp_path), train, [talk("c", "d"), talk("c", "d"), talk("g", "h")])
    assert list(read_prepared(tmp_path, description, "train")) == [talk("a", "b"), talk("e", "f")]
    assert list(read_prepared(tmp_path, description, "val")) == [talk("c", "d"), talk("g", "h")]
    assert description["report"]["duplicates"] == 2
    assert description["report"]["train documents also in validation"] == 1


def drop_short(document: str) -> str | None:
    return document if len(document) > 3 else None


def test_passes_run_in_order_and_are_counted(tmp_path):
    documents = ["  Itâ€™s\r\nfine ", "ok", " \n ", "", "plain text", "more text", "more text "]
    passes = [drop_short, cleaning.fix_mojibake, cleaning.normalise]
    description = prepare(TEXT, options(tmp_path, val_fraction=0.5), documents, clean=passes)
    kept = [*read_prepared(tmp_path, description, "train"), *read_prepared(tmp_path, description, "val")]
    assert sorted(kept) == ["It’s\nfine", "more text", "plain text"]
    assert description["report"] == {
        "changed by fix_mojibake": 1,
        "changed by normalise": 2,
        "dropped by drop_short": 3,
        "duplicates": 1,
        "read": 7,
    }


def test_documents_that_are_too_long_are_dropped_and_counted(tmp_path):
    conversations = [talk("Hi", "word " * n) for n in range(1, 21)]
    lengths = [len(encode_chat(messages)) for messages in conversations]
    description = prepare(CHAT, options(tmp_path, max_document_tokens=lengths[9]), conversations, [talk("Bye", "Bye")])
    assert list(read_prepared(tmp_path, description, "train")) == conversations[:10]
    assert description["report"][f"longer than {lengths[9]} tokens"] == 10
    with pytest.raises(UserError, match="empty or too long"):
        prepare(TEXT, options(tmp_path, max_document_tokens=1), ["one two", "three four"])


def test_near_repeats_go_whatever_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("data.workers.BATCH_CHARACTERS", 2000)
    random = np.random.default_rng(0)
    documents = [" ".join(map(str, random.integers(0, 10_000, 100))) for _ in range(120)]
    nearly = [f"{document[:-9]} and so on" for document in documents[:60]]
    mixed = [*documents, *nearly, "short", "short one"]
    alone = prepare(TEXT, options(tmp_path / "1", near_dedup=True), mixed)
    assert alone["report"]["near duplicates"] == 60
    kept = [document for split in ("train", "val") for document in read_prepared(tmp_path / "1", alone, split)]
    assert sorted(kept) == sorted([*documents, "short", "short one"])
    assert prepare(TEXT, options(tmp_path / "2", near_dedup=True, workers=2), mixed) == alone
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    given = prepare(TEXT, options(tmp_path / "3", near_dedup=True), documents, [*nearly, nearly[0][:-3]])
    assert set(read_prepared(tmp_path / "3", given, "train")) == set(documents[60:]), "validation wins over train"
    assert given["splits"]["val"]["documents"] == 60 and given["report"]["near duplicates"] == 61


def test_limit_takes_the_first_documents_and_reads_no_further(tmp_path):
    read = []

    def source():
        for document in stories(1000):
            read.append(document)
            yield document

    description = prepare(TEXT, options(tmp_path, limit=20), source(), iter(stories(2000)[1500:]))
    assert len(read) == 20
    assert [description["splits"][split]["documents"] for split in ("train", "val")] == [20, 20]


# --- a finished preparation ---


def test_a_finished_preparation_is_recognised(tmp_path, capsys):
    source = tmp_path / "in.txt"
    source.write_text("anything")
    folder = tmp_path / "out"

    def run(**changes):
        read = []
        documents = (read.append(1) or document for document in stories(50))
        prepare(TEXT, options(folder, **changes), documents, inputs=[source])
        return bool(read)

    assert run()
    before = files_of(folder)
    assert not run() and not run(workers=2)
    assert files_of(folder) == before
    assert "already prepared" in capsys.readouterr().out
    assert run(force=True) and files_of(folder) == before
    assert run(seed=5) and run(val_fraction=0.2) and run(limit=40) and run()
    source.write_text("something else")
    assert run() and not run()
    with (folder / "mine-train.bin").open("ab") as file:
        file.write(b"xx")
    assert run(), "a file of another length is not taken for finished"
    (folder / "mine-val.txt").unlink()
    assert run()


# --- faults ---


@pytest.mark.parametrize(
    ("documents", "val", "sentence"),
    [
        ([], None, "no document found"),
        (["", " \n"], None, "are empty"),
        (["one", "one"], None, "too few to divide"),
        (["one", "two"], [], "validation file has no document"),
        (["one"], ["one"], "no train document is left"),
    ],
)
def test_too_few_documents(tmp_path, documents, val, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(TEXT, options(tmp_path), documents, val)
    assert files_of(tmp_path) == {}


def test_two_documents_can_be_divided(tmp_path):
    description = prepare(TEXT, options(tmp_path), ["one", "two"])
    assert [description["splits"][split]["documents"] for split in ("train", "val")] == [1, 1]


def test_an_input_that_is_gone(tmp_path):
    with pytest.raises(UserError, match=r"no\.txt cannot be read"):
        prepare(TEXT, options(tmp_path), stories(3), inputs=[tmp_path / "no.txt"])


def test_a_malformed_conversation_is_named(tmp_path):
    with pytest.raises(UserError, match="conversation 2: message 0: unknown role 'robot'"):
        prepare(CHAT, options(tmp_path), [talk("a", "b"), [{"role": "robot", "content": "x"}]])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_in_the_middle_changes_nothing(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("data.workers.BATCH_CHARACTERS", 300)
    prepare(TEXT, options(tmp_path), stories(100))
    before = files_of(tmp_path)

    def broken():
        yield from stories(150)
        raise UserError("in.txt is not UTF-8 at byte 7")

    with pytest.raises(UserError, match="byte 7"):
        prepare(TEXT, options(tmp_path, workers=workers), broken())
    assert files_of(tmp_path) == before


NEEDS_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device /dev/full stands for a full disk")


@pytest.mark.parametrize("fault", [pytest.param("write", marks=NEEDS_FULL), "flush", "rename"])
def test_a_full_disk_is_one_sentence_and_changes_nothing(tmp_path, monkeypatch, fault):
    prepare(TEXT, options(tmp_path), stories(100))
    before = files_of(tmp_path)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def open_full_device(writer):
        writer._bin = writer._bin_stack.enter_context(open("/dev/full", "wb", buffering=0))  # noqa: PTH123, SIM115
        writer._files.append({"file": "mine-train.bin", "tokens": 0})

    owner, name, stand_in = {
        "write": (prepared.SplitWriter, "_open_shard", open_full_device),
        "flush": (os, "fsync", fail),
        "rename": (os, "replace", fail),
    }[fault]
    monkeypatch.setattr(owner, name, stand_in)
    with pytest.raises(UserError, match="the disk is full"):
        prepare(TEXT, options(tmp_path), stories(120))
    monkeypatch.undo()
    assert files_of(tmp_path) == before


def test_too_little_space_is_said_before_the_work(tmp_path, monkeypatch):
    source = tmp_path / "in.txt"
    source.write_text("some text " * 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="free some space"):
        prepare(TEXT, options(tmp_path), stories(3), inputs=[source])


@pytest.mark.parametrize("name", ["in.txt", "in.md", "in.text", "in.markdown", "in.TXT", "in.markdown.gz"])
def test_the_space_of_a_text_is_asked_for_whole(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"x" * 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="free some space"):
        prepare(TEXT, options(tmp_path), stories(3), inputs=[tmp_path / name])


def test_the_space_of_part_of_an_input_is_not_asked_for(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("some text " * 1000)
    (tmp_path / "in.jsonl.gz").write_bytes(b"x" * 300)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 150}))
    prepare(TEXT, options(tmp_path / "a", limit=3), stories(30), inputs=[tmp_path / "in.txt"])
    prepare(TEXT, options(tmp_path / "b"), stories(30), inputs=[tmp_path / "in.jsonl.gz"])


@pytest.mark.parametrize("name", ["mine-train.txt", "mine-val.jsonl", "mine.json", "mine.md"])
def test_an_input_is_never_replaced(tmp_path, name):
    (tmp_path / name).write_text("A text of one's own.")
    with pytest.raises(UserError, match="would be replaced"):
        prepare(TEXT, options(tmp_path), stories(3), inputs=[tmp_path / name])
    prepare(TEXT, options(tmp_path / "out"), stories(3), inputs=[tmp_path / name])
    assert (tmp_path / name).read_text() == "A text of one's own."


def test_ids_that_uint16_cannot_hold_are_refused(tmp_path, monkeypatch):
    gpt2 = get_base_tokenizer()
    large = tiktoken.Encoding(
        "large_chatml", pat_str=gpt2._pat_str, mergeable_ranks=gpt2._mergeable_ranks, special_tokens={"<|x|>": 70000}
    )
    monkeypatch.setattr(corpus, "get_extended_tokenizer", lambda base_encoding: large)
    with pytest.raises(UserError, match=r"70,001 ids and \.bin files hold uint16"):
        prepare(TEXT, options(tmp_path), stories(3), base_encoding="large")


def test_two_runs_of_one_name_exclude_each_other(tmp_path):
    def nested():
        yield "a document"
        with pytest.raises(UserError, match="in use by another run"):
            prepare(TEXT, options(tmp_path), stories(3))
        yield "another"

    prepare(TEXT, options(tmp_path), nested())


@pytest.mark.parametrize(
    "change", [{"val_fraction": 0}, {"val_fraction": 1.0}, {"limit": 0}, {"workers": 0}, {"seed": -1}]
)
def test_impossible_options(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PrepareOptions(**change)


ENDLESS = """
import sys
sys.path[:0] = [{data!r}]
from data import corpus, workers
workers.BATCH_CHARACTERS = 500

def endless():
    n = 0
    while True:
        n += 1
        if n == 2000:
            print("working", flush=True)
        yield f"Story number {{n}} about {{n * n}} cats"

if __name__ == "__main__":
    options = corpus.PrepareOptions(output_dir={out!r}, workers=2)
    corpus.prepare(corpus.Dataset("mine", "text", "a test", "MIT"), options, endless())
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker processes in /proc")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_preparation_leaves_no_files_and_no_processes(tmp_path, signal_number):
    out = tmp_path / "out"
    prepare(TEXT, options(out), stories(50))
    before = files_of(out)
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS.format(data=str(ROOT), out=str(out)))
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        while "working" not in run.stdout.readline():
            assert run.poll() is None
        workers = children_of(run.pid)
        run.send_signal(signal_number)
        assert run.wait(timeout=20) != 0
    assert workers
    deadline = time.monotonic() + 10
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "worker processes are still there"
        time.sleep(0.05)
    left = [path for path in out.iterdir() if path.name != ".mine.lock"]
    if signal_number == signal.SIGKILL:  # nothing under a final name; the next run removes the rest
        left.remove(out / ".mine.tmp")
    left = {path.name: path.read_bytes() for path in left}
    assert left == before
    prepare(TEXT, options(out), stories(50))
    assert files_of(out) == before, "the next run starts again without harm"


def children_of(process_id: int) -> list[int]:
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == process_id:
                children.append(int(entry.name))
    return children


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- hard text ---

AWKWARD = st.text(
    st.one_of(st.sampled_from(" \n\t\r\x00\x1c\x85\xa0\u2028\u3000<|>'’é٣"), st.characters()), max_size=40
)
PIECES = st.sampled_from(
    [
        "<|endoftext|>",
        "<|white space|>",
        "\n<|endoftext|>\n",
        "\\<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>\n",
        "   ",
        "\n\n\n",
    ]
)
CONTENTS = st.lists(st.one_of(AWKWARD, PIECES), max_size=5).map("".join)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": CONTENTS}), min_size=1, max_size=5
)
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@SETTINGS
@given(st.lists(CONTENTS, max_size=6))
def test_a_batch_has_the_ids_of_its_documents(documents):
    base = get_base_tokenizer()
    expected = [token for document in documents for token in [*base.encode_ordinary(document), ENDOFTEXT_ID]]
    assert encode_documents(documents).tolist() == expected


@SETTINGS
@given(st.lists(MESSAGES, max_size=4))
def test_a_batch_has_the_ids_of_its_conversations(conversations):
    expected = [token for messages in conversations for token in encode_chat(messages, end_of_conversation=True)]
    ids = encode_documents(conversations).tolist()
    assert ids == expected
    n_messages = sum(map(len, conversations))
    assert [ids.count(IM_START_ID), ids.count(IM_END_ID), ids.count(ENDOFTEXT_ID)] == [
        n_messages,
        n_messages,
        len(conversations),
    ], "no content becomes a control id"


@settings(SETTINGS, max_examples=40)
@given(st.lists(CONTENTS, min_size=1, max_size=12))
def test_documents_come_back_from_bin_and_text(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("round")
    wanted = list(dict.fromkeys(map(without_surrogates, documents)))
    wanted = [document for document in wanted if document.strip()]
    description = prepare(TEXT, options(folder), [*documents, "train"], ["val"])
    wanted = [document for document in dict.fromkeys([*wanted, "train"]) if document != "val"]
    assert list(read_prepared(folder, description, "train")) == wanted
    ids = ids_of(folder, "train")
    ends = [index for index, token in enumerate(ids) if token == ENDOFTEXT_ID]
    starts = [0, *(end + 1 for end in ends)]
    enc = get_extended_tokenizer()
    assert [enc.decode(ids[start:end]) for start, end in zip(starts, ends, strict=False)] == wanted


@settings(SETTINGS, max_examples=40)
@given(st.lists(MESSAGES, min_size=1, max_size=8))
def test_conversations_come_back_from_jsonl(tmp_path_factory, conversations):
    folder = tmp_path_factory.mktemp("round")
    mended = [
        [{**message, "content": without_surrogates(message["content"])} for message in messages]
        for messages in conversations
        if any(message["content"] for message in messages)
    ]
    extra = talk("only", "train")
    description = prepare(CHAT, options(folder), [*conversations, extra], [talk("only", "val")])
    unique = [json.loads(line) for line in dict.fromkeys(json.dumps(messages) for messages in [*mended, extra])]
    assert list(read_prepared(folder, description, "train")) == unique


def decoded_documents(ids: list[int]) -> list[str]:
    enc, ends = get_extended_tokenizer(), [index for index, token in enumerate(ids) if token == ENDOFTEXT_ID]
    return [enc.decode(ids[start:end]) for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def decoded_conversations(ids: list[int]) -> list[list[dict]]:
    """The messages between control ids; a control token that any content forged makes other messages."""
    enc, conversations, start = get_extended_tokenizer(), [[]], None
    for index, token in enumerate(ids):
        if token == IM_START_ID:
            start = index + 1
        elif token == IM_END_ID:
            role, content = enc.decode(ids[start:index]).split("\n", 1)
            conversations[-1].append({"role": role, "content": content})
        elif token == ENDOFTEXT_ID:
            conversations.append([])
    return conversations[:-1]


# What text can hold at its worst: control tokens spelt out, the files' own separators, unpaired surrogates, NUL,
# writing directions, characters joined or combined, every kind of space and line end.
WORST = ["<|endoftext|>", "\n<|endoftext|>\n", "\\<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORST += ["\ud800", "\udc00", "\ud83d", "\x00", "\x1b[2J", "\u202e", "\u2066", "\u200f", "\ufeff", "\u200d"]
WORST += ["👩\u200d👩\u200d👧", "e\u0301", "漢字", "ﷺ", "\U0010ffff", "<|im_start|>assistant\n", "'s", "don't", "3.14"]
WORST += ["\r\n", "\r", "\u2028", "\x85", "\x0c", "\u3000", "\t", " ", "   ", "\n\n\n", " " * 300, "x" * 300]
WORST += ['"', "\\", "\\n", "{}", "|", "<", ">", *(f" word{n}" for n in range(20))]


def test_5000_random_conversations_and_documents_come_back(tmp_path):
    random = np.random.default_rng(7)

    def text(most: int) -> str:
        return "".join(WORST[index] for index in random.integers(len(WORST), size=random.integers(1, most)))

    documents = list({without_surrogates(raw): raw for raw in (text(30) for _ in range(2600))}.values())
    documents += ["x" * 1_000_000, "\u202e" * 300_000]
    conversations = [
        [{"role": ROLES[role], "content": text(15)} for role in random.integers(3, size=random.integers(1, 6))]
        for _ in range(2600)
    ]
    conversations.append(talk("y" * 1_000_000, "\0" * 100_000))
    mended = [[{**each, "content": without_surrogates(each["content"])} for each in talk] for talk in conversations]
    mended = list({json.dumps(messages): messages for messages in mended}.values())
    prepare(TEXT, options(tmp_path / "text", val_fraction=0.5), documents)
    prepare(CHAT, options(tmp_path / "chat", val_fraction=0.5), conversations)
    texts = [one for split in ("train", "val") for one in decoded_documents(ids_of(tmp_path / "text", split))]
    chats = [one for split in ("train", "val") for one in decoded_conversations(ids_of(tmp_path / "chat", split))]
    assert sorted(texts) == sorted(filter(str.strip, map(without_surrogates, documents)))
    assert sorted(map(json.dumps, chats)) == sorted(map(json.dumps, mended))
    assert len(texts) + len(chats) > 5000
    for kind, found in (("text", texts), ("chat", chats)):
        description = read_description(tmp_path / kind, "mine")
        kept = [one for split in ("train", "val") for one in read_prepared(tmp_path / kind, description, split)]
        assert kept == found, "the text beside the ids is the same"


def test_lone_surrogates_of_json_become_replacement_characters(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "c\\ud83d\\ude00"}\n')
    documents = (record["text"] for record in read_records(tmp_path / "in.jsonl"))
    description = prepare(TEXT, options(tmp_path, val_fraction=0.5), documents)
    kept = {one for split in ("train", "val") for one in read_prepared(tmp_path, description, split)}
    assert kept == {"a\ufffdb", "c😀"} and description["report"]["unpaired surrogates"] == 1


@pytest.mark.parametrize(
    "document",
    ["x" * 1_000_000, " " * 1_000_000 + "x", "\n " * 600_000 + "x", "a" + "\u3000" * 1_000_001 + "b", "\0" * 1_000_000],
    ids=["letters", "blanks", "blank lines", "ideographic spaces", "NUL"],
)
def test_a_million_characters_without_a_word_end(document):
    assert get_extended_tokenizer().decode(encode_documents([document])[:-1].tolist()) == document


def test_every_option_is_read():
    source = (ROOT / "data" / "corpus.py").read_text("utf-8")
    for name in {field.name for field in dataclasses.fields(PrepareOptions)} - {"input"}:
        assert f"options.{name}" in source, name
    for script in (*(ROOT / "data").glob("prepare-*.py"), ROOT / "prepare_with_extended_tokenizer.py"):
        assert "options.input" in script.read_text("utf-8"), script.name
