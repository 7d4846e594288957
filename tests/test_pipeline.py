"""The preparation pipeline: what is written can be read back, and does not depend on workers, order or repeats."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from data import cleaning
from data.dataset import read_info
from data.documents import read_prepared
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare
from setup_tokenizer import encode_chat, encode_document

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
    parts = [np.fromfile(folder / entry.file, dtype="<u2") for entry in read_info(folder, "mine").splits[split].files]
    return np.concatenate(parts).tolist()


def test_text_is_written_as_the_contract_says(tmp_path):
    documents = stories(200)
    info = prepare(TEXT, options(tmp_path, val_fraction=0.1), Corpus(documents))
    assert info == read_info(tmp_path, "mine")
    assert info.to_json() == json.loads((tmp_path / "mine.json").read_text("utf-8"))
    found = []
    for split in ("train", "val"):
        kept = list(read_prepared(tmp_path, info, split))
        totals = info.splits[split]
        assert ids_of(tmp_path, split) == [token for document in kept for token in encode_document(document)]
        assert totals.documents == len(kept)
        assert totals.tokens == len(ids_of(tmp_path, split))
        assert totals.text_bytes == sum(len(document.encode()) for document in kept)
        content = (tmp_path / f"mine-{split}.bin").read_bytes()
        assert totals.files[0].sha256 == hashlib.sha256(content).hexdigest()
        text = (tmp_path / f"mine-{split}.txt").read_text("utf-8")
        assert text == "".join(f"{document}\n<|endoftext|>\n" for document in kept)
        found += kept
    assert sorted(found) == sorted(documents)
    assert info.splits["val"].documents == 20, "a small corpus gets exactly its share"
    assert (info.tokenizer, info.n_vocab, info.dtype) == ("gpt2_chatml", 50259, "uint16")


def test_chat_is_written_as_the_contract_says(tmp_path, capsys):
    train = [talk(f"Hi, I am {n}.", "Hello “you”!") for n in range(30)]
    info = prepare(CHAT, options(tmp_path), Corpus(train, [talk("Bye", "See you")]))
    assert list(read_prepared(tmp_path, info, "train")) == train
    expected = [token for messages in train for token in encode_chat(messages, end_of_conversation=True)]
    assert ids_of(tmp_path, "train") == expected
    line = (tmp_path / "mine-val.jsonl").read_text("utf-8")
    assert line == json.dumps({"messages": talk("Bye", "See you")}) + "\n"
    assert "“you”" in (tmp_path / "mine-train.jsonl").read_text("utf-8"), "characters are kept readable"
    assert capsys.readouterr().out.count("licence: MIT (non-commercial use only)") == 1


def test_the_result_does_not_depend_on_workers_order_or_repeats(tmp_path):
    documents = stories(300)
    changes = {"val_fraction": 0.3, "shard_tokens": 1000}
    small = {"batch_characters": 500}  # many batches, so that processes are really started
    alone = prepare(TEXT, options(tmp_path / "1", **changes), Corpus(documents), **small)
    several = prepare(TEXT, options(tmp_path / "3", workers=3, **changes), Corpus(documents), **small)
    assert alone == several
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")
    turned = prepare(TEXT, options(tmp_path / "t", **changes), Corpus([*documents[::-1], *documents[:50]]))
    assert turned.report["duplicates"] == 50
    for split in ("train", "val"):
        kept = (set(read_prepared(folder, alone, split)) for folder in (tmp_path / "1", tmp_path / "t"))
        assert next(kept) == next(kept)
    other = prepare(TEXT, options(tmp_path / "s", seed=2, **changes), Corpus(documents))
    assert set(read_prepared(tmp_path / "s", other, "val")) != set(read_prepared(tmp_path / "1", alone, "val"))


def test_shards_are_one_stream_and_leftovers_of_an_earlier_run_go(tmp_path):
    whole = prepare(TEXT, options(tmp_path), Corpus(stories(100)))
    stream = {split: ids_of(tmp_path, split) for split in ("train", "val")}
    (tmp_path / "mine-notes.txt").write_text("not ours")
    (tmp_path / "mine2-train.bin").write_text("not ours")
    sharded = prepare(TEXT, options(tmp_path, shard_tokens=500), Corpus(stories(100)))
    assert {split: ids_of(tmp_path, split) for split in ("train", "val")} == stream
    entries = sharded.splits["train"].files
    assert [entry.file for entry in entries] == [f"mine-train-{n:05d}.bin" for n in range(len(entries))]
    assert {entry.tokens for entry in entries[:-1]} == {500} and 0 < entries[-1].tokens <= 500
    for entry in entries:
        assert hashlib.sha256((tmp_path / entry.file).read_bytes()).hexdigest() == entry.sha256
    assert not (tmp_path / "mine-train.bin").exists()
    assert (tmp_path / "mine-notes.txt").exists() and (tmp_path / "mine2-train.bin").exists()
    assert prepare(TEXT, options(tmp_path), Corpus(stories(100))) == whole
    assert not list(tmp_path.glob("mine-train-*.bin"))


def test_validation_wins_over_train_and_repeats_go(tmp_path):
    train = [talk("a", "b"), talk("a", "b"), talk("c", "d"), talk("e", "f")]
    info = prepare(CHAT, options(tmp_path), Corpus(train, [talk("c", "d"), talk("c", "d"), talk("g", "h")]))
    assert list(read_prepared(tmp_path, info, "train")) == [talk("a", "b"), talk("e", "f")]
    assert list(read_prepared(tmp_path, info, "val")) == [talk("c", "d"), talk("g", "h")]
    assert info.report["duplicates"] == 2
    assert info.report["train documents also in validation"] == 1


def drop_short(document: str) -> str | None:
    return document if len(document) > 3 else None


def test_passes_run_in_order_and_are_counted(tmp_path):
    documents = ["  Itâ€™s\r\nfine ", "ok", " \n ", "", "plain text", "more text", "more text "]
    passes = [drop_short, cleaning.fix_mojibake, cleaning.normalise]
    info = prepare(TEXT, options(tmp_path, val_fraction=0.5), Corpus(documents), passes)
    kept = [*read_prepared(tmp_path, info, "train"), *read_prepared(tmp_path, info, "val")]
    assert sorted(kept) == ["It’s\nfine", "more text", "plain text"]
    assert info.report == {
        "changed by fix_mojibake": 1,
        "changed by normalise": 2,
        "dropped by drop_short": 3,
        "duplicates": 1,
        "read": 7,
    }


def test_documents_that_are_too_long_are_dropped_and_counted(tmp_path):
    conversations = [talk("Hi", "word " * n) for n in range(1, 21)]
    lengths = [len(encode_chat(messages)) for messages in conversations]
    corpus = Corpus(conversations, [talk("Bye", "Bye")])
    info = prepare(CHAT, options(tmp_path, max_document_tokens=lengths[9]), corpus)
    assert list(read_prepared(tmp_path, info, "train")) == conversations[:10]
    assert info.report[f"longer than {lengths[9]} tokens"] == 10
    with pytest.raises(UserError, match="empty or too long"):
        prepare(TEXT, options(tmp_path, max_document_tokens=1), Corpus(["one two", "three four"]))


def test_near_repeats_go_whatever_the_number_of_workers(tmp_path):
    small = {"batch_characters": 2000}
    random = np.random.default_rng(0)
    documents = [" ".join(map(str, random.integers(0, 10_000, 100))) for _ in range(120)]
    nearly = [f"{document[:-9]} and so on" for document in documents[:60]]
    mixed = [*documents, *nearly, "short", "short one"]
    alone = prepare(TEXT, options(tmp_path / "1", near_dedup=True), Corpus(mixed), **small)
    assert alone.report["near duplicates"] == 60
    kept = [document for split in ("train", "val") for document in read_prepared(tmp_path / "1", alone, split)]
    assert sorted(kept) == sorted([*documents, "short", "short one"])
    assert prepare(TEXT, options(tmp_path / "2", near_dedup=True, workers=2), Corpus(mixed), **small) == alone
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    given = prepare(TEXT, options(tmp_path / "3", near_dedup=True), Corpus(documents, [*nearly, nearly[0][:-3]]))
    assert set(read_prepared(tmp_path / "3", given, "train")) == set(documents[60:]), "validation wins over train"
    assert given.splits["val"].documents == 60 and given.report["near duplicates"] == 61


def test_limit_takes_the_first_documents_and_reads_no_further(tmp_path):
    read = []

    def source():
        for document in stories(1000):
            read.append(document)
            yield document

    info = prepare(TEXT, options(tmp_path, limit=20), Corpus(source(), iter(stories(2000)[1500:])))
    assert len(read) == 20
    assert [info.splits[split].documents for split in ("train", "val")] == [20, 20]


# --- a finished preparation ---


def test_a_finished_preparation_is_recognised(tmp_path, capsys):
    source = tmp_path / "in.txt"
    source.write_text("anything")
    folder = tmp_path / "out"

    def run(**changes):
        read = []
        documents = (read.append(1) or document for document in stories(50))
        prepare(TEXT, options(folder, **changes), Corpus(documents, files=[source]))
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
        (["one"], ["one"], "no training document of .* is left"),
    ],
)
def test_too_few_documents(tmp_path, documents, val, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(TEXT, options(tmp_path), Corpus(documents, val))
    assert files_of(tmp_path) == {}


def test_two_documents_can_be_divided(tmp_path):
    info = prepare(TEXT, options(tmp_path), Corpus(["one", "two"]))
    assert [info.splits[split].documents for split in ("train", "val")] == [1, 1]


def test_an_input_that_is_gone(tmp_path):
    with pytest.raises(UserError, match=r"no\.txt cannot be read"):
        prepare(TEXT, options(tmp_path), Corpus(stories(3), files=[tmp_path / "no.txt"]))


def test_a_malformed_conversation_is_named(tmp_path):
    with pytest.raises(UserError, match="conversation 2: message 0: unknown role 'robot'"):
        prepare(CHAT, options(tmp_path), Corpus([talk("a", "b"), [{"role": "robot", "content": "x"}]]))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_in_the_middle_changes_nothing(tmp_path, workers):
    prepare(TEXT, options(tmp_path), Corpus(stories(100)))
    before = files_of(tmp_path)

    def broken():
        yield from stories(150)
        raise UserError("in.txt is not UTF-8 at byte 7")

    with pytest.raises(UserError, match="byte 7"):
        prepare(TEXT, options(tmp_path, workers=workers), Corpus(broken()), batch_characters=300)
    assert files_of(tmp_path) == before


NEEDS_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device /dev/full stands for a full disk")


@pytest.mark.parametrize("fault", [pytest.param("write", marks=NEEDS_FULL), "flush", "rename"])
def test_a_full_disk_is_one_sentence_and_changes_nothing(tmp_path, monkeypatch, fault):
    prepare(TEXT, options(tmp_path), Corpus(stories(100)))
    before = files_of(tmp_path)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def open_full_device(path, mode="r", **settings):
        if path.suffix == ".bin":
            path, settings = "/dev/full", {"buffering": 0}
        return open(path, mode, **settings)  # noqa: PTH123

    owner, name, stand_in = {
        "write": (Path, "open", open_full_device),
        "flush": (os, "fsync", fail),
        "rename": (os, "replace", fail),
    }[fault]
    monkeypatch.setattr(owner, name, stand_in)
    with pytest.raises(UserError, match="the disk is full"):
        prepare(TEXT, options(tmp_path), Corpus(stories(120)))
    monkeypatch.undo()
    assert files_of(tmp_path) == before


def test_too_little_space_is_said_before_the_work(tmp_path, monkeypatch):
    source = tmp_path / "in.txt"
    source.write_text("some text " * 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="free some space"):
        prepare(TEXT, options(tmp_path), Corpus(stories(3), files=[source]))


@pytest.mark.parametrize("name", ["in.txt", "in.md", "in.text", "in.markdown", "in.TXT", "in.markdown.gz"])
def test_the_space_of_a_text_is_asked_for_whole(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"x" * 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="free some space"):
        prepare(TEXT, options(tmp_path), Corpus(stories(3), files=[tmp_path / name]))


def test_the_space_of_part_of_an_input_is_not_asked_for(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("some text " * 1000)
    (tmp_path / "in.jsonl.gz").write_bytes(b"x" * 300)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 150}))
    prepare(TEXT, options(tmp_path / "a", limit=3), Corpus(stories(30), files=[tmp_path / "in.txt"]))
    prepare(TEXT, options(tmp_path / "b"), Corpus(stories(30), files=[tmp_path / "in.jsonl.gz"]))


@pytest.mark.parametrize("name", ["mine-train.txt", "mine-val.jsonl", "mine.json", "mine.md"])
def test_an_input_is_never_replaced(tmp_path, name):
    (tmp_path / name).write_text("A text of one's own.")
    with pytest.raises(UserError, match="would be replaced"):
        prepare(TEXT, options(tmp_path), Corpus(stories(3), files=[tmp_path / name]))
    prepare(TEXT, options(tmp_path / "out"), Corpus(stories(3), files=[tmp_path / name]))
    assert (tmp_path / name).read_text() == "A text of one's own."


def test_two_runs_of_one_name_exclude_each_other(tmp_path):
    def nested():
        yield "a document"
        with pytest.raises(UserError, match="in use by another run"):
            prepare(TEXT, options(tmp_path), Corpus(stories(3)))
        yield "another"

    prepare(TEXT, options(tmp_path), Corpus(nested()))


@pytest.mark.parametrize(
    "change", [{"val_fraction": 0}, {"val_fraction": 1.0}, {"limit": 0}, {"workers": 0}, {"seed": -1}]
)
def test_impossible_options(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PrepareOptions(**change)


def test_every_option_is_read():
    source = (ROOT / "data" / "pipeline.py").read_text("utf-8")
    for name in {field.name for field in dataclasses.fields(PrepareOptions)} - {"input"}:
        assert f"options.{name}" in source, name
    scripts = {*(ROOT / "data").glob("prepare-*.py"), ROOT / "prepare_with_extended_tokenizer.py"}
    for script in scripts - {ROOT / "data" / "prepare-all.py"}:  # which runs the others
        assert "options.input" in script.read_text("utf-8"), script.name
