"""Prepare your own files with the extended tokenizer, or encode a prepared data set again.

    python prepare_with_extended_tokenizer.py --input notes.txt --name mine
    python prepare_with_extended_tokenizer.py --input notes.txt chats.jsonl.gz --dry_run
    python prepare_with_extended_tokenizer.py --dataset chitchat

`--input` reads text (.txt, .md), web pages, books and subtitles (.html, .epub, .srt), records (.jsonl, .json, .parquet,
.csv, .tsv), each also .gz or .zst, and folders of them. Records are texts (--field) or conversations, recognized by
their fields: messages, conversations, conversation, a list of messages, prompt and completion or response, question and
answer, instruction and output, exports of ChatGPT, Claude, Telegram and Discord (docs/data.md has the whole list).
Shards of GPT-2's tokens in llm.c's layout (.bin) are used without a copy. Other kinds of files are read as text with
--suffix, encodings other than UTF-8 with --encoding. The script prints what each file contains and a sample, and
`--dry_run` stops there. The last line is the command that trains on the data.
`--dataset` encodes again the text that an earlier preparation kept in the data folder, `--dataset all` that of every
data set. Both print how many tokens the base tokenizer needs, which spells `<|im_start|>` with several tokens, and what
the extended one saves.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.cli import UserError, option, parse_options, run_script
from data.advice import print_advice
from data.cleaning import CHAT_PASSES, TEXT_PASSES
from data.counts import Skipped
from data.dataset import PREFERENCE_FORMATS, DatasetInfo, check_name, prepare_command
from data.documents import Document, read_prepared, text_path
from data.earlier import earlier_info
from data.pipeline import Corpus, Dataset, TextOptions, files_of_input, output_folder, prepare
from data.published import divide_shards, prepare_shards
from data.readers.files import ALL_SUFFIXES, SHARD_SUFFIXES
from data.readers.recognize import ReadingOptions, Recognized, first_document, read_documents, recognize_files
from data.report import count_tokens, documents_word
from data.vocabularies import tokenizer_of
from setup_tokenizer import GPT2, render_chat

SAMPLE_CHARACTERS = 300
KINDS = {"text": "text", "chat": "conversations", "tokens": "token ids"}  # of files, in words


@dataclasses.dataclass(frozen=True)
class ExtendedOptions(TextOptions, ReadingOptions):
    """The options of every prepare script, and what to prepare: files or a prepared data set."""

    dataset: str | None = option(
        None,
        "prepared data set to encode again: story, dailydialog, chat, chitchat, one of your own, or all",
        metavar="NAME",
        group="data",
    )
    name: str = option("mine", "name of the data set made from --input", metavar="NAME", group="output")
    licence: str = option(
        "not stated (--licence)",
        "licence of the --input files, kept with the data set",
        metavar="TEXT",
        group="data",
    )
    dry_run: bool = option(False, "print what the files contain and a sample, then stop", group="output")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (self.name, self.dataset):
            if name is not None:
                check_name(name)


def main() -> None:
    options = parse_options(ExtendedOptions, __doc__, needs_options=True)
    if options.input and options.dataset:
        raise UserError("--input and --dataset cannot be combined; to name the data set made from --input, use --name")
    if options.input:
        prepare_own(options)
        return
    if options.dataset is None:
        raise UserError("nothing to prepare; name files with --input PATH, or prepared data with --dataset NAME")
    if options.near_dedup or options.max_document_tokens or options.limit:
        raise UserError(
            "--near_dedup, --max_document_tokens and --limit select documents, which --dataset does not; "
            "give them to the script that prepares the data set from its source"
        )
    encode_all_again(datasets_to_encode(options), options)


# --- your own files ---


def prepare_own(options: ExtendedOptions) -> None:
    """Prepare the files that --input names as data set --name, after printing what they contain."""
    files = files_of_input(options, (*ALL_SUFFIXES, *SHARD_SUFFIXES))
    reading = (options.field, options.divide_within_lines, options.me)
    found = recognize_files(files, options.input, *reading, strict=options.strict)
    files = [recognized.path for recognized in found]
    kinds = {recognized.kind for recognized in found}
    if len(kinds) > 1:
        first = {recognized.kind: recognized.path for recognized in reversed(found)}
        listed = " and ".join(f"some are {KINDS[kind]} ({first[kind]})" for kind in KINDS if kind in first)
        raise UserError(f"{listed}; prepare them separately, each with its own --name")
    show_sample(first_document(found))
    if options.dry_run:
        return
    if kinds == {"tokens"} and not selects_documents(options):
        use_shards(files, options)
        return
    skipped = Skipped()
    kind = "chat" if kinds == {"chat"} else "text"
    dataset = Dataset(options.name, kind, f"local: {', '.join(file.name for file in files)}", options.licence)
    corpus = Corpus(own_documents(found, skipped), files=files, skipped=skipped)
    passes = CHAT_PASSES if kind == "chat" else TEXT_PASSES
    info = prepare(dataset, options, corpus, passes)
    report_saving(output_folder(options), info)
    print_advice(info, options.output_dir)


def selects_documents(options: ExtendedOptions) -> bool:
    """Whether options ask for more than the ids of shards as they are, so that their text is prepared instead."""
    chosen = (options.tokenizer, options.near_dedup, options.max_document_tokens, options.limit, options.shard_tokens)
    return any(chosen) or options.report


def use_shards(files: list[Path], options: ExtendedOptions) -> None:
    """Prepare published shards of GPT-2's tokens without a copy."""
    train, val = divide_shards(files)
    names = ", ".join(file.name for file in files)
    dataset = Dataset(options.name, "text", f"local: {names}", options.licence)
    info = prepare_shards(dataset, output_folder(options), train, val, options.val_fraction)
    print_advice(info, options.output_dir)


