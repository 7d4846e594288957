"""Records (JSON objects or table rows) of files of every kind, and the text in one of their fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from common.cli import UserError
from data.counts import NO_TEXT, NOT_TEXT
from data.readers.files import RECORD_SUFFIXES, known_kinds, split_suffix
from data.readers.json import read_json, read_json_lines
from data.readers.parquet import read_parquet
from data.readers.tables import read_table

READERS = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
    ".csv": read_table,
    ".tsv": read_table,
}


def read_records(path: str | Path) -> Iterator[dict]:
    """The records of a .json, .jsonl, .ndjson, .parquet, .csv or .tsv file, each also .gz or .zst.

    A .json file may contain a list of records, an object with such a list in one field, one record, or one record per
    line. A list instead of a record is a conversation, a string is a text. Raises UserError for a file that is
    missing, empty, damaged or not UTF-8, and for broken JSON (with the line number).
    """
    kind = split_suffix(path)[0]
    if kind not in READERS:
        raise UserError(f"{path} is of unknown kind; records are read from {known_kinds(RECORD_SUFFIXES)}")
    yield from READERS[kind](path)


def text_fields(
    records: Iterable[Mapping], field: str = "text", skipped: Counter | None = None, where: str | Path = "the input"
) -> Iterator[str]:
    """The text in one field of each record; records without text are counted in `skipped`.

    Raises UserError, after the last record, if none of them has text in the field.
    """
    skipped = Counter() if skipped is None else skipped
    any_text = False
    fault: UserError | None = None
    for number, record in enumerate(records, 1):
        text = record.get(field)
        if isinstance(text, str) and text:
            any_text = True
            yield text
            continue
        skipped[NO_TEXT if text is None or text == "" else NOT_TEXT] += 1
        fault = fault or _field_fault(record, field, number, where)
    if fault and not any_text:
        raise fault


def _field_fault(record: Mapping, field: str, number: int, where: str | Path) -> UserError | None:
    """The UserError for a record without text in the field; None if its text is merely empty."""
    if field not in record:
        return UserError(
            f"{where}: record {number} has no field {field!r}; name one of its fields with --field "
            f"({field_names(record)})"
        )
    if record[field] in (None, ""):
        return None
    return UserError(f"{where}: field {field!r} of record {number} is not text; name another with --field")


def field_names(record: Mapping) -> str:
    """A record's fields as a phrase for messages."""
    return ", ".join(map(str, record)) or "it has none"
