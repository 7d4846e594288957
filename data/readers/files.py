"""Which files --input names, their kinds by name, and their bytes, decompressed."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.cli import UserError, first_cause

TEXT_SUFFIXES = (".txt", ".md", ".text", ".markdown")
RECORD_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")
PAGE_SUFFIXES = (".html", ".htm", ".xhtml", ".epub", ".srt")  # read as text by data/readers/pages.py
ALL_SUFFIXES = TEXT_SUFFIXES + RECORD_SUFFIXES + PAGE_SUFFIXES
COMPRESSION_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}

BLOCK_BYTES = 1 << 20


# --- names ---


def input_files(paths: Iterable[str | Path], suffixes: Sequence[str] = ALL_SUFFIXES) -> list[Path]:
    """The files that --input names. A folder means all files of a known kind in it, sorted, except hidden ones.

    Raises UserError for a path that does not exist, a file of unknown kind, and a folder without files of known kind.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if _is_wanted(file, path, suffixes)]
            if not found:
                raise UserError(f"{path} contains no file of a known kind; --input reads {known_kinds(suffixes)}")
            files += found
        elif not path.exists():
            raise not_found(path)
        elif split_suffix(path)[0] not in suffixes:
            raise UserError(f"{path} is of unknown kind; --input reads {known_kinds(suffixes)}")
        else:
            files.append(path)
    return files


def _is_wanted(file: Path, folder: Path, suffixes: Sequence[str]) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not is_hidden and file.is_file() and split_suffix(file)[0] in suffixes


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
    """Whether a file contains text rather than records, by its name; compressed or not."""
    return split_suffix(path)[0] in TEXT_SUFFIXES


# --- bytes and characters ---


def read_blocks(path: str | Path) -> Iterator[bytes]:
    """A file's bytes in blocks, decompressed if its name ends in .gz or .zst.

    Raises UserError if the file is missing, empty, damaged or cannot be read.
    """
    path = Path(path)
    compression = split_suffix(path)[1]
    is_empty = True
    try:
        with _open_bytes(path, compression) as file:
            while block := file.read(BLOCK_BYTES):
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
        raise UserError(f"{path} is empty; give --input a file that contains documents")


def _open_bytes(path: Path, compression: str | None):
    if compression == "gzip":
        return gzip.open(path, "rb")
    if compression == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd")
    return open(path, "rb", buffering=0)  # noqa: PTH123


def decoded_blocks(path: str | Path) -> Iterator[str]:
    """A file's text in blocks, without a byte order mark. Raises UserError with the offset of a byte not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for block in read_blocks(path):
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
    """The sentence for an input that does not exist."""
    return UserError(f"{path} not found; check the path given to --input")


def not_utf8(path: str | Path, offset: int) -> UserError:
    """The sentence for a byte that is not UTF-8."""
    return UserError(f"{path} is not UTF-8 at byte {offset}; convert it, for instance with: iconv -t UTF-8")
