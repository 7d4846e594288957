"""Records of JSON files: JSON Lines, a list of records, one record, or an object with a list of records in a field.

Everything is streamed, except that a .json file with a single object is loaded entirely into memory.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.cli import UserError
from data.layouts.chat import layout_of
from data.layouts.turn_lists import is_turn
from data.readers.files import decoded_blocks

# A longer JSON record is assumed to be broken (or an attack), not data.
MAX_RECORD_CHARACTERS = 256 << 20


def read_json_lines(path: str | Path) -> Iterator[dict]:
    """The records of a .jsonl file, one per line; blank lines are skipped. Raises UserError with the line number.

    A file that is not JSON Lines, but one list or objects of several lines, is read like a .json file.
    """
    lines = (line for line in _lines(path) if line.strip())
    if _spans_lines(next(lines, ""), next(lines, "")):
        yield from read_json(path)
        return
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _as_record(_parse_json(line, path, number))


def read_json(path: str | Path) -> Iterator[dict]:
    """The records of a .json file. Raises UserError with the line number.

    A list is read element by element, anything else line by line or as a whole.
    """
    if JsonReader(decoded_blocks(path), path).peek() == "[":
        yield from _records_of_list(value for _, value in JsonReader(decoded_blocks(path), path).list_elements())
        return
    lines = (line for line in _lines(path) if line.strip())
    first, second = next(lines, ""), next(lines, "")
    if second and _is_json_object(first):
        yield from read_json_lines(path)
    elif first:
        values = JsonReader(decoded_blocks(path), path).values()
        value, more = next(values), next(values, None)
        if more is None:
            yield from _records_within(_as_record(value))
        else:
            yield from map(_as_record, itertools.chain([value, more], values))


def _spans_lines(first: str, second: str) -> bool:
    """Whether a JSON text is one list or has values that span lines, judged by its first two non-blank lines.

    That is the case if neither line is JSON. If only one of them is broken, it is a faulty line of JSON Lines.
    """
    if first.strip() in ("[", "{"):
        return True
    if not second:
        return first.lstrip().startswith("[")
    return not _is_json(first) and not _is_json(second)


def _lines(path: str | Path) -> Iterator[str]:
    """A file's lines; only a line feed ends a line, as in the JSON Lines format."""
    parts: list[str] = []
    for text in decoded_blocks(path):
        *lines, rest = text.split("\n")
        if lines:
            yield "".join([*parts, lines[0]])
            yield from lines[1:]
            parts = []
        parts.append(rest)
    yield "".join(parts)


def _parse_json(text: str, path: str | Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken_json(path, first_line + getattr(error, "lineno", 1) - 1, error) from error


def _broken_json(path: str | Path, line: int, error: ValueError | RecursionError) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        what = f"{error.msg.removesuffix(' at')}, column {error.colno}"
    elif isinstance(error, RecursionError):
        what = "nested too deeply"
    else:
        what = str(error)
    return UserError(f"{path} line {line}: broken JSON ({what}); fix or remove that line")


def _as_record(value: object) -> dict:
    """A JSON value as a record: a list is a conversation, and a string is a text.

    Null, a number or a boolean becomes a record without fields, which callers count as unusable.
    """
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return {"messages": value}
    return {"text": value} if isinstance(value, str) else {}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _records_of_list(values: Iterator[object]) -> Iterator[dict]:
    """The records in a list; a list of turns is one conversation."""
    first = list(itertools.islice(values, 1))
    if first and is_turn(first[0]):
        yield {"messages": [*first, *values]}
    else:
        yield from map(_as_record, itertools.chain(first, values))


def _records_within(value: dict) -> Iterator[dict]:
    """The records in the only field with a list of objects, or `value` itself if it is a record."""
    lists = [field for field, content in value.items() if _is_list_of_objects(content)]
    if layout_of(value) or len(lists) != 1:
        yield value
        return
    yield from _records_of_list(iter(value[lists[0]]))


def _is_list_of_objects(content: object) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


class JsonReader:
    """Reads JSON text value by value; `line` is the number of the current line."""

    _SPACE = re.compile(r"[ \t\r\n]*")
    _DECODER = json.JSONDecoder()

    def __init__(self, blocks: Iterator[str], path: str | Path):
        self.line = 1
        self._blocks, self._path = blocks, path
        self._text, self._position = "", 0

    def list_elements(self) -> Iterator[tuple[int, object]]:
        """(line number, value) of each element of the list that is the whole text."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
        else:
            closing = ","
            while closing == ",":
                self.peek()
                yield self.line, self.value()
                closing = self.take(",]")
        if self.peek():
            raise _broken_json(self._path, self.line, ValueError("there is more text after the list"))

    def values(self) -> Iterator[object]:
        """The values that follow one another in the text."""
        while self.peek():
            yield self.value()

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            space = self._SPACE.match(self._text, self._position)
            self._advance(space.end() if space else self._position)
            if self._position < len(self._text):
                return self._text[self._position]
            self._text, self._position = next(self._blocks, ""), 0
            if not self._text:
                return ""

    def take(self, expected: str) -> str:
        """The next character that is not white space, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            raise _broken_json(self._path, self.line, ValueError(f"expected {' or '.join(expected)}"))
        self._advance(self._position + 1)
        return found

    def value(self) -> Any:
        """The value that begins at the next character."""
        while True:
            try:
                value, end = self._DECODER.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                # Either the text is broken, or the rest of the value has not been read yet.
                if not self._read_more():
                    line = self.line - self._text.count("\n", 0, self._position) + getattr(error, "lineno", 1) - 1
                    raise _broken_json(self._path, max(line, self.line), error) from error
            else:
                self._advance(end)
                return value

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _read_more(self) -> bool:
        """Double the unread text, so that a long value takes linear time; False if there is no more."""
        parts = [self._text[self._position :]]
        wanted = 2 * len(parts[0])
        if wanted > 2 * MAX_RECORD_CHARACTERS:
            return False
        while sum(map(len, parts)) <= wanted and (block := next(self._blocks, "")):
            parts.append(block)
        if len(parts) == 1:
            return False
        self._text, self._position = "".join(parts), 0
        return True
