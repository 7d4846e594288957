"""Recognize what a file contains, by its name and its first records, and read its documents accordingly.

found = recognize("chats.jsonl")
print(found)
for document in read_documents(found): ...
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError, option
from data.counts import Skipped, n_dropped, nothing_usable, reasons_in_words
from data.documents import Document
from data.layouts.chat import conversations, known_layouts, layout_of
from data.layouts.messengers import check_me, conversations_with, is_whatsapp, whatsapp_messages
from data.readers.files import PAGE_SUFFIXES, SHARD_SUFFIXES, decoded_blocks, is_text, split_suffix
from data.readers.pages import read_pages
from data.readers.records import field_names, read_records, text_fields
from data.readers.shards import NotShard, read_shard_documents, shard_tokens
from data.readers.text import read_text_documents, text_layout

# Records of these layouts are chat even if they also have the text field.
CERTAIN_LAYOUTS = ("messages", "sharegpt", "oasst trees", "oasst messages", "alpaca", "dolly", "preference data")
FIRST_RECORDS = 1000  # they decide what a file contains and whether most of its records are unusable


@dataclass(frozen=True)
class ReadingOptions:
    """How files are read; options of the scripts that read any files."""

    field: str = option(
        "text", "field with the text, in records that are not conversations", metavar="NAME", group="data"
    )
    divide_within_lines: bool = option(
        False, "let <|endoftext|> separate texts within a line, too, not only on its own line", group="data"
    )
    me: str | None = option(
        None,
        "in a Telegram, Discord or WhatsApp export: the person whose messages become the assistant's",
        metavar="NAME",
        group="data",
    )


class UnknownContent(UserError):
    """A file whose records are neither conversations nor texts; a folder is read without it."""


@dataclass(frozen=True)
class Recognized:
    """What a file contains: `kind` is "text", "chat" or "tokens", and `layout` says in words how it is stored.

    `field` is the field with the text, if the file consists of records; `divide_within_lines` is as for
    `read_text_documents`, and `me` as for `conversations`.
    """

    path: Path
    kind: str
    layout: str
    field: str
    divide_within_lines: bool
    me: str | None = None

    def __str__(self) -> str:
        compression = split_suffix(self.path)[1]
        return f"{self.path}: {self.kind} ({self.layout}{f', {compression}' if compression else ''})"


def recognize(
    path: str | Path, field: str = "text", divide_within_lines: bool = False, me: str | None = None
) -> Recognized:
    """What a file contains. Raises UserError for an unknown kind, and for records that are neither chat nor text."""
    path = Path(path)
    kind, layout = _kind_and_layout(path, field, divide_within_lines, me)
    return Recognized(path, kind, layout, field, divide_within_lines, me)


def recognize_files(
    files: Sequence[Path],
    named: Collection[str] = (),
    field: str = "text",
    divide_within_lines: bool = False,
    me: str | None = None,
    strict: bool = False,
) -> list[Recognized]:
    """Recognize the files that --input leads to, and print what each one contains; `named` is what --input names.

    A file in a folder whose records are of no known kind is left out. Raises UserError for it if it is named, if it is
    the only file, or with `strict`; also if no file remains.
    """
    found = []
    for file in files:
        try:
            found.append(recognize(file, field, divide_within_lines, me))
        except UnknownContent as error:
            if strict or str(file) in named or len(files) == 1:
                raise
            print(f"left out: {str(error).partition(';')[0]}")
        else:
            print(found[-1])
    if not found:
        raise UserError(f"no file in {', '.join(named)} contains text or known conversations; name others with --input")
    return found


def _kind_and_layout(path: Path, field: str, divide_within_lines: bool, me: str | None) -> tuple[str, str]:
    if split_suffix(path)[0] in PAGE_SUFFIXES:
        return "text", {".srt": "subtitles", ".epub": "a book, one document per chapter"}.get(
            split_suffix(path)[0], "a web page"
        )
    if split_suffix(path)[0] in SHARD_SUFFIXES:
        return "tokens", f"a shard of {_tokens_of(path):,} GPT-2 tokens"
    if is_text(path):
        if not _is_whatsapp(path):
            return "text", text_layout(path, divide_within_lines)
        if me is not None:
            return "chat", "whatsapp export"
        return "text", "plain text; it looks like a WhatsApp export, which --me NAME turns into conversations"
    first = None
    for record in itertools.islice(read_records(path), FIRST_RECORDS):
        first = first or record
        layout = layout_of(record)
        has_text = isinstance(record.get(field), str)
        if layout and not (has_text and layout not in CERTAIN_LAYOUTS):
            return "chat", layout
        if has_text:
            return "text", f"records with the field {field!r}"
    if first is None:
        raise UnknownContent(f"{path} contains no record; use --input with a file that contains documents")
    raise UnknownContent(
        f"{path} contains neither chat nor a text field {field!r}; name the field with the text with --field "
        f"({field_names(first)}), or give conversations ({known_layouts()})"
    )


def _tokens_of(path: Path) -> int:
    try:
        return shard_tokens(path)
    except NotShard as error:
        raise UnknownContent(str(error)) from error


def _is_whatsapp(path: Path) -> bool:
    try:
        return is_whatsapp(next(decoded_blocks(path), "")[:10_000])
    except UserError:
        return False  # reading the text says what is wrong with it


def read_documents(
    found: Recognized, skipped: Counter | None = None, n_records: int | None = None
) -> Iterator[Document]:
    """The documents of a recognized file: texts or conversations. What is left out is counted in `skipped`.

    The texts of a shard are decoded. `n_records` limits how many records are read.
    """
    skipped = Counter() if skipped is None else skipped
    if split_suffix(found.path)[0] in PAGE_SUFFIXES:
        yield from read_pages(found.path)
    elif found.kind == "tokens":
        yield from read_shard_documents(found.path)
    elif is_text(found.path) and found.kind == "chat":
        said = list(whatsapp_messages("".join(decoded_blocks(found.path)).splitlines()))
        check_me(found.me, said, found.path)
        yield from conversations_with(said, found.me or "", skipped)
    elif is_text(found.path):
        yield from read_text_documents(found.path, found.divide_within_lines)
    else:
        records = itertools.islice(read_records(found.path), n_records)
        if found.kind == "chat":
            yield from conversations(records, skipped=skipped, where=found.path, me=found.me)
        else:
            yield from text_fields(records, found.field, skipped, where=found.path)


def first_document(files: Sequence[Recognized]) -> Document:
    """The first document of the files, after a warning about each file whose first records are mostly unusable.

    Raises UserError, with the counts by reason, if no file contains one.
    """
    checked = [_check_file(found) for found in files]
    first = next((document for document, _ in checked if document is not None), None)
    if first is not None:
        print("".join(f"{warning}\n" for _, warning in checked if warning), end="")
        return first
    skipped = Skipped()
    for found in files:
        for document in read_documents(found, skipped):
            return document
    raise no_document([found.path for found in files], files[0].kind, skipped)


def _check_file(found: Recognized) -> tuple[Document | None, str]:
    """The first document among a file's first records, or None, and a warning if most of these are unusable."""
    skipped = Skipped()
    if is_text(found.path) or split_suffix(found.path)[0] in (*PAGE_SUFFIXES, *SHARD_SUFFIXES):
        return next(read_documents(found, skipped), None), ""
    documents = read_documents(found, skipped, FIRST_RECORDS)
    first, n_kept = None, 0
    try:
        for document in documents:
            first = document if first is None else first
            n_kept += 1
    except UserError:
        if n_kept or not n_dropped(skipped):
            raise
    return first, warning_of_bad_records(found.path, skipped, n_kept)


def warning_of_bad_records(where: Path, skipped: Skipped, n_kept: int) -> str:
    """A warning if most of the first records of a file are unusable, otherwise ""."""
    n_bad = n_dropped(skipped)
    if n_bad <= n_kept:
        return ""
    return (
        f"warning: {n_bad:,} of the first {n_bad + n_kept:,} records of {where} cannot be used "
        f"({reasons_in_words(skipped)})"
    )


def no_document(files: Sequence[Path], kind: str, skipped: Skipped) -> UserError:
    """The UserError for files without a usable document."""
    where = ", ".join(map(str, files))
    if kind != "chat":
        return nothing_usable("document", where, skipped, "use --input with files that contain some")
    known = f"pass another file with --input; known layouts: {known_layouts()}"
    return nothing_usable("conversation", where, skipped, known if skipped.fields else "pass another file with --input")
