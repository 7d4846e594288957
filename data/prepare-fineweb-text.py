"""Prepare FineWeb-Edu from its text: educational web pages, cleaned, deduplicated and encoded here.

    python data/prepare-fineweb-text.py --limit 1000000

prints:

    fineweb-text: HuggingFaceFW/fineweb-edu, sample-10BT
    licence: ODC-By 1.0, and Common Crawl's terms of use
    train: about 950,000 documents, 0.97 billion tokens in fineweb-text-train-00000.bin to ...
    val: about 50,000 documents, 51 million tokens in fineweb-text-val-00000.bin

Streams the parquet files, so that only the prepared files are stored, in shards of 100 million tokens. Without --limit
it prepares all of --config (sample-10BT: 10 billion tokens, about 20 GB of ids and 45 GB of text). prepare-fineweb.py
is much faster, because it downloads ids; use this script for another tokenizer, or to drop near duplicates. For parquet
files that you have:

    python data/prepare-fineweb-text.py --input sample/10BT/

Then run: python train.py --dataset fineweb-text
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import option, parse_options, run_script
from data.advice import print_advice
from data.cleaning import TEXT_PASSES
from data.counts import Skipped
from data.pipeline import Corpus, Dataset, PrepareOptions, files_of_input, prepare
from data.readers.files import RECORD_SUFFIXES
from data.readers.hub import stream_hub
from data.readers.records import read_records, text_fields
from data.sources import SOURCES

(SOURCE,) = SOURCES["fineweb-text"]
LICENCE = "ODC-By 1.0, and Common Crawl's terms of use"
SHARD_TOKENS = 100_000_000  # as many as the published shards have


@dataclasses.dataclass(frozen=True)
class WebTextOptions(PrepareOptions):
    config: str = option(
        "sample-10BT", "part of FineWeb-Edu, such as sample-100BT or CC-MAIN-2024-10", metavar="NAME", group="data"
    )


def main() -> None:
    options = parse_options(WebTextOptions, __doc__)
    options = dataclasses.replace(options, shard_tokens=options.shard_tokens or SHARD_TOKENS)
    skipped = Skipped()
    if options.input:
        files = files_of_input(options, RECORD_SUFFIXES)
        corpus = Corpus(local_documents(files, skipped), files=files, skipped=skipped)
        origin = f"{SOURCE.repository}: {', '.join(file.name for file in files)}"
    else:
        records = stream_hub(SOURCE.repository, options.config, files=f"{options.config}'s parquet files")
        corpus = Corpus(text_fields(records, "text", skipped, SOURCE.repository), skipped=skipped)
        origin = f"{SOURCE.repository}, {options.config}"
    dataset = Dataset("fineweb-text", "text", origin, LICENCE)
    print_advice(prepare(dataset, options, corpus, TEXT_PASSES), options.output_dir)


def local_documents(files: list[Path], skipped: Skipped) -> Iterator[str]:
    """The texts of local files, one file after another."""
    for file in files:
        yield from text_fields(read_records(file), "text", skipped, file)


if __name__ == "__main__":
    run_script(main)
