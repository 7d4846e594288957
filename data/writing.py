"""Write a split's .bin and text files into a staging folder, from which they are moved when all are complete."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.files import write_error
from data.dataset import FileInfo, SplitInfo


@dataclasses.dataclass
class Encoded:
    """A batch of cleaned documents; `ids` holds the ids of all documents, one after another."""

    digests: np.ndarray  # (documents, 2) uint64
    ids: np.ndarray  # uint16
    n_tokens: np.ndarray  # (documents,) including <|endoftext|>
    text_bytes: np.ndarray  # (documents,)
    lines: bytes  # the documents as stored in the .txt or .jsonl
    line_bytes: np.ndarray  # (documents,)
    band_keys: np.ndarray | None  # (documents, BANDS) uint64, to find near duplicates
    read_characters: int
    counts: Counter
    # Answers of weight 0: (n, 3) of the document's index, and the first and last + 1 id within the document.
    untrained: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))

    def select(self, chosen: np.ndarray) -> Encoded:
        """The batch with the chosen documents only; `chosen` is (documents,) bool."""
        if chosen.all():
            return self
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)  # runs of chosen documents
        return dataclasses.replace(
            self,
            digests=self.digests[chosen],
            ids=np.concatenate([self.ids[:0], *_runs(self.ids, self.n_tokens, edges)]),
            n_tokens=self.n_tokens[chosen],
            text_bytes=self.text_bytes[chosen],
            lines=b"".join(_runs(memoryview(self.lines), self.line_bytes, edges)),
            line_bytes=self.line_bytes[chosen],
            band_keys=None if self.band_keys is None else self.band_keys[chosen],
            untrained=self._untrained_of(chosen),
        )

    def _untrained_of(self, chosen: np.ndarray) -> np.ndarray:
        """`untrained` of the chosen documents, with their new indices."""
        kept = self.untrained[chosen[self.untrained[:, 0]]]
        return np.column_stack([(np.cumsum(chosen) - 1)[kept[:, 0]], kept[:, 1:]]) if len(kept) else kept


def _runs(data: np.ndarray | memoryview, lengths: np.ndarray, edges: np.ndarray) -> list:
    """The slices of `data`, whose elements have these lengths, between pairs of element indices: (runs, 2)."""
    starts = np.concatenate([[0], np.cumsum(lengths)])[edges]
    return [data[start:end] for start, end in starts.tolist()]


class SplitWriter:
    """Writes one split's .bin files and its text. After closing, every file is complete and on the disk."""

    def __init__(self, text_path: Path, shard_tokens: int | None):
        self._folder, self._stem, self._shard_tokens = text_path.parent, text_path.stem, shard_tokens
        self._stack = contextlib.ExitStack()
        self._files: list[FileInfo] = []  # the finished shards
        self._documents = self._text_bytes = self._tokens = 0
        self._untrained: list[tuple[int, int]] = []
        self._text = self._stack.enter_context(staged_file(text_path))
        self._bin_stack = self._stack.enter_context(contextlib.ExitStack())
        self._open_shard()

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None:
            self._close_shard()
        self._stack.__exit__(*exception)

    def write(self, batch: Encoded) -> None:
        """Append the documents of a batch."""
        self._documents += len(batch.n_tokens)
        self._text_bytes += int(batch.text_bytes.sum())
        starts = self._tokens + np.cumsum(batch.n_tokens) - batch.n_tokens
        for document, start, end in batch.untrained.tolist():
            self._untrained.append((int(starts[document]) + start, int(starts[document]) + end))
        self._tokens += int(batch.n_tokens.sum())
        self._write(self._text, batch.lines)
        ids = batch.ids
        while len(ids):
            space = len(ids) if self._shard_tokens is None else self._shard_tokens - self._n_tokens
            if space == 0:
                self._close_shard()
                self._open_shard()
                continue
            part = ids[:space].astype("<u2", copy=False).tobytes()
            self._write(self._bin, part)
            self._sha256.update(part)
            self._n_tokens += len(part) // 2
            ids = ids[space:]

    def info(self) -> SplitInfo:
        """The split's entry in the .json, once the writer is closed."""
        tokens = sum(file.tokens or 0 for file in self._files)
        return SplitInfo(tokens, tuple(self._files), self._documents, self._text_bytes, tuple(self._untrained))

    def _write(self, file: BinaryIO, data: bytes) -> None:
        try:
            file.write(data)
        except OSError as error:
            raise write_error(self._folder.parent / Path(file.name).name, error) from error

    def _open_shard(self) -> None:
        number = "" if self._shard_tokens is None else f"-{len(self._files):05d}"
        self._bin_name = f"{self._stem}{number}.bin"
        self._bin = self._bin_stack.enter_context(staged_file(self._folder / self._bin_name))
        self._n_tokens, self._sha256 = 0, hashlib.sha256()

    def _close_shard(self) -> None:
        self._bin_stack.close()
        self._files.append(FileInfo(self._bin_name, self._sha256.hexdigest(), self._n_tokens))


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[BinaryIO]:
    """A file in the staging folder, flushed to the disk at the end. Raises UserError if it cannot be written."""
    final_path = path.parent.parent / path.name  # the name for messages
    try:
        file = path.open("wb")
    except OSError as error:
        raise write_error(final_path, error) from error
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            file.close()
        raise
    try:
        file.flush()
        os.fsync(file.fileno())
        file.close()
    except OSError as error:
        with contextlib.suppress(OSError):
            file.close()
        raise write_error(final_path, error) from error
