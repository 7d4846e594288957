"""Recognize what a file contains, by its name and its first record, and read its documents accordingly.

found = recognize("chats.jsonl")
print(found)
for document in read_documents(found): ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from data.documents import Document
from data.layouts.chat import conversations, layout_of
from data.readers.files import is_text, split_suffix
from data.readers.records import field_names, read_records, text_fields
from data.readers.text import read_text_documents, text_layout


@dataclass(frozen=True)
class Recognized:
    """What a file contains: `kind` is "text" or "chat", and `layout` says in words how it is stored.

    `field` is the field with the text, if the file consists of records; `divide_within_lines` is as for
    `read_text_documents`.
    """

    path: Path
    kind: str
    layout: str
    field: str
    divide_within_lines: bool

    def __str__(self) -> str:
        compression = split_suffix(self.path)[1]
        return f"{self.path}: {self.kind} ({self.layout}{f', {compression}' if compression else ''})"


def recognize(path: str | Path, field: str = "text", divide_within_lines: bool = False) -> Recognized:
    """What a file contains. Raises UserError for an unknown kind, and for records that are neither chat nor text."""
    path = Path(path)
    if is_text(path):
        return Recognized(path, "text", text_layout(path, divide_within_lines), field, divide_within_lines)
    first = next(read_records(path), None)
    if first is None:
        raise UserError(f"{path} contains no record; give --input a file that contains documents")
    if layout := layout_of(first):
        return Recognized(path, "chat", layout, field, divide_within_lines)
    if not isinstance(first.get(field), str):
        raise UserError(
            f"{path} contains neither chat nor a text field {field!r}; name the field with the text with --field "
            f"({field_names(first)})"
        )
    return Recognized(path, "text", f"records with the field {field!r}", field, divide_within_lines)


def read_documents(found: Recognized, skipped: Counter | None = None) -> Iterator[Document]:
    """The documents of a recognized file: texts or conversations. What is left out is counted in `skipped`."""
    if found.kind == "chat":
        yield from conversations(read_records(found.path), skipped=skipped, where=found.path)
    elif is_text(found.path):
        yield from read_text_documents(found.path, found.divide_within_lines)
    else:
        yield from text_fields(read_records(found.path), found.field, skipped, where=found.path)
