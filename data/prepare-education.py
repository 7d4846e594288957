"""Prepare LLM-written educational text: Cosmopedia's textbooks, lessons, articles and stories, or your own text.

    python data/prepare-education.py --limit 100000

prints:

    education: HuggingFaceTB/cosmopedia, stories
    licence: Apache-2.0
    train: about 95,000 documents, 86 million tokens in education-train.bin
    val: about 5,000 documents, 4.5 million tokens in education-val.bin

Streams one part of Cosmopedia from the hub, so that only the prepared files are stored. The whole `stories` part has 5
million documents; begin with a --limit. For your own files:

    python data/prepare-education.py --input lessons.parquet --licence "CC BY-SA 3.0"

Then run: python train.py --dataset education
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import option, parse_options, run_script
from data.advice import print_advice
from data.cleaning import TEXT_PASSES
from data.counts import Skipped
from data.pipeline import Corpus, Dataset, TextOptions, files_of_input, prepare
from data.readers.files import PAGE_SUFFIXES, is_text, split_suffix
from data.readers.hub import stream_hub
from data.readers.pages import read_pages
from data.readers.records import read_records, text_fields
from data.readers.text import read_text_documents
from data.sources import SOURCES

(SOURCE,) = SOURCES["cosmopedia"]
LICENCE = "Apache-2.0"
CONFIGS = (
    "stories",
    "wikihow",
    "openstax",
    "khanacademy",
    "auto_math_text",
    "web_samples_v1",
    "web_samples_v2",
    "stanford",
)


@dataclasses.dataclass(frozen=True)
class EducationOptions(TextOptions):
    config: str | None = option(
        None,
        "part of Cosmopedia (default: stories); with --input: the part that the files come from",
        choices=CONFIGS,
        group="data",
    )
    field: str = option("text", "field with the text, in JSON, JSONL and parquet", metavar="NAME", group="data")
    licence: str | None = option(
        None, "licence recorded with the data set (default: the source's)", metavar="TEXT", group="data"
    )


def main() -> None:
    options = parse_options(EducationOptions, __doc__)
    skipped = Skipped()
    if options.input:
        files = files_of_input(options)
        corpus = Corpus(local_documents(files, options.field, skipped), files=files, skipped=skipped)
    else:
        config = options.config or "stories"
        records = stream_hub(
            SOURCE.repository, config, revision=SOURCE.revision, files=f"data/{config}/train-*.parquet"
        )
        documents = text_fields(records, options.field, skipped, SOURCE.repository)
        corpus = Corpus(documents, digest=SOURCE.revision, skipped=skipped)
    print_advice(prepare(describe(options, corpus.files), options, corpus, TEXT_PASSES), options.output_dir)


def describe(options: EducationOptions, files: Sequence[Path]) -> Dataset:
    """The description of the data set. For local files, the source is their names, and the licence may be unknown."""
    is_cosmopedia = bool(options.config or not files)
    origin = [f"{SOURCE.repository}, {options.config or 'stories'}"] if is_cosmopedia else []
    names = [", ".join(file.name for file in files)] if files else []
    licence = options.licence or (LICENCE if is_cosmopedia else "not stated (state it with --licence)")
    return Dataset("education", "text", ": ".join(origin + names), licence)


def local_documents(files: list[Path], field: str, skipped: Skipped) -> Iterator[str]:
    """The texts of local files: a field of each record, or the documents of a text file."""
    for file in files:
        if is_text(file):
            yield from read_text_documents(file)
        elif split_suffix(file)[0] in PAGE_SUFFIXES:
            yield from read_pages(file)
        else:
            yield from text_fields(read_records(file), field, skipped, file)


if __name__ == "__main__":
    run_script(main)
