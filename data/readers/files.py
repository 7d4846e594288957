"""Files: their kinds by name, and their bytes and characters, decompressed."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.cli import UserError, first_cause
from common.text_files import binary_fault, nul_fault, utf8_fault

TEXT_SUFFIXES = (".txt", ".md", ".text", ".markdown")
RECORD_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")
PAGE_SUFFIXES = (".html", ".htm", ".xhtml", ".epub", ".srt")  # read as text by data/readers/pages.py
ALL_SUFFIXES = TEXT_SUFFIXES + RECORD_SUFFIXES + PAGE_SUFFIXES
ARCHIVE_SUFFIXES = (".zip",)
SHARD_SUFFIXES = (".bin",)  # token ids, read by data/readers/shards.py
COMPRESSION_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}

ZSTD_BYTES = 1 << 13  # of compressed data at a time, which may become 16,000 times as much
BLOCK_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 16  # of a file that is not UTF-8, to find out what it is


# --- names ---


def known_kinds(suffixes: Sequence[str]) -> str:
    """The kinds of files as a phrase for messages."""
    return f"{', '.join(suffixes)}, each also .gz or .zst, and folders of them"


def split_suffix(path: str | Path) -> tuple[str, str | None]:
    """A file's kind and compression, by its name.

    >>> split_suffix("stories.txt.gz")
    ('.txt', 'gzip')
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = COMPRESSION_SUFFIXES.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    return suffixes[-1] if suffixes else "", compression


def is_text(path: str | Path) -> bool:
    """Whether a file contains text rather than records or pages, by its name; compressed or not.

    A file of any other kind was accepted as text by --suffix.
    """
    return split_suffix(path)[0] not in (*RECORD_SUFFIXES, *PAGE_SUFFIXES, *ARCHIVE_SUFFIXES, *SHARD_SUFFIXES)


# --- bytes and characters ---


def read_blocks(path: str | Path) -> Iterator[bytes]:
    """A file's bytes in blocks, decompressed if its name ends in .gz or .zst.

    Raises UserError if the file is missing, empty, damaged or cannot be read.
    """
    path = Path(path)
    compression = split_suffix(path)[1]
    is_empty = True
    try:
        for block in _zstd_blocks(path) if compression == "zstd" else _plain_blocks(path, compression):
            is_empty = False
            yield block
    except FileNotFoundError as error:
        raise not_found(path) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({first_cause(error)}); download or compress it again") from error
    except OSError as error:
        remedy = "download or compress it again" if compression else "check the path given to --input"
        raise UserError(f"{path} cannot be read ({error.strerror or first_cause(error)}); {remedy}") from error
    if is_empty:
        raise UserError(f"{path} is empty; use --input with a file that contains documents")


def _plain_blocks(path: Path, compression: str | None) -> Iterator[bytes]:
    with gzip.open(path, "rb") if compression == "gzip" else path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    """The content of a .zst file of one or more frames, whose windows may be as large as zstd makes them (2 GiB).

    Raises EOFError for a truncated file.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None  # None between two frames
    with path.open("rb", buffering=0) as file:
        while rest := file.read(ZSTD_BYTES):
            while rest:
                frame = frame or decompressor.decompressobj()
                try:
                    block = frame.decompress(rest)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                rest = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
                if block:
                    yield block
    if frame is not None:
        raise EOFError("it is truncated")


def text_blocks(path: str | Path) -> Iterator[bytes]:
    """A text file's bytes in blocks, as `read_blocks`. Raises UserError for a file that is certainly not UTF-8 text.

    It looks for UTF-16's byte order mark, the first bytes of other formats such as PDF, and NUL bytes. Text without any
    of these may still not be UTF-8.
    """
    offset = 0
    for block in read_blocks(path):
        fault = None if offset else binary_fault(path, block)
        if fault is None and b"\0" in block:
            fault = nul_fault(path, block, offset)
        if fault is not None:
            raise UserError(fault)
        yield block
        offset += len(block)


def decoded_blocks(path: str | Path) -> Iterator[str]:
    """A file's text in blocks, without a byte order mark. Raises UserError, with the offset, if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for block in text_blocks(path):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset - pending + error.start) from error
        if text := text if offset else text.removeprefix("\ufeff"):
            yield text
        offset += len(block)
    if decoder.getstate()[0]:
        raise not_utf8(path, offset - len(decoder.getstate()[0]))


def not_found(path: str | Path) -> UserError:
    """The UserError for an input that does not exist."""
    return UserError(f"{path} not found; check the path given to --input")


def not_utf8(path: str | Path, offset: int, content: bytes | None = None) -> UserError:
    """The UserError for a byte that is not UTF-8. `content` holds the bytes of a text that is not a file by itself."""
    start, blocks = 0, read_blocks(path) if content is None else iter([content])
    for block in blocks:
        if offset < start + len(block):
            first = max(0, offset - start - SAMPLE_BYTES // 2)
            return UserError(utf8_fault(path, block[first : first + SAMPLE_BYTES], offset))
        start += len(block)
    raise IndexError(f"{path} has no byte {offset}")
