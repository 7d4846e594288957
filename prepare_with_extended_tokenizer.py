"""Encode text or conversations with the extended tokenizer: your own files, or data sets that are prepared already.

    python prepare_with_extended_tokenizer.py --input notes.txt chats.jsonl.gz --name mine --dry_run
    python prepare_with_extended_tokenizer.py --input notes.txt --name mine
    python prepare_with_extended_tokenizer.py --dataset chitchat

`--input` takes text (.txt, .md), records (.jsonl, .json, .parquet), each also as .gz or .zst, and folders of them; it
says what it recognises and shows a sample, and `--dry_run` stops there. Then: python train.py --dataset mine.
`--dataset` encodes the text that an earlier preparation kept in the data folder again. Both report how many tokens the
base tokenizer needs, in which `<|im_start|>` is several tokens, and what the extended one saves.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.cli import UserError, option, parse_options, run_script
from data.cleaning import CHAT_PASSES, TEXT_PASSES
from data.corpus import Dataset, PrepareOptions, output_folder, prepare
from data.prepared import Document, read_description, read_prepared, text_path
from data.report import count_tokens
from data.sources import Recognised, input_files, read_documents, recognise
from setup_tokenizer import render_chat
from training.batches import prepare_command

SAMPLE_CHARACTERS = 300


@dataclasses.dataclass(frozen=True)
class ExtendedOptions(PrepareOptions):
    dataset: str | None = option(
        None, "prepared data set to encode again: story, dailydialog, chat, chitchat, one of your own, or all"
    )
    name: str = option("mine", "name of the data set made from --input")
    field: str = option("text", "field that holds the text in records that are no conversations")
    divide_within_lines: bool = option(False, "<|endoftext|> divides texts within a line, too, not only as a line")
    licence: str = option("not stated (--licence)", "licence of the --input files, kept with the data set")
    dry_run: bool = option(False, "say what is recognised, show a sample and stop")

    def __post_init__(self):
        super().__post_init__()
        for name in (self.name, self.dataset):
            if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"a data set's name is made of letters, digits, - and _, not {name!r}")


def main() -> None:
    options = parse_options(ExtendedOptions, __doc__)
    if options.input and options.dataset:
        raise UserError("--input and --dataset exclude each other; give your files a name with --name")
    if options.input:
        prepare_own(options)
        return
    if options.near_dedup or options.max_document_tokens or options.limit:
        raise UserError(
            "--near_dedup, --max_document_tokens and --limit choose documents, which --dataset does not; "
            "give them to the script that prepares the data set from its source"
        )
    for name in datasets_to_encode(options):
        encode_again(name, options)


# --- the user's own files ---


def prepare_own(options: ExtendedOptions) -> None:
    """Prepare the files that `--input` names as data set `--name`, after saying what was recognised in them."""
    files = input_files(options.input)
    found = [recognise(file, options.field, options.divide_within_lines) for file in files]
    for recognised in found:
        print(recognised)
    kinds = {recognised.kind for recognised in found}
    if len(kinds) > 1:
        raise UserError("some files are text and some are conversations; prepare them apart, each with its own --name")
    kind = kinds.pop()
    skipped = Counter()
    documents = own_documents(found, options.field, skipped)
    show_sample(documents)
    if options.dry_run:
        return
    documents = own_documents(found, options.field, skipped)
    source = f"local: {', '.join(file.name for file in files)}"
    dataset = Dataset(options.name, kind, source, options.licence)
    train, val = divided_if_alone(documents, options.val_fraction)
    passes = CHAT_PASSES if kind == "chat" else TEXT_PASSES
    skipped.clear()
    description = prepare(dataset, options, train, val, passes, inputs=files, skipped=skipped)
    report_saving(output_folder(options), description)
    print(f"now: python train.py --dataset {options.name}")


def own_documents(found: Sequence[Recognised], field: str, skipped: Counter) -> Iterator[Document]:
    """The documents of the files, one file after another."""
    return itertools.chain.from_iterable(read_documents(recognised, field, skipped) for recognised in found)


def show_sample(documents: Iterator[Document]) -> None:
    """Print the beginning of the first document."""
    first = next(documents, None)
    if first is None:
        raise UserError("no document found in the files; give --input files that hold some")
    text = first if isinstance(first, str) else render_chat(first)
    cut = " [...]" if len(text) > SAMPLE_CHARACTERS else ""
    print(f"\n{text[:SAMPLE_CHARACTERS]}{cut}\n")


def divided_if_alone(
    documents: Iterator[Document], val_fraction: float
) -> tuple[Iterable[Document], Iterable[Document] | None]:
    """(train, val) documents: a single text is cut in two, its end for validation; several are left to `prepare`."""
    first = list(itertools.islice(documents, 2))
    if len(first) != 1 or not isinstance(first[0], str):
        return itertools.chain(first, documents), None
    text = first[0].strip()
    wanted = int(len(text) * (1 - val_fraction))
    breaks = (text.rfind(mark, 0, wanted) for mark in ("\n\n", "\n", " "))
    cut = next((position for position in breaks if position > wanted // 2), wanted)
    return [text[:cut]], [text[cut:]]


# --- data sets that are prepared already ---


def datasets_to_encode(options: ExtendedOptions) -> list[str]:
    """The names that `--dataset` means: those prepared in the data folder. Raises UserError where there is none."""
    folder = output_folder(options)
    prepared = [path.stem for path in sorted(folder.glob("*.json")) if described(folder, path.stem)]
    wanted = prepared if options.dataset in (None, "all") else [options.dataset]
    if not wanted:
        raise UserError(f"no prepared data set in {folder}; run: python data/prepare-chitchat.py")
    if wanted[0] not in prepared:
        there = f" (there: {', '.join(prepared)})" if prepared else ""
        raise UserError(f"{wanted[0]} is not prepared in {folder}{there}; run: {prepare_command(wanted[0])}")
    return wanted


def described(folder: Path, name: str) -> dict | None:
    """The description of a prepared data set, None where `<name>.json` is something else."""
    description = read_description(folder, name)
    keys = {"name", "format", "source", "licence", "splits"}
    return description if isinstance(description, dict) and keys <= description.keys() else None


def encode_again(name: str, options: ExtendedOptions) -> None:
    """Encode the text kept beside a prepared data set again; source, licence, seed and options stay."""
    folder = output_folder(options)
    old = described(folder, name)
    dataset = Dataset(name, old["format"], old["source"], old["licence"], old.get("non_commercial", False))
    train, val = (read_prepared(folder, old, split) for split in ("train", "val"))
    if options.dry_run:
        print(f"{text_path(folder, old, 'train')}: {old['format']}, {dataset.source}, {dataset.licence}")
        show_sample(train)
        return
    recorded = old.get("options", {})
    shard_tokens = options.shard_tokens or recorded.get("shard_tokens")
    keep = {key: old[key] for key in ("seed", "input_digest", "report", "report_files") if key in old}
    keep["options"] = {**recorded, "shard_tokens": shard_tokens}
    again = dataclasses.replace(options, force=True, shard_tokens=shard_tokens, seed=old.get("seed", options.seed))
    report_saving(folder, prepare(dataset, again, train, val, inputs=[], keep=keep))


# --- what the extended tokenizer saves ---


def report_saving(folder: Path, description: dict) -> None:
    """Print the tokens that the base and the extended tokenizer make of the train documents, and the saving."""
    if description["format"] != "chat":
        print("tokens: as many as with the base tokenizer, for plain text holds no control tokens")
        return
    n_documents, n_base, n_extended = count_tokens(read_prepared(folder, description, "train"))
    part = "all" if n_documents == description["splits"]["train"]["documents"] else "the first"
    print(
        f"tokens of {part} {n_documents:,} train conversations: {n_base:,} with the base tokenizer, "
        f"{n_extended:,} with the extended one, {1 - n_extended / n_base:.1%} fewer"
    )


if __name__ == "__main__":
    run_script(main)
