"""Cleaning and encoding as a step of a data engine that spans many machines, such as datatrove.

from datatrove.executor import LocalPipelineExecutor  # or SlurmPipelineExecutor, RayPipelineExecutor
from datatrove.pipeline.readers import ParquetReader

LocalPipelineExecutor(pipeline=[ParquetReader("fineweb-edu/"), TokenShards("shards/")], tasks=64).run()

Each task writes shards of its own, in the layout of published ones. Together they are one data set: python
prepare_with_extended_tokenizer.py --input shards/ --name web. Exact duplicates are dropped within a task; for those
across tasks, run the engine's own deduplication (datatrove's MinHash) before this step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.files import atomic_write, make_folder
from data.cleaning import TEXT_PASSES
from data.readers.shards import HEADER_BYTES, MAGIC, VERSION
from data.workers import BATCH_CHARACTERS, Pass, Worker
from setup_tokenizer import ENDOFTEXT_ID


class TokenShards:
    """A step from documents with a `text` to shards of GPT-2's tokens in `folder`, which all tasks share.

    A task that runs again replaces its shards. Documents are passed on unchanged.
    """

    def __init__(
        self,
        folder: str,
        tokens_per_shard: int = 100_000_000,
        passes: tuple[Pass, ...] = TEXT_PASSES,
        batch_characters: int = BATCH_CHARACTERS,
    ):
        self.folder, self.tokens_per_shard = folder, tokens_per_shard
        self.passes, self.batch_characters = passes, batch_characters

    def __call__(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write the shards of task `rank`; yields its documents."""
        folder = make_folder(Path(self.folder))
        for earlier in folder.glob(f"train_{rank:05d}_*.bin"):
            earlier.unlink()
        worker = Worker("text", self.passes, seed=0, max_document_tokens=None, near_dedup=False)
        seen: set[bytes] = set()
        with ShardWriter(folder, f"train_{rank:05d}", self.tokens_per_shard) as writer:
            texts: list[str] = []
            n_characters = 0
            for document in data:
                texts.append(document.text)
                n_characters += len(document.text)
                if n_characters >= self.batch_characters:
                    self._write(writer, worker, texts, seen)
                    texts, n_characters = [], 0
                yield document
            self._write(writer, worker, texts, seen)

    @staticmethod
    def _write(writer: ShardWriter, worker: Worker, texts: list[str], seen: set[bytes]) -> None:
        """Write those of the texts that were not seen before in this task."""
        if not texts:
            return
        batch = worker.encode_batch(list(texts), 0)
        digests = [digest.tobytes() for digest in batch.digests]
        new = np.zeros(len(digests), dtype=bool)
        for index, digest in enumerate(digests):
            new[index] = digest not in seen
            seen.add(digest)
        writer.write(batch.select(new).ids)


class ShardWriter:
    """Writes shards `<stem>_00000.bin`, ...; each appears when it is complete, and consists of whole documents."""

    def __init__(self, folder: Path, stem: str, tokens_per_shard: int):
        self.folder, self.stem, self.tokens_per_shard = folder, stem, tokens_per_shard
        self._stack = contextlib.ExitStack()
        self._file: IO[bytes] | None = None
        self._tokens = self._shards = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None:
            self._close()
        else:
            self._stack.__exit__(*exception)

    def write(self, ids: np.ndarray) -> None:
        """Append documents that each end with `<|endoftext|>`; in the shard it comes before each of them."""
        if not len(ids):
            return
        if self._file is None:
            path = self.folder / f"{self.stem}_{self._shards:05d}.bin"
            self._file = file = self._stack.enter_context(atomic_write(path))
            file.write(bytes(HEADER_BYTES))
        self._file.write(np.concatenate([[ENDOFTEXT_ID], ids[:-1]]).astype("<u2").tobytes())
        self._tokens += len(ids)
        if self._tokens >= self.tokens_per_shard:
            self._close()

    def _close(self) -> None:
        """Write the header, now that the number of tokens is known, and complete the shard."""
        if self._file is None:
            return
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:3] = MAGIC, VERSION, self._tokens
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._stack.close()
        self._file, self._tokens, self._shards = None, 0, self._shards + 1
