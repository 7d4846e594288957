"""Prepare conversations of people with an assistant, from the hub or from files of your own.

    python data/prepare-chat.py
    python data/prepare-chat.py --source everyday
    python data/prepare-chat.py --input my-chat.jsonl

Streams smol-smoltalk (Apache-2.0; 460,000 conversations, about 400 million tokens; try --limit 20000 first) and
writes data/chat-train.bin, chat-val.bin, their messages as .jsonl and chat.json. The other sources are smaller:
everyday (2,000 short talks), oasst1 (people rating people's answers; its best-ranked answers), dolly (15,000
instructions). Local files may be JSON, JSONL or parquet with `messages`, ShareGPT's `conversations`, Alpaca's or
Dolly's instructions, or OASST's messages and trees. Then: python train.py --dataset chat
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules, from any working directory

from common.cli import UserError, option, parse_options, run_script
from data.cleaning import CHAT_PASSES
from data.corpus import Dataset, PrepareOptions, prepare
from data.sources import RECORD_SUFFIXES, conversations, hub_commit, input_files, read_records, stream_hub


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set of the hub: its repository, the splits to take, the files that hold them, its licence."""

    repository: str
    train: str
    val: str | None
    files: str
    licence: str


SOURCES = {
    "smol-smoltalk": Source(
        "HuggingFaceTB/smol-smoltalk", "train", "test", "data/train-*.parquet and data/test-*.parquet", "Apache-2.0"
    ),
    "everyday": Source(
        "HuggingFaceTB/everyday-conversations-llama3.1-2k",
        "train_sft",
        "test_sft",
        "data/train_sft-*.parquet and data/test_sft-*.parquet",
        "Apache-2.0",
    ),
    "oasst1": Source(
        "OpenAssistant/oasst1",
        "train",
        "validation",
        "data/train-*.parquet and data/validation-*.parquet",
        "Apache-2.0",
    ),
    "dolly": Source("databricks/databricks-dolly-15k", "train", None, "databricks-dolly-15k.jsonl", "CC BY-SA 3.0"),
}


@dataclasses.dataclass(frozen=True)
class ChatOptions(PrepareOptions):
    source: str | None = option(
        None,
        "data set of the hub (default: smol-smoltalk); with --input: where the files come from",
        choices=tuple(SOURCES),
    )
    all_paths: bool = option(False, "OASST: every path of each tree instead of the best-ranked one")
    language: str = option("en", "OASST: keep only the trees in this language; 'all' keeps every one")
    licence: str | None = option(None, "licence kept with the data set (default: the source's)")


def main() -> None:
    options = parse_options(ChatOptions, __doc__)
    skipped, commit = Counter(), None
    if options.input:
        files = input_files(options.input, RECORD_SUFFIXES)
        train, val = local_conversations(files, options, skipped), None
        if options.all_paths:
            train, val = divide_by_opening(train, options.val_fraction, options.seed)
    else:
        files, source = [], SOURCES[options.source or "smol-smoltalk"]
        commit = hub_commit(source.repository)
        train = hub_conversations(source, source.train, commit, options, skipped)
        val = hub_conversations(source, source.val, commit, options, skipped) if source.val else None
    prepare(
        describe(options, files),
        options,
        train,
        val,
        CHAT_PASSES,
        inputs=files,
        skipped=skipped,
        input_digest=commit,
    )


def describe(options: ChatOptions, files: list[Path]) -> Dataset:
    """What the data set is; of local files the names, and the licence as far as it is stated."""
    source = SOURCES.get(options.source or ("" if files else "smol-smoltalk"))
    origin = [source.repository] if source else []
    names = [", ".join(file.name for file in files)] if files else []
    licence = options.licence or (source.licence if source else "not stated (state it with --licence)")
    return Dataset("chat", "chat", ": ".join(origin + names), licence)


def local_conversations(files: list[Path], options: ChatOptions, skipped: Counter) -> Iterator[list[dict]]:
    """The conversations of local files, one file after another. Raises UserError where not one can be used."""
    found = 0
    for file in files:
        for messages in as_conversations(read_records(file), options, skipped, file):
            found += 1
            yield messages
    if not found:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in skipped.items()) or "no record"
        raise UserError(
            f"no usable conversation in {', '.join(map(str, files))} ({reasons}); give --input another file"
        )


def hub_conversations(
    source: Source, split: str, commit: str | None, options: ChatOptions, skipped: Counter
) -> Iterator[list[dict]]:
    """The conversations of one split of a data set of the hub, as they stand at a commit (None: at the last one)."""
    records = stream_hub(source.repository, split=split, revision=commit, by_hand=source.files)
    return as_conversations(records, options, skipped, source.repository)


def as_conversations(
    records: Iterable[dict], options: ChatOptions, skipped: Counter, where: str | Path
) -> Iterator[list[dict]]:
    language = None if options.language == "all" else options.language
    return conversations(records, options.all_paths, skipped, language, where)


def divide_by_opening(
    documents: Iterable[list[dict]], val_fraction: float, seed: int
) -> tuple[list[list[dict]], list[list[dict]] | None]:
    """(train, val) such that conversations with the same first message, the paths of one tree, stay together.

    They share most of their text, so dividing them one by one would show validation text in training. A single
    opening cannot be divided: val is None.
    """
    groups: dict[str, list[list[dict]]] = {}
    for messages in documents:
        groups.setdefault(messages[0]["content"], []).append(messages)
    n_val = min(max(1, round(val_fraction * len(groups))), len(groups) - 1)
    chosen = set(sorted(groups, key=lambda opening: _digest(opening, seed))[:n_val])
    train = [messages for opening, group in groups.items() if opening not in chosen for messages in group]
    val = [messages for opening, group in groups.items() if opening in chosen for messages in group]
    return train, val or None


def _digest(text: str, seed: int) -> bytes:
    return hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=16, key=seed.to_bytes(8, "little")
    ).digest()


if __name__ == "__main__":
    run_script(main)
