"""The page about a prepared data set: it says what the files hold, and nothing in a document can break it."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from data import report
from data.documents import read_prepared
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare
from setup_tokenizer import encode_chat, get_base_tokenizer, render_chat

TEXT = Dataset("mine", "text", "a | `source`\n# of *texts*", "MIT")
CHAT = Dataset("mine", "chat", "a test", "MIT", non_commercial=True)


def options(folder: Path, **changes) -> PrepareOptions:
    return PrepareOptions(output_dir=str(folder), workers=1, report=True, **changes)


def stories(count: int) -> list[str]:
    return [
        f"Story {n}. Once upon a time there were {n * n} cats and {n} dogs.\n\nThe end of {n}." for n in range(count)
    ]


def conversations(count: int) -> list[list[dict]]:
    return [
        [{"role": "user", "content": f"I am {n}."}, {"role": "assistant", "content": "Hello " * (n + 1)}]
        for n in range(count)
    ]


def blocks(page: str) -> list[str]:
    """The contents of the page's fenced blocks, by the rule of CommonMark: a fence closes what is no longer than it."""
    found, fence = [], None
    for line in page.split("\n"):
        opening = re.match(r"(`{3,})", line)
        if fence is None and opening:
            fence = opening[1]
            found.append([])
        elif fence and line.startswith(fence) and set(line) == {"`"}:
            fence = None
        elif fence:
            found[-1].append(line)
    assert fence is None, "every block is closed"
    return ["\n".join(lines) for lines in found]


def rows(page: str) -> dict[str, list[str]]:
    """The rows of the page's tables by their first cell; of two with the same, the later."""
    lines = [re.split(r" \| ", line.strip("| ")) for line in page.split("\n") if line.startswith("| ")]
    return {first: rest for first, *rest in lines}


def test_the_page_says_what_the_files_hold(tmp_path):
    documents = conversations(60)
    info = prepare(CHAT, options(tmp_path, max_document_tokens=60), Corpus([*documents, documents[0]]))
    page = (tmp_path / "mine.md").read_text("utf-8")
    kept = list(read_prepared(tmp_path, info, "train"))
    lengths = [len(encode_chat(messages, end_of_conversation=True)) - 1 for messages in kept]
    n_long = sum(len(encode_chat(messages)) > 60 for messages in documents)
    assert n_long and f"| longer than 60 tokens | {n_long} |" in page and "| duplicates | 1 |" in page
    assert "Licence: MIT (non-commercial use only)." in page
    train = info.splits["train"]
    assert f"| train | {len(kept)} | {train.tokens:,} | {train.text_bytes:,} |" in page
    assert rows(page)["train"][0] == str(min(lengths)) and rows(page)["train"][-1] == str(max(lengths))
    n_base = sum(len(get_base_tokenizer().encode_ordinary(render_chat(messages))) + 1 for messages in kept)
    assert f"{n_base:,} tokens with the base tokenizer" in page and f"{1 - train.tokens / n_base:.1%} fewer" in page
    samples = blocks(page)
    assert len(samples) == 10 and len(set(samples)) == 10
    assert set(samples) <= {render_chat(messages).rstrip("\n") for messages in kept}
    assert (tmp_path / "mine-lengths.png").read_bytes().startswith(b"\x89PNG") and "(mine-lengths.png)" in page
    assert json.loads((tmp_path / "mine.json").read_text("utf-8")) == info.to_json()
    shared = info.report["13-grams of validation that also occur in train"]
    assert shared and f"| 13-grams of validation that also occur in train | {shared} |" in page


