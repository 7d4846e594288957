"""Prepare preference pairs, a chosen and a rejected answer to the same prompt, from the hub or from your own files.

    python data/prepare-preferences.py

prints:

    preferences: OpenAssistant/oasst1
    licence: Apache-2.0
    train: about 15,000 documents in preferences-train.bin
    val: about 800 documents in preferences-val.bin

Streams oasst1, in which people ranked the answers: the best answer to each question is paired with every worse one. The
other sources are ultrafeedback (answers of many models, scored by GPT-4) and hh (Anthropic's helpful and harmless).
Local files may be JSON, JSONL, parquet, CSV or TSV: `prompt`, `chosen` and `rejected` as text or as messages, HH's
transcripts, UltraFeedback's completions with scores, KTO's `completion` and `label`, OASST's rankings, and the feedback
of the chat page (docs/data.md has the whole list):

    python data/prepare-preferences.py --input feedback.jsonl --name mine

--labels prepares single answers, labelled good or bad, instead of pairs, for --objective kto.

Then run: python train.py --dataset preferences --objective dpo --init_from models/chitchat1500.pt
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import option, parse_options, run_script
from data.cleaning import CHAT_PASSES
from data.counts import Skipped, nothing_usable
from data.dataset import DatasetInfo, check_name
from data.layouts.preferences import (
    KNOWN_LAYOUTS,
    SINGLE_LABEL,
    differing_answers,
    labelled_answers,
    nonempty_answer,
    preferences,
)
from data.pipeline import Corpus, Dataset, PrepareOptions, files_of_input, prepare
from data.readers.files import RECORD_SUFFIXES
from data.readers.hub import stream_splits
from data.readers.records import read_records
from data.sources import SOURCES, StreamedSource, origin_and_licence
from data.splitting import split_by_opening

PREFERENCE_SOURCES = {
    "oasst1": StreamedSource(SOURCES["oasst1"][0], "train", "validation", "Apache-2.0"),
    "ultrafeedback": StreamedSource(SOURCES["ultrafeedback"][0], "train_prefs", "test_prefs", "MIT"),
    "hh": StreamedSource(SOURCES["hh"][0], "train", "test", "MIT"),
}


@dataclasses.dataclass(frozen=True)
class PreferenceOptions(PrepareOptions):
    name: str = option("preferences", "name of the data set", metavar="NAME", group="output")
    source: str | None = option(
        None,
        "data set of the hub (default: oasst1); with --input: the one that the files come from",
        choices=tuple(PREFERENCE_SOURCES),
        group="data",
    )
    labels: bool = option(
        False,
        "prepare single answers, each labelled good or bad, for --objective kto; without it, pairs for --objective dpo",
        group="data",
    )
    language: str = option("en", "OASST: use only the trees in this language, or 'all'", metavar="CODE", group="data")
    licence: str | None = option(
        None, "licence recorded with the data set (default: the source's)", metavar="TEXT", group="data"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name)


def main() -> None:
    options = parse_options(PreferenceOptions, __doc__)
    corpus = local_corpus(options) if options.input else hub_corpus(options)
    last_pass = nonempty_answer if options.labels else differing_answers
    info = prepare(describe(options, corpus.files), options, corpus, (*CHAT_PASSES, last_pass))
    print(f"next: {next_command(info, options.output_dir)}")


def describe(options: PreferenceOptions, files: Sequence[Path]) -> Dataset:
    """The description of the data set."""
    source = PREFERENCE_SOURCES.get(options.source or ("" if files else "oasst1"))
    kind = "label" if options.labels else "preference"
    return Dataset(options.name, kind, *origin_and_licence(source, files, options.licence))


def hub_corpus(options: PreferenceOptions) -> Corpus:
    """The pairs, or labelled answers, of a data set of the hub, at its commit."""
    source = PREFERENCE_SOURCES[options.source or "oasst1"]
    skipped = Skipped()
    train, val = stream_splits(source, lambda records: documents_of(options, records, skipped))
    return Corpus(train, val, digest=source.hub.revision, skipped=skipped)


def local_corpus(options: PreferenceOptions) -> Corpus:
    """The pairs, or labelled answers, of the files that --input names. Raises UserError if there are none.

    Documents with the same first question go to the same split; otherwise validation would contain training answers.
    """
    files = files_of_input(options, RECORD_SUFFIXES)
    skipped = Skipped()
    records = (record for file in files for record in read_records(file))
    documents = list(documents_of(options, records, skipped))
    if not documents:
        where, what = ", ".join(map(str, files)), "labelled answer" if options.labels else "preference pair"
        advice = "add --labels, for --objective kto" if skipped[SINGLE_LABEL] else f"pass {KNOWN_LAYOUTS} with --input"
        raise nothing_usable(what, where, skipped, advice)
    train, val = split_by_opening(documents, options.val_fraction, options.seed)
    return Corpus(train, val, files=files, skipped=skipped)


def documents_of(options: PreferenceOptions, records: Iterable[Mapping], skipped: Skipped) -> Iterator[list[dict]]:
    """The records as pairs or, with --labels, as labelled answers."""
    make = labelled_answers if options.labels else preferences
    return make(records, skipped, None if options.language == "all" else options.language)


def next_command(info: DatasetInfo, data_dir: str | None) -> str:
    """How to train with the data set."""
    folder, objective = f" --data_dir {data_dir}" if data_dir else "", "kto" if info.format == "label" else "dpo"
    return f"python train.py --dataset {info.name} --objective {objective} --init_from CHECKPOINT{folder}"


if __name__ == "__main__":
    run_script(main)
