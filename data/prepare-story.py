"""Prepare TinyStories: short stories in simple English, written by GPT-4 (Eldan & Li, 2023).

    python data/prepare-story.py
    python data/prepare-story.py --input tinystories-sample.txt
    python data/prepare-story.py --input TinyStoriesV2-GPT4-train.txt TinyStoriesV2-GPT4-valid.txt

Downloads the two files of version 2 (2.2 GB) and writes data/story-train.bin and story-val.bin (about 540 and 5.4
million tokens), their text as .txt and story.json. Local files divide their documents by lines `<|endoftext|>`; of
two, the one with "val" in its name is for validation, else the second. Then: python train.py
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules, from any working directory

from common.cli import parse_options, run_script
from data.cleaning import TEXT_PASSES
from data.corpus import Dataset, PrepareOptions, prepare
from data.sources import TEXT_SUFFIXES, fetch_file, input_files, read_text_documents

REPOSITORY = "roneneldan/TinyStories"
FILES = ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")
DATASET = Dataset("story", "text", f"{REPOSITORY} (TinyStories V2)", "CDLA-Sharing-1.0")


def main() -> None:
    options = parse_options(PrepareOptions, __doc__)
    if options.input:
        files = input_files(options.input, TEXT_SUFFIXES)
    else:
        files = [fetch_file(REPOSITORY, name) for name in FILES]
    train, val = divide(files)
    prepare(DATASET, options, documents(train), documents(val) if val else None, clean=TEXT_PASSES, inputs=files)


def divide(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files for training and those for validation, by their names, or by their order where there are two."""
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