def test_no_document_breaks_the_page(tmp_path):
    worst = ["```\nfenced\n```", "`" * 9, "# not a heading\n| a | b |", "<script>", "a\x00b\x1b[2Jc", "\u202eturned"]
    worst += ["~~~", "long " * 2000, "line\u2028end", "a\rb"]
    documents = [f"{text}\n{n}" for n, text in enumerate(worst)]
    prepare(TEXT, options(tmp_path), Corpus(documents, ["val"]))
    page = (tmp_path / "mine.md").read_text("utf-8")
    samples = blocks(page)
    assert len(samples) == 10
    assert "```\nfenced\n```\n0" in samples and "`" * 9 + "\n1" in samples
    assert "a\\u0000b\\u001b[2Jc\n4" in samples and "\\u202eturned\n5" in samples
    assert all(character.isprintable() or character == "\n" for character in page)
    assert max(map(len, samples)) < 2000 and any(sample.endswith("[...]") for sample in samples)
    assert page.count("\n# ") == 1, "the heading in a sample, and no other"
    assert "a \\| \\`source\\` \\# of \\*texts\\*" in page


def test_samples_are_whole_documents_of_any_corpus(tmp_path):
    few = prepare(TEXT, options(tmp_path / "few"), Corpus(["one", "two\n<|endoftext|>\nsame document"], ["val"]))
    assert set(report.draw_samples(tmp_path / "few", few)) == {"one", "two\n<|endoftext|>\nsame document"}
    many = prepare(TEXT, options(tmp_path / "many"), Corpus(stories(500), ["val"]))
    assert len(set(report.draw_samples(tmp_path / "many", many))) == 10
    assert set(report.draw_samples(tmp_path / "many", many)) <= set(stories(500))


def test_a_finished_preparation_gets_its_page_without_being_repeated(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("x")
    without = PrepareOptions(output_dir=str(tmp_path / "out"), workers=1)
    prepare(TEXT, without, Corpus(stories(30), files=[source]))
    nothing = Corpus([], files=[source])  # so preparing it again would fail
    info = prepare(TEXT, options(tmp_path / "out"), nothing)
    assert info.report_files == ("mine.md", "mine-lengths.png")
    assert all((tmp_path / "out" / name).is_file() for name in info.report_files)
    assert json.loads((tmp_path / "out" / "mine.json").read_text("utf-8")) == info.to_json()
    before = (tmp_path / "out" / "mine.md").stat().st_mtime_ns
    assert prepare(TEXT, options(tmp_path / "out"), nothing) == info
    assert (tmp_path / "out" / "mine.md").stat().st_mtime_ns == before
    assert prepare(TEXT, without, nothing) == info, "and the page stays without --report"


def test_an_outdated_page_goes_and_a_page_of_ones_own_stays(tmp_path):
    prepare(TEXT, options(tmp_path), Corpus(stories(30)))
    prepare(TEXT, PrepareOptions(output_dir=str(tmp_path), workers=1), Corpus(stories(40)))
    assert not (tmp_path / "mine.md").exists() and not (tmp_path / "mine-lengths.png").exists()
    (tmp_path / "mine.md").write_text("my notes")
    with pytest.raises(UserError, match="--report would replace"):
        prepare(TEXT, options(tmp_path), Corpus(stories(30)))
    prepare(TEXT, PrepareOptions(output_dir=str(tmp_path), workers=1), Corpus(stories(30)))
    assert (tmp_path / "mine.md").read_text() == "my notes"


def test_a_full_disk_while_the_page_is_written_changes_nothing(tmp_path, monkeypatch):
    prepare(TEXT, options(tmp_path), Corpus(stories(30)))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fsync, calls = os.fsync, []

    def full_at_the_page(descriptor):
        calls.append(descriptor)
        if len(calls) == 6:  # both splits' ids and text, the picture, then the page
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_page)
    with pytest.raises(UserError, match=r"mine\.md not written: the disk is full"):
        prepare(TEXT, options(tmp_path), Corpus(stories(40)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("lengths", [[1], [0, 0], [5, 5, 5], [1, 2, 3], [10, 100_000], list(range(1, 500))])
def test_every_range_of_lengths_has_a_picture(lengths):
    picture = report.draw_lengths({"train": np.array(lengths), "val": np.array(lengths[:1])}, "mine")
    assert picture.startswith(b"\x89PNG")
