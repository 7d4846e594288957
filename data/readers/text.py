"""Documents of text files, which lines `<|endoftext|>` separate.

    for document in read_text_documents("stories.txt"): ...

Text is streamed: a few blocks or one document are in memory at a time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.readers.files import not_utf8, text_blocks

ENDOFTEXT = b"<|endoftext|>"
UTF8_BOM = b"\xef\xbb\xbf"

# A text without any <|endoftext|> is cut at blank lines into documents of at most this size.
PLAIN_DOCUMENT_BYTES = 64 << 10
# No document grows beyond this: a longer stretch without <|endoftext|> is cut like a text that has none.
MAX_DOCUMENT_BYTES = 16 << 20

# The lookbehind for the start of the line comes after the token, so that the search is as fast as finding the token.
_SEPARATOR_LINE = re.compile(rb"<\|endoftext\|>(?:(?<=\n.{13})|(?<=\A.{13}))[ \t\r]*(?:\n|\Z)")
_SEPARATOR = re.compile(re.escape(ENDOFTEXT))


def read_text_documents(path: str | Path, divide_within_lines: bool = False) -> Iterator[str]:
    """The documents of a text file, which lines `<|endoftext|>` separate.

    Within a line `<|endoftext|>` is text, because a document may mention it; `divide_within_lines` is for dumps that
    put it anywhere. A file without separators is one document up to 64 KB; a longer one is cut at blank lines (or else
    at a line ending, a space, a character) into documents of at most 64 KB. Line endings around a document are removed.
    Raises UserError for a file that is missing, empty, damaged or not UTF-8 (with the byte offset).
    """
    for offset, raw in raw_documents(text_blocks(path), divide_within_lines):
        try:
            yield raw.decode().strip("\r\n")
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset + error.start) from error


def text_layout(path: str | Path, divide_within_lines: bool) -> str:
    """How a text file is divided into documents, in words, by its first blocks."""
    head = b"".join(itertools.islice(text_blocks(path), 4))
    separator = _SEPARATOR if divide_within_lines else _SEPARATOR_LINE
    if separator.search(head):
        return "documents divided by <|endoftext|>"
    if ENDOFTEXT in head:
        return "plain text; <|endoftext|> within a line is text, unless you give --divide_within_lines"
    return "plain text, long ones cut at blank lines"


def raw_documents(blocks: Iterable[bytes], divide_within_lines: bool = False) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each document in a file's blocks."""
    separator = _SEPARATOR if divide_within_lines else _SEPARATOR_LINE
    rest, offset, is_separated, at_line_start = b"", 0, False, True  # `rest` begins at `offset` in the file
    for block in itertools.chain(blocks, [b""]):
        if not offset and not rest and block.startswith(UTF8_BOM):
            block, offset = block[len(UTF8_BOM) :], len(UTF8_BOM)
        rest += block
        # A line is examined only when it is complete: once its line feed has been read, or at the end of the file.
        end = len(rest) if divide_within_lines or not block else _end_of_last(b"\n", rest, 0, len(rest))
        start = 0
        for match in separator.finditer(rest, 0, end):
            if match.start() or at_line_start or divide_within_lines:
                is_separated = True
                yield offset + start, rest[start : match.start()]
                start, at_line_start = match.end(), True
        rest, offset = rest[start:], offset + start
        if len(rest) > MAX_DOCUMENT_BYTES:
            *documents, rest = _cut_at_blank_lines(rest)
            for document in documents:
                yield offset, document
                offset += len(document)
                at_line_start = document.endswith(b"\n")
    for document in [rest] if is_separated else _cut_at_blank_lines(rest):
        if document.strip():
            yield offset, document
        offset += len(document)


def _cut_at_blank_lines(text: bytes) -> list[bytes]:
    """`text` in pieces of at most PLAIN_DOCUMENT_BYTES that end at a blank line, if possible."""
    pieces, start = [], 0
    while len(text) - start > PLAIN_DOCUMENT_BYTES:
        end = start + PLAIN_DOCUMENT_BYTES
        for boundaries in ((b"\n\n", b"\n\r\n"), (b"\n",), (b" ",)):
            if cut := max(_end_of_last(boundary, text, start, end) for boundary in boundaries):
                end = cut
                break
        else:
            while end > start + 1 and text[end] & 0xC0 == 0x80:  # inside a character of several bytes
                end -= 1
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _end_of_last(boundary: bytes, text: bytes, start: int, end: int) -> int:
    """The end of the last `boundary` in text[start:end], or 0 without one."""
    found = text.rfind(boundary, start, end)
    return 0 if found < 0 else found + len(boundary)
