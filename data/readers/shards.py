"""Shards of GPT-2's token ids in llm.c's layout, in which FineWeb is published.

A shard is a header of 256 little-endian int32 (the magic number, the version 1, the number of tokens) and the ids as
uint16. `<|endoftext|>` comes before each document, and a document may continue in the next shard. Joined, shards are
the same sequence as our .bin files, where `<|endoftext|>` comes after each document: only the first and last id differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import UserError
from setup_tokenizer import ENDOFTEXT_ID, GPT2

MAGIC = 20240520
VERSION = 1  # GPT-2's ids as uint16; version 7 holds those of Llama 3 as uint32
HEADER_BYTES = 256 * 4
READ_TOKENS = 1 << 20  # in memory at a time
MAX_TEXT_TOKENS = 1 << 22  # of one document that is decoded


class NotShard(UserError):
    """A file that does not begin like a shard."""


@dataclass(frozen=True)
class Shard:
    """A checked shard. `documents` are those that begin in it, `text_bytes` the UTF-8 bytes of its text."""

    path: Path
    tokens: int
    documents: int
    text_bytes: int
    sha256: str


def shard_tokens(path: Path) -> int:
    """The number of tokens of a shard, by its header and its size. Raises UserError if it is not a whole shard."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); pass a readable file with --input") from error
    header = np.frombuffer(head[: len(head) // 4 * 4], dtype="<i4")
    if not len(header) or header[0] != MAGIC:
        begins = f"begins with {header[0]}" if len(header) else f"has {size} bytes"
        raise NotShard(
            f"{path} {begins}, but a shard of GPT-2's tokens begins with {MAGIC}; pass such shards or text with --input"
        )
    if len(header) < 256:
        raise _incomplete(path, f"is truncated within its header, after {size:,} bytes")
    if header[1] != VERSION:
        raise UserError(
            f"{path} is a shard of version {header[1]}, but GPT-2's tokens have version {VERSION}; the ids of another "
            "vocabulary cannot be used, so prepare the text instead"
        )
    tokens = int(header[2])
    if tokens <= 0:
        raise _incomplete(path, f"has a header that promises {tokens:,} tokens")
    if size != (expected := HEADER_BYTES + 2 * tokens):
        raise _incomplete(path, f"has {size:,} bytes, but its header promises {tokens:,} tokens in {expected:,}")
    return tokens


def _incomplete(path: Path, what: str) -> UserError:
    real = f" {path.resolve()}" if path.is_symlink() else ""  # in the hub's cache, a link to the content
    return UserError(f"{path} {what}; remove it and fetch it again: rm {path}{real}")


def check_shard(path: Path) -> Shard:
    """Check every id of a shard, which is read in pieces. Raises UserError for an id outside GPT-2's vocabulary."""
    tokens = shard_tokens(path)
    digest = hashlib.sha256()
    counts = np.zeros(1 << 16, dtype=np.int64)
    with path.open("rb") as file:
        digest.update(file.read(HEADER_BYTES))
        while block := file.read(2 * READ_TOKENS):
            digest.update(block)
            counts += np.bincount(np.frombuffer(block, dtype="<u2"), minlength=1 << 16)
    largest = int(np.flatnonzero(counts)[-1])
    if largest > ENDOFTEXT_ID:  # our control tokens do not occur in published text
        raise UserError(
            f"{path} contains the id {largest}, but GPT-2's vocabulary ends at {ENDOFTEXT_ID}; use --input with "
            "shards that were encoded with GPT-2's tokenizer"
        )
    sizes = np.array([len(GPT2.token_bytes(token)) for token in range(ENDOFTEXT_ID)])
    text_bytes = int(counts[:ENDOFTEXT_ID] @ sizes)
    return Shard(path, tokens, int(counts[ENDOFTEXT_ID]), text_bytes, digest.hexdigest())


def read_shard_documents(path: Path, read_tokens: int = READ_TOKENS) -> Iterator[str]:
    """The texts of a shard, decoded. A text that continues in the next shard is cut at the end of this one.

    Bytes that are not UTF-8, where a shard cuts a character, become U+FFFD; a document of more than MAX_TEXT_TOKENS is
    divided.
    """
    shard_tokens(path)  # checks the header
    rest = np.zeros(0, dtype="<u2")
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while len(part := np.fromfile(file, dtype="<u2", count=read_tokens)):
            *whole, rest = _divided(np.concatenate([rest, part]))
            yield from map(_text, filter(len, whole))
            if len(rest) >= MAX_TEXT_TOKENS:
                yield _text(rest)
                rest = rest[:0]
    if len(rest):
        yield _text(rest)


def _divided(ids: np.ndarray) -> list[np.ndarray]:
    """The ids between the `<|endoftext|>`."""
    return [part[part != ENDOFTEXT_ID] for part in np.split(ids, np.flatnonzero(ids == ENDOFTEXT_ID))]


def _text(ids: np.ndarray) -> str:
    return GPT2.enc.decode(ids.tolist(), errors="replace")


def document_start(path: Path, position: int) -> int:
    """The position of a shard's first `<|endoftext|>` from `position` on; or the end of the shard."""
    tokens = shard_tokens(path)
    for start in range(position, tokens, READ_TOKENS):
        count = min(READ_TOKENS, tokens - start)
        ids = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_BYTES + 2 * start)
        found = np.flatnonzero(ids == ENDOFTEXT_ID)
        if len(found):
            return start + int(found[0])
    return tokens
