"""Records, that is JSON objects or parquet rows, of files of every kind, and the text in one of their fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from common.cli import UserError
from data.readers.files import RECORD_SUFFIXES, known_kinds, split_suffix
from data.readers.json import read_json, read_json_lines
from data.readers.parquet import read_parquet

READERS = {".json": read_json, ".jsonl": read_json_lines, ".ndjson": read_json_lines, ".parquet": read_parquet}


def read_records(path: str | Path) -> Iterator[dict]:
    """The records of a .json, .jsonl, .ndjson or .parquet file, each also .gz or .zst.

    A .json file may contain a list of records, an object with such a list in one field, one record, or one record per
    line. Raises UserError for a file that is missing, empty, damaged or not UTF-8, for broken JSON, and for an element
    that is not an object (with the line number).
    """
    kind = split_suffix(path)[0]
    if kind not in READERS:
        raise UserError(f"{path} is of unknown kind; records are read from {known_kinds(RECORD_SUFFIXES)}")
    yield from READERS[kind](path)


def text_fields(
    records: Iterable[Mapping], field: str = "text", skipped: Counter | None = None, where: str | Path = "the input"
) -> Iterator[str]:
    """The text in one field of each record; records without text are counted in `skipped`.

    Raises UserError for a record that lacks the field, or whose field is not text.
    """
    skipped = Counter() if skipped is None else skipped
    for number, record in enumerate(records, 1):
        if field not in record:
            raise UserError(
                f"{where}: record {number} has no field {field!r}; name one of its fields with --field "
                f"({field_names(record)})"
            )
        text = record[field]
        if text is None or text == "":
            skipped["record without text"] += 1
        elif not isinstance(text, str):
            raise UserError(f"{where}: field {field!r} of record {number} is not text; name another with --field")
        else:
            yield text


def field_names(record: Mapping) -> str:
    """A record's fields as a phrase for messages."""
    return ", ".join(map(str, record)) or "it has none"
