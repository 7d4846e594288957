"""Prepare LLM-written educational text: Cosmopedia's textbooks, lessons, articles and stories, or text of your own.

    python data/prepare-education.py --config stories --limit 100000
    python data/prepare-education.py --input lessons.parquet

Streams one part of Cosmopedia (Apache-2.0) from the hub, so nothing but the prepared files is stored, and writes
data/education-train.bin, education-val.bin, their text as .txt and education.json. Expect about 900 tokens a
document; the whole `stories` part has 5 million documents, so begin with a --limit. Then:
python train.py --dataset education
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules, from any working directory

from common.cli import option, parse_options, run_script
from data.cleaning import TEXT_PASSES
from data.corpus import Dataset, PrepareOptions, prepare
from data.sources import hub_commit, input_files, is_text, read_records, read_text_documents, stream_hub, text_fields

REPOSITORY = "HuggingFaceTB/cosmopedia"
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
class EducationOptions(PrepareOptions):
    config: str | None = option(
        None, "part of Cosmopedia (default: stories); with --input: where the files come from", choices=CONFIGS
    )
    field: str = option("text", "field that holds the text, in JSON, JSONL and parquet")
    licence: str | None = option(None, "licence kept with the data set (default: the source's)")


def main() -> None:
    options = parse_options(EducationOptions, __doc__)
    skipped, commit = Counter(), None
    if options.input:
        files = input_files(options.input)
        documents = local_documents(files, options.field, skipped)
    else:
        files, config = [], options.config or "stories"
        commit = hub_commit(REPOSITORY)
        records = stream_hub(REPOSITORY, config, revision=commit, by_hand=f"data/{config}/train-*.parquet")
        documents = text_fields(records, options.field, skipped, REPOSITORY)
    dataset = describe(options, files)
    prepare(dataset, options, documents, clean=TEXT_PASSES, inputs=files, skipped=skipped, input_digest=commit)


def describe(options: EducationOptions, files: list[Path]) -> Dataset:
    """What the data set is; of local files the names, and the licence as far as it is stated."""
    from_cosmopedia = options.config or not files
    origin = [f"{REPOSITORY}, {options.config or 'stories'}"] if from_cosmopedia else []
    names = [", ".join(file.name for file in files)] if files else []
    licence = options.licence or (LICENCE if from_cosmopedia else "not stated (state it with --licence)")
    return Dataset("education", "text", ": ".join(origin + names), licence)


def local_documents(files: list[Path], field: str, skipped: Counter) -> Iterator[str]:
    """The texts of local files: a field of each record, or the documents of a text file."""
    for file in files:
        if is_text(file):
            yield from read_text_documents(file)
        else:
            yield from text_fields(read_records(file), field, skipped, file)


if __name__ == "__main__":
    run_script(main)
