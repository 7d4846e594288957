"""The token ids of one split, memory-mapped from its .bin files."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from common.cli import UserError
from setup_tokenizer import GPT2, Tokenizer

PIECE_TOKENS = 1 << 24  # tokens scanned at once, so that memory stays flat
MAX_MAPPED_BYTES = 64 << 20  # of a split's files, so that resident memory stays flat
PAGE_BYTES = 2 << 20  # the system may map a whole huge page to read one byte


class TokenStream:
    """The ids of one split, memory-mapped: one .bin file, or several shards read as one stream."""

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Tokenizer = GPT2,
        piece_tokens: int = PIECE_TOKENS,
        parts: Sequence[tuple[int, int]] | None = None,
    ):
        """`parts` are the first byte and the number of ids of each file, if the ids are not the whole file."""
        self.paths, self.tokenizer = list(paths), tokenizer
        self._piece_tokens = piece_tokens
        spans: Sequence[tuple[int, int | None]] = parts or [(0, None)] * len(paths)
        self._shards = [
            np.memmap(path, dtype="<u2", mode="r", offset=start, shape=None if length is None else (length,))
            for path, (start, length) in zip(paths, spans, strict=True)
        ]
        self._maps = [cast(mmap.mmap, shard.base) for shard in self._shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()
        self._mapped_bytes = 0
        self.untrained = np.zeros((0, 2), dtype=np.int64)  # sorted (start, end) of answers of weight 0

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, end: int) -> np.ndarray:
        """Ids from start to end as int64. Positions outside the stream read as `<|endoftext|>`."""
        ids = np.full(end - start, self.tokenizer.endoftext, dtype=np.int64)
        position = max(start, 0)
        while position < min(end, len(self)):
            index = bisect.bisect_right(self._ends, position)
            first = self._ends[index] - len(self._shards[index])
            piece = self._shards[index][position - first : end - first]
            ids[position - start : position - start + len(piece)] = piece
            position += len(piece)
        self._mapped_bytes += 2 * (end - start) + PAGE_BYTES
        if self._mapped_bytes > MAX_MAPPED_BYTES:
            self._unmap()
        return ids

    def is_trained(self, start: int, end: int) -> np.ndarray:
        """Which of the positions from start to end are outside the answers of weight 0: (end - start,) bool."""
        trained = np.ones(end - start, dtype=bool)
        first = int(np.searchsorted(self.untrained[:, 1], start, side="right"))
        last = int(np.searchsorted(self.untrained[:, 0], end))
        for span_start, span_end in self.untrained[first:last].tolist():
            trained[max(span_start - start, 0) : span_end - start] = False
        return trained

    def positions_of(self, token_id: int) -> np.ndarray:
        """Every position of `token_id`, in order."""
        found = [np.zeros(0, dtype=np.int64)]
        for shard, end in zip(self._shards, self._ends, strict=True):
            for first, piece in self._pieces(shard):
                found.append(np.flatnonzero(piece == token_id) + (end - len(shard) + first))
        return np.concatenate(found)

    def check_ids(self, command: str) -> None:
        """Raise UserError for an id outside the vocabulary; `command` prepares the data again."""
        for path, shard in zip(self.paths, self._shards, strict=True):
            largest = max(int(piece.max()) for _, piece in self._pieces(shard))
            if largest >= self.tokenizer.n_vocab:
                raise UserError(
                    f"{path} contains the id {largest}, but the vocabulary ends at {self.tokenizer.n_vocab - 1}; "
                    f"prepare it again with: {command}"
                )

    def _pieces(self, shard: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """A shard in pieces, each with its first position; only one is mapped at a time."""
        for first in range(0, len(shard), self._piece_tokens):
            yield first, shard[first : first + self._piece_tokens]
            self._unmap()

    def _unmap(self) -> None:
        """Release the files' pages, which count as this process's memory; the system keeps them in its cache."""
        self._mapped_bytes = 0
        if hasattr(mmap, "MADV_DONTNEED"):  # missing on Windows
            for shard_map in self._maps:
                shard_map.madvise(mmap.MADV_DONTNEED)