def own_documents(found: Sequence[Recognized], skipped: Skipped) -> Iterator[Document]:
    """The documents of the files, one file after another."""
    return itertools.chain.from_iterable(read_documents(recognized, skipped) for recognized in found)


def show_sample(first: Document) -> None:
    """Print the beginning of a document."""
    text = first if isinstance(first, str) else render_chat(first)
    cut = " [...]" if len(text) > SAMPLE_CHARACTERS else ""
    print(f"\n{text[:SAMPLE_CHARACTERS]}{cut}\n")


# --- prepared data sets ---


def datasets_to_encode(options: ExtendedOptions) -> list[str]:
    """The names of the prepared data sets that --dataset selects. Raises UserError if there are none."""
    folder = output_folder(options)
    found = {path.stem: prepared_by_us(folder, path.stem) for path in sorted(folder.glob("*.json"))}
    prepared = [name for name, info in found.items() if info and info.has_text]
    if (named := found.get(options.dataset or "")) and not named.has_text:
        raise UserError(
            f"{named.name} consists of published token ids, not of text; to encode its text with another tokenizer "
            f"run: python prepare_with_extended_tokenizer.py --input SHARDS --name {named.name} --tokenizer NAME"
        )
    wanted = prepared if options.dataset in (None, "all") else [options.dataset]
    if not wanted:
        raise UserError(f"no prepared data set in {folder}; run: python data/prepare-chitchat.py")
    if wanted[0] not in prepared:
        others = f" (prepared: {', '.join(prepared)})" if prepared else ""
        raise UserError(f"{wanted[0]} is not prepared in {folder}{others}; run: {prepare_command(wanted[0])}")
    return wanted


def prepared_by_us(folder: Path, name: str) -> DatasetInfo | None:
    """The description of a data set that a prepare script made; None if `<name>.json` is something else."""
    info = earlier_info(folder, name)
    return info if info and info.source is not None and info.licence is not None else None


def encode_all_again(names: list[str], options: ExtendedOptions) -> None:
    """Encode data sets again; one that fails does not stop the others. Raises UserError that names those that did."""
    failed = []
    for name in names:
        try:
            encode_again(name, options)
        except UserError as error:
            if len(names) == 1:
                raise
            print(f"{name} not encoded again: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        commands = "; ".join(command_again(name, options) for name in failed)
        raise UserError(f"{len(failed)} of {len(names)} data sets were not encoded again; run: {commands}")


def command_again(name: str, options: ExtendedOptions) -> str:
    """The command that prepares a data set again, with the tokenizer of --tokenizer or its own."""
    if options.tokenizer:
        return f"{prepare_command(name)} --tokenizer {shlex.quote(options.tokenizer)}"
    return prepare_command(name, prepared_by_us(output_folder(options), name))


def encode_again(name: str, options: ExtendedOptions) -> None:
    """Encode the text of a prepared data set again; its source, licence, seed and options stay the same.

    So does its tokenizer, unless --tokenizer names another.
    """
    folder = output_folder(options)
    old = prepared_by_us(folder, name)
    assert old is not None  # see datasets_to_encode
    dataset = Dataset(name, old.format, old.source or "", old.licence or "", old.non_commercial)
    train, val = (read_prepared(folder, old, split) for split in ("train", "val"))
    if options.dry_run:
        print(f"{text_path(folder, old, 'train')}: {old.format}, {dataset.source}, {dataset.licence}")
        show_sample(next(train))
        return
    recorded = old.options or {}
    shard_tokens = options.shard_tokens or recorded.get("shard_tokens")
    seed = options.seed if old.seed is None else old.seed
    keep: dict[str, Any] = {"options": {**recorded, "shard_tokens": shard_tokens}, "input_digest": old.input_digest}
    keep |= {"report_files": old.report_files} | ({} if old.report is None else {"report": old.report})
    tokenizer = options.tokenizer or old.tokenizer
    again = dataclasses.replace(options, force=True, shard_tokens=shard_tokens, seed=seed, tokenizer=tokenizer)
    info = prepare(dataset, again, Corpus(train, val), keep=keep)
    report_saving(folder, info)
    if name == options.dataset and info.format not in PREFERENCE_FORMATS:  # "all" prints no advice
        print_advice(info, options.output_dir)


# --- what the extended tokenizer saves ---


def report_saving(folder: Path, info: DatasetInfo) -> None:
    """Print how many tokens GPT-2's base tokenizer and the data set's make of the train documents, and the saving."""
    tokenizer = tokenizer_of(folder, info.name, info.tokenizer, info.tokenizer_digest, prepare_command(info.name))
    if info.format == "text" and tokenizer == GPT2:
        print("tokens: as many as with the base tokenizer, because plain text contains no control tokens")
        return
    n_documents, n_base, n_own = count_tokens(read_prepared(folder, info, "train"), tokenizer)
    part = "all" if n_documents == info.splits["train"].documents else "the first"
    own = "the extended one" if tokenizer == GPT2 else tokenizer.name
    difference = f"{abs(1 - n_own / n_base):.1%} {'fewer' if n_own <= n_base else 'more'}"
    print(
        f"tokens of {part} {n_documents:,} train {documents_word(info)}: {n_base:,} with the base tokenizer, "
        f"{n_own:,} with {own}, {difference}"
    )


if __name__ == "__main__":
    run_script(main)
