"""The files of a prepared data set: how they are written, and how they are read back.

description = read_description(folder, "story")
for document in read_prepared(folder, description, "val"): ...
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tiktoken

from common.cli import UserError
from common.files import write_error
from setup_tokenizer import ENDOFTEXT, IM_END, IM_START, get_extended_tokenizer

Document = str | list[dict]

TEXT_END = f"\n{ENDOFTEXT}\n"  # ends each document of a .txt
READ_TOKENS = 1 << 20


# --- a document as it stands in the .txt or .jsonl ---

_SEPARATOR_LINE = re.compile(r"^(\\*<\|endoftext\|>)$", re.MULTILINE)
_ESCAPED_SEPARATOR_LINE = re.compile(r"^\\(\\*<\|endoftext\|>)$", re.MULTILINE)


def document_line(document: Document) -> bytes:
    """A document as it stands in the .txt, a conversation as it stands in the .jsonl, the line's end included.

    In a text, a line of its own that spells the separator gets a backslash.
    """
    if not isinstance(document, str):
        messages = [{"role": message["role"], "content": message["content"]} for message in document]
        return json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
    if ENDOFTEXT in document:
        document = _SEPARATOR_LINE.sub(r"\\\1", document)
    return f"{document}{TEXT_END}".encode()


def read_document_line(line: bytes, format: str) -> Document:
    """The document of which `document_line` made `line`. Raises ValueError, KeyError or TypeError for other bytes."""
    if format == "chat":
        return json.loads(line)["messages"]
    text = line.decode().removesuffix(TEXT_END)
    return _ESCAPED_SEPARATOR_LINE.sub(r"\1", text) if ENDOFTEXT in text else text


# --- reading what was prepared ---


def text_path(folder: Path, description: Mapping, split: str) -> Path:
    """The file that keeps a split's documents as text."""
    return Path(folder) / f"{description['name']}-{split}.{'jsonl' if description['format'] == 'chat' else 'txt'}"


def read_description(folder: Path, name: str) -> dict | None:
    """What `<name>.json` in `folder` holds, None where it is missing or unreadable."""
    try:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_prepared(folder: Path, description: Mapping, split: str) -> Iterator[Document]:
    """The documents of a prepared split, exactly as they were encoded, from its .txt or .jsonl."""
    path = text_path(folder, description, split)
    try:
        with path.open("rb") as file:
            for line in file if description["format"] == "chat" else _text_lines(file):
                yield read_document_line(line, description["format"])
    except FileNotFoundError as error:
        raise UserError(f"{path} not found; prepare {description['name']} again from its source") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; prepare {description['name']} again from its source") from error


def _text_lines(file: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while chunk := file.read(1 << 20):
        *whole, rest = (rest + chunk).split(TEXT_END.encode())
        yield from whole
    if rest:
        raise ValueError("the last document has no end")


def read_ids(folder: Path, description: Mapping, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, tokens of each document) of a prepared split, about READ_TOKENS ids of whole documents at once."""
    end_id = control_ids(get_extended_tokenizer(base_encoding(description)))[0]
    rest = np.zeros(0, dtype="<u2")
    for entry in description["splits"][split]["files"]:
        with (folder / entry["file"]).open("rb") as file:
            while len(part := np.fromfile(file, dtype="<u2", count=READ_TOKENS)):
                ids = np.concatenate([rest, part])
                ends = np.flatnonzero(ids == end_id) + 1
                whole = int(ends[-1]) if len(ends) else 0
                ids, rest = ids[:whole], ids[whole:]
                if whole:
                    yield ids, np.diff(ends, prepend=0)


def base_encoding(description: Mapping) -> str:
    """The name of the encoding that a data set's tokenizer extends."""
    return description["tokenizer"].removesuffix("_chatml")


def control_ids(enc: tiktoken.Encoding) -> tuple[int, int, int]:
    """The ids of <|endoftext|>, <|im_start|> and <|im_end|>."""
    return tuple(enc.encode_single_token(token) for token in (ENDOFTEXT, IM_START, IM_END))


# --- writing ---


@dataclasses.dataclass
class Encoded:
    """A batch of documents that came through cleaning; `ids` are those of all documents, one after another."""

    digests: np.ndarray  # (documents, 2) uint64
    ids: np.ndarray  # uint16
    n_tokens: np.ndarray  # (documents,) with <|endoftext|>
    text_bytes: np.ndarray  # (documents,)
    lines: bytes  # the documents as they stand in the .txt or .jsonl
    line_bytes: np.ndarray  # (documents,)
    band_keys: np.ndarray | None  # (documents, BANDS) uint64, for near duplicates
    read_characters: int
    counts: collections.Counter

    def select(self, chosen: np.ndarray) -> Encoded:
        """The batch with the chosen documents only, (documents,) bool."""
        if chosen.all():
            return self
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)  # runs of chosen documents
        return dataclasses.replace(
            self,
            digests=self.digests[chosen],
            ids=np.concatenate([self.ids[:0], *_parts(self.ids, self.n_tokens, edges)]),
            n_tokens=self.n_tokens[chosen],
            text_bytes=self.text_bytes[chosen],
            lines=b"".join(_parts(memoryview(self.lines), self.line_bytes, edges)),
            line_bytes=self.line_bytes[chosen],
            band_keys=None if self.band_keys is None else self.band_keys[chosen],
        )


