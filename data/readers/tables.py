"""Records of CSV and TSV files: the first row names the fields."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError
from data.readers.files import decoded_blocks, split_suffix

MAX_FIELD_CHARACTERS = 64 << 20


def read_table(path: str | Path) -> Iterator[dict]:
    """The rows of a .csv (separated by commas or semicolons) or .tsv file, an empty cell as null.

    Raises UserError for a file that is not a table.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    lines = _lines(path)
    header = next(lines, "")
    separator = "\t" if split_suffix(path)[0] == ".tsv" else ";" if header.count(";") > header.count(",") else ","
    names = next(csv.reader([header], delimiter=separator), [])
    rows = csv.reader(lines, delimiter=separator)
    try:
        for row in rows:
            if row:
                yield {name: cell or None for name, cell in zip(names, row, strict=False)}
    except csv.Error as error:
        raise UserError(
            f"{path} line {rows.line_num + 1}: not a row of a table ({error}); save the file again as CSV"
        ) from error


def _lines(path: str | Path) -> Iterator[str]:
    rest = ""
    for text in decoded_blocks(path):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield f"{line}\n"
    if rest:
        yield rest
