"""Prepare DailyDialog: 13,118 everyday conversations between two people (Li et al., 2017), for non-commercial use.

    python data/prepare-dailydialog.py

prints:

    dailydialog: DailyDialog (Li et al., 2017)
    licence: CC BY-NC-SA 4.0 (non-commercial use only)
    train: about 11,000 documents, 1.6 million tokens in dailydialog-train.bin
    val: about 1,000 documents, 0.16 million tokens in dailydialog-val.bin

Downloads two parquet files (4 MB). Local input may be the published archive, the archives inside it, a folder,
dialogues_*.txt or parquet files:

    python data/prepare-dailydialog.py --input train.zip validation.zip

The first speaker is the user, the second the assistant. The corpus puts spaces between words and punctuation, which are
removed. The official splits are used if train and validation are both given; the test split is used only on its own.
Then run: python train.py --dataset dailydialog
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import UserError, parse_options, run_script
from data.advice import print_advice
from data.cleaning import DAILYDIALOG_PASSES
from data.pipeline import Corpus, Dataset, PrepareOptions, files_of_input, prepare
from data.readers.archives import zip_members
from data.readers.files import not_utf8, split_suffix, text_blocks
from data.readers.hub import fetch_data_files
from data.readers.records import read_records
from data.sources import SOURCES

DATASET = Dataset("dailydialog", "chat", "DailyDialog (Li et al., 2017)", "CC BY-NC-SA 4.0", non_commercial=True)
END_OF_TURN = "__eou__"
SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".zip", ".parquet")
KINDS = "a .zip, .txt or .parquet file or a folder of them"


def main() -> None:
    options = parse_options(PrepareOptions, __doc__)
    files = corpus_files(options) if options.input else fetch_data_files(SOURCES["dailydialog"])
    by_split = read_splits(files)
    if "train" in by_split and "validation" in by_split:
        train, val = by_split["train"], by_split["validation"]
    else:
        name = next((name for name in ("train", "whole", "validation", "test") if name in by_split), "train")
        train, val = by_split.get(name, []), None
    print_advice(prepare(DATASET, options, Corpus(train, val, files), DAILYDIALOG_PASSES), options.output_dir)


def corpus_files(options: PrepareOptions) -> list[Path]:
    """The files that --input names. Of a folder, these are the archives, dialogue texts and parquet files in it."""
    files = []
    for path in map(Path, options.input):
        found = files_of_input(dataclasses.replace(options, input=(str(path),)), SUFFIXES)
        if path.is_dir():
            found = [file for file in found if _is_of_corpus(file)]
            if not found:
                raise UserError(f"{path} contains no dialogues_*.txt, .zip or .parquet file; pass {KINDS} with --input")
        files += found
    return files


def _is_of_corpus(file: Path) -> bool:
    kind, compression = split_suffix(file)
    return kind != ".txt" or is_dialogues(file.stem if compression else file.name)


def is_dialogues(name: str) -> bool:
    """Whether a file of the corpus contains dialogues, rather than their acts, emotions or topics."""
    name = name.rpartition("/")[2].lower()
    return bool(re.fullmatch(r"dialogues_(train|validation|test|text)\.txt", name))


def read_splits(files: list[Path]) -> dict[str, list[list[dict]]]:
    """The dialogues of the files by split; those of files whose name contains no split are under "whole"."""
    by_split: dict[str, list[list[dict]]] = {}
    for file in files:
        kind = split_suffix(file)[0]
        if kind == ".zip":
            found = list(zip_members(file, is_dialogues))
            if not found:
                raise UserError(f"{file} contains no dialogues_*.txt; pass {KINDS} with --input")
            parts = [(name, text_dialogues(content, f"{file}/{name}")) for name, content in found]
        elif kind == ".parquet":
            # The hub's own conversion has the split as its folder's name: default/train/0000.parquet.
            name = file.parent.name if file.parent.name in SPLITS else file.name
            parts = [(name, record_dialogues(file))]
        else:
            parts = [(file.name, text_dialogues(b"".join(text_blocks(file)), str(file)))]
        for name, dialogues in parts:
            split = next((split for split in SPLITS if split[:5] in name.rpartition("/")[2].lower()), "whole")
            by_split.setdefault(split, []).extend(dialogues)
    return by_split


def text_dialogues(content: bytes, where: str) -> Iterator[list[dict]]:
    """The dialogues of a text of the corpus: one per line, with `__eou__` after each turn."""
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise not_utf8(where, error.start, content) from error
    if any(line.strip() for line in lines) and not any(END_OF_TURN in line for line in lines):
        raise UserError(
            f"{where} contains no {END_OF_TURN}, so it is not a DailyDialog text; pass {KINDS} with --input"
        )
    for line in lines:
        if line.strip():
            yield as_messages(line.split(END_OF_TURN))


def record_dialogues(file: Path) -> Iterator[list[dict]]:
    """The dialogues of a parquet file: one list of turns per record."""
    for record in read_records(file):
        turns = record.get("dialog", record.get("utterances"))
        if not isinstance(turns, list):
            raise UserError(f"{file} has no field 'dialog'; pass a DailyDialog file with --input")
        yield as_messages(turns)


def as_messages(turns: list[str]) -> list[dict]:
    """The turns as messages, alternating between user and assistant.

    >>> as_messages(["Hi . ", " Hello !", ""])
    [{'role': 'user', 'content': 'Hi .'}, {'role': 'assistant', 'content': 'Hello !'}]
    """
    turns = [turn.strip() for turn in turns if turn.strip()]
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


if __name__ == "__main__":
    run_script(main)