def _parts(data, lengths: np.ndarray, edges: np.ndarray) -> list:
    """The slices of `data`, elements of which have these lengths, from one edge to the next: (runs, 2) indices."""
    starts = np.concatenate([[0], np.cumsum(lengths)])[edges]
    return [data[start:end] for start, end in starts.tolist()]


class SplitWriter:
    """Writes one split's .bin files beside its text; every file is complete on the disk when the writer is closed."""

    def __init__(self, text_path: Path, shard_tokens: int | None):
        self._folder, self._stem, self._shard_tokens = text_path.parent, text_path.stem, shard_tokens
        self._stack = contextlib.ExitStack()
        self._files: list[dict] = []
        self._bin: BinaryIO | None = None
        self._bin_stack = self._stack.enter_context(contextlib.ExitStack())
        self._sha256 = hashlib.sha256()
        self._documents = self._text_bytes = 0
        self._text = self._stack.enter_context(writing(text_path))
        self._open_shard()

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *exception) -> None:
        self._close_shard()
        self._stack.__exit__(*exception)

    def write(self, batch: Encoded) -> None:
        """Append the documents of a batch."""
        self._documents += len(batch.n_tokens)
        self._text_bytes += int(batch.text_bytes.sum())
        self._write(self._text, batch.lines)
        ids = batch.ids
        while len(ids):
            room = len(ids) if self._shard_tokens is None else self._shard_tokens - self._files[-1]["tokens"]
            if room == 0:
                self._close_shard()
                self._open_shard()
                continue
            part = ids[:room].astype("<u2", copy=False).tobytes()
            self._write(self._bin, part)
            self._sha256.update(part)
            self._files[-1]["tokens"] += len(part) // 2
            ids = ids[room:]

    def description(self) -> dict:
        """The split's entry in the .json."""
        tokens = sum(entry["tokens"] for entry in self._files)
        counts = {"documents": self._documents, "tokens": tokens, "text_bytes": self._text_bytes}
        return {**counts, "files": self._files}

    def _write(self, file: BinaryIO, data: bytes) -> None:
        try:
            file.write(data)
        except OSError as error:
            raise write_error(self._folder.parent / Path(file.name).name, error) from error

    def _open_shard(self) -> None:
        number = "" if self._shard_tokens is None else f"-{len(self._files):05d}"
        name = f"{self._stem}{number}.bin"
        self._bin = self._bin_stack.enter_context(writing(self._folder / name))
        self._files.append({"file": name, "tokens": 0})
        self._sha256 = hashlib.sha256()

    def _close_shard(self) -> None:
        self._files[-1]["sha256"] = self._sha256.hexdigest()
        self._bin_stack.close()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a file in the staging folder; at the end it is flushed to the disk. Raises UserError where it cannot be."""
    try:
        file = path.open("wb")
    except OSError as error:
        raise write_error(path.parent.parent / path.name, error) from error
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError):  # the first fault is the one to report
            file.close()
        raise
    try:
        file.flush()
        os.fsync(file.fileno())
        file.close()
    except OSError as error:
        with contextlib.suppress(OSError):
            file.close()
        raise write_error(path.parent.parent / path.name, error) from error


def write_json(path: Path, description: Mapping) -> None:
    """Write a description into the staging folder."""
    with writing(path) as file:
        file.write(json.dumps(description, ensure_ascii=False, indent=1).encode() + b"\n")
