"""Prepare conversations between people and an assistant, from the hub or from your own files.

    python data/prepare-chat.py

prints:

    chat: HuggingFaceTB/smol-smoltalk
    licence: Apache-2.0
    train: about 460,000 documents, 400 million tokens in chat-train.bin
    val: about 24,000 documents, 20 million tokens in chat-val.bin

Streams smol-smoltalk; try --limit 20000 first. The other sources are smaller: everyday (2,000 short conversations),
oasst1 (answers by people, rated by people; the best-ranked ones are used), dolly (15,000 instructions). Local files may
be JSON, JSONL, parquet, CSV or TSV: `messages`, ShareGPT's `conversations`, `conversation`, lists of messages, prompts
with a completion or response, questions with an answer, instructions with an output or response, OASST's messages and
trees, exports of ChatGPT and Claude, and with --me of Telegram and Discord (docs/data.md has the whole list):

    python data/prepare-chat.py --input my-chat.jsonl

Then run: python train.py --dataset chat
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import option, parse_options, run_script
from data.advice import print_advice
from data.cleaning import CHAT_PASSES
from data.counts import Skipped
from data.layouts.chat import conversations
from data.pipeline import Corpus, Dataset, PrepareOptions, files_of_input, prepare
from data.readers.files import RECORD_SUFFIXES
from data.readers.hub import stream_splits
from data.readers.recognize import FIRST_RECORDS, no_document, warning_of_bad_records
from data.readers.records import read_records
from data.sources import SOURCES, StreamedSource, origin_and_licence
from data.splitting import split_by_opening

CHAT_SOURCES = {
    "smol-smoltalk": StreamedSource(SOURCES["smol-smoltalk"][0], "train", "test", "Apache-2.0"),
    "everyday": StreamedSource(SOURCES["everyday"][0], "train", "test", "Apache-2.0", "everyday-conversations"),
    "oasst1": StreamedSource(SOURCES["oasst1"][0], "train", "validation", "Apache-2.0"),
    "dolly": StreamedSource(SOURCES["dolly"][0], "train", None, "CC BY-SA 3.0"),
}


@dataclasses.dataclass(frozen=True)
class ChatOptions(PrepareOptions):
    source: str | None = option(
        None,
        "data set of the hub (default: smol-smoltalk); with --input: the one that the files come from",
        choices=tuple(CHAT_SOURCES),
        group="data",
    )
    all_paths: bool = option(False, "OASST: use every path of each tree instead of the best-ranked one", group="data")
    language: str = option("en", "OASST: use only the trees in this language, or 'all'", metavar="CODE", group="data")
    me: str | None = option(
        None,
        "in a Telegram or Discord export: the person whose messages become the assistant's",
        metavar="NAME",
        group="data",
    )
    licence: str | None = option(
        None, "licence recorded with the data set (default: the source's)", metavar="TEXT", group="data"
    )


def main() -> None:
    options = parse_options(ChatOptions, __doc__)
    corpus = local_corpus(options) if options.input else hub_corpus(options)
    print_advice(prepare(describe(options, corpus.files), options, corpus, CHAT_PASSES), options.output_dir)


def describe(options: ChatOptions, files: Sequence[Path]) -> Dataset:
    """The description of the data set."""
    source = CHAT_SOURCES.get(options.source or ("" if files else "smol-smoltalk"))
    return Dataset("chat", "chat", *origin_and_licence(source, files, options.licence))


def hub_corpus(options: ChatOptions) -> Corpus:
    """The conversations of a data set of the hub, at its commit."""
    source = CHAT_SOURCES[options.source or "smol-smoltalk"]
    skipped = Skipped()
    train, val = stream_splits(
        source, lambda records: read_conversations(records, options, skipped, source.hub.repository)
    )
    return Corpus(train, val, digest=source.hub.revision, skipped=skipped)


def local_corpus(options: ChatOptions) -> Corpus:
    """The conversations of the files that --input names."""
    files = files_of_input(options, RECORD_SUFFIXES)
    for file in files:
        check_first_records(file, options)
    skipped = Skipped()
    train = local_conversations(files, options, skipped)
    if options.all_paths:
        return Corpus(*split_by_opening(train, options.val_fraction, options.seed), files=files, skipped=skipped)
    return Corpus(train, files=files, skipped=skipped)


def local_conversations(files: list[Path], options: ChatOptions, skipped: Skipped) -> Iterator[list[dict]]:
    """The conversations of local files, one file after another. Raises UserError if none of them can be used."""
    found = 0
    for file in files:
        for messages in read_conversations(read_records(file), options, skipped, file):
            found += 1
            yield messages
    if not found:
        raise no_document(files, "chat", skipped)


def check_first_records(file: Path, options: ChatOptions) -> None:
    """Print a warning if most of a file's first records are unusable."""
    skipped = Skipped()
    records = itertools.islice(read_records(file), FIRST_RECORDS)
    n_kept = sum(1 for _ in read_conversations(records, options, skipped, file))
    if n_kept and (warning := warning_of_bad_records(file, skipped, n_kept)):
        print(warning)


def read_conversations(
    records: Iterable[dict], options: ChatOptions, skipped: Skipped, where: str | Path
) -> Iterator[list[dict]]:
    """The conversations of records that the options select."""
    language = None if options.language == "all" else options.language
    return conversations(records, options.all_paths, skipped, language, where, options.me)


if __name__ == "__main__":
    run_script(main)
