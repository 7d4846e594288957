"""Prepare TinyStories: short stories in simple English, written by GPT-4 (Eldan & Li, 2023).

    python data/prepare-story.py

prints:

    story: roneneldan/TinyStories (TinyStories V2)
    licence: CDLA-Sharing-1.0
    train: about 2.7 million documents, 540 million tokens in story-train.bin
    val: about 27,000 documents, 5.4 million tokens in story-val.bin

Downloads the two files of version 2 (2.2 GB). Give local files with --input; in them, lines `<|endoftext|>` separate
the stories. If you pass two files, the one with "val" in its name is for validation, or else the second one:

    python data/prepare-story.py --input TinyStoriesV2-GPT4-train.txt TinyStoriesV2-GPT4-valid.txt

Then run: python train.py
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import parse_options, run_script
from data.advice import print_advice
from data.cleaning import TEXT_PASSES
from data.pipeline import Corpus, Dataset, TextOptions, files_of_input, prepare
from data.readers.files import TEXT_SUFFIXES
from data.readers.hub import fetch_data_files
from data.readers.text import read_text_documents
from data.sources import SOURCES

DATASET = Dataset("story", "text", "roneneldan/TinyStories (TinyStories V2)", "CDLA-Sharing-1.0")


def main() -> None:
    options = parse_options(TextOptions, __doc__)
    if options.input:
        files = files_of_input(options, TEXT_SUFFIXES)
    else:
        files = fetch_data_files(SOURCES["story"])
    train, val = divide(files)
    corpus = Corpus(documents(train), documents(val) if val else None, files)
    print_advice(prepare(DATASET, options, corpus, TEXT_PASSES), options.output_dir)


def divide(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files for training and those for validation, by their names; two files without such names by their order."""
    val = [file for file in files if re.search(r"(?<![a-z])val(id|idation)?(?![a-z])", file.name.lower())]
    train = [file for file in files if file not in val]
    if len(files) == 2 and not (train and val):
        return files[:1], files[1:]
    return (train, val) if train else (val, [])


def documents(files: list[Path]) -> Iterator[str]:
    """The stories of the files, one file after another."""
    return itertools.chain.from_iterable(map(read_text_documents, files))


if __name__ == "__main__":
    run_script(main)
