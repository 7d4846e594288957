"""Split prepared documents again by tokens, if splitting them by number gave validation too few or too many tokens.

The files of both splits are read back from the staging folder and written again, so memory grows by 24 bytes per
document. Documents are assigned to validation in the order of their digests until it has its share. A document that
would exceed twice that share is cut, and its end goes to validation; a document that cannot be cut is skipped.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.dataset import SPLITS, DatasetInfo, SplitInfo
from data.documents import Document, document_lines, is_pair, read_document_line, read_ids, text_path
from data.splitting import cut_conversation, cut_text, fair_range
from data.workers import Worker, text_bytes
from data.writing import Encoded, SplitWriter

MIN_CUT_TOKENS = 100  # a shorter document is not cut, unless it is the only one
MAX_CUTS_TRIED = 50


@dataclass(frozen=True)
class Division:
    """Which documents are validation, by the first word of their digests, and one that is cut: its two parts."""

    val: frozenset[int]
    cut: int | None = None
    parts: tuple[Document, Document] | None = None
    n_val: int = 0  # tokens of validation


def redivide(
    staging: Path, info: DatasetInfo, worker: Worker, val_fraction: float, shard_tokens: int | None
) -> tuple[dict[str, SplitInfo], bool] | None:
    """Write both splits' files in `staging` again, divided by tokens; None if that is not possible or no better.

    `info` describes the files that are there. Returns the new splits, and whether a document was cut.
    """
    division = _divide(staging, info, worker, val_fraction)
    total = sum(info.splits[split].tokens for split in SPLITS)
    before = _distance(info.splits["val"].tokens, total, val_fraction)
    if division is None or _distance(division.n_val, total, val_fraction) >= before:
        return None
    old = staging / "undivided"
    old.mkdir()
    for split in SPLITS:
        for name in (text_path(staging, info, split).name, *(entry.file for entry in info.splits[split].files)):
            (staging / name).rename(old / name)
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(SplitWriter(text_path(staging, info, split), shard_tokens)) for split in SPLITS
        }
        for batch in _batches(old, info, worker):
            _write(batch, division, writers, worker)
    shutil.rmtree(old)
    return {split: writer.info() for split, writer in writers.items()}, division.parts is not None


def _distance(n_val: int, total: int, val_fraction: float) -> float:
    """How far validation is from its share, as a factor of at least 1; infinite if a split is empty."""
    if not 0 < n_val < total:
        return float("inf")
    share = n_val / (total * val_fraction)
    return max(share, 1 / share)


def _batches(folder: Path, info: DatasetInfo, worker: Worker) -> Iterator[Encoded]:
    """The documents of both splits as they were encoded."""
    for split in SPLITS:
        lines = document_lines(folder, info, split)
        untrained = np.array(info.splits[split].untrained, dtype=np.int64).reshape(-1, 2)
        offset = 0
        for ids, n_tokens in read_ids(folder, info, split):
            batch_lines = [next(lines) for _ in n_tokens]
            documents = [read_document_line(line, info.format) for line in batch_lines]
            starts = offset + np.cumsum(n_tokens) - n_tokens
            spans = untrained[(untrained[:, 0] >= offset) & (untrained[:, 0] < offset + len(ids))]
            index = np.searchsorted(starts, spans[:, 0], side="right") - 1
            offset += len(ids)
            yield Encoded(
                digests=worker.digests(batch_lines),
                ids=ids,
                n_tokens=n_tokens,
                text_bytes=np.array([text_bytes(document) for document in documents], dtype=np.int64),
                lines=b"".join(batch_lines),
                line_bytes=np.array([len(line) for line in batch_lines], dtype=np.int64),
                band_keys=None,
                read_characters=0,
                counts=Counter(),
                untrained=np.column_stack([index, spans - starts[index, None]]),
            )


def _divide(folder: Path, info: DatasetInfo, worker: Worker, val_fraction: float) -> Division | None:
    """The division by tokens, None if validation or train would be empty."""
    sizes = [(batch.digests[:, 0], batch.n_tokens) for batch in _batches(folder, info, worker)]
    keys, n_tokens = (np.concatenate(part) for part in zip(*sizes, strict=True))
    total = int(n_tokens.sum())
    lowest, highest = fair_range(total, val_fraction)
    chosen: list[int] = []
    n_val = n_tried = 0
    for index in np.argsort(keys, kind="stable").tolist():
        size, key = int(n_tokens[index]), int(keys[index])
        if n_val >= total * val_fraction:
            break
        if n_val + size <= highest and len(chosen) + 1 < len(keys):
            chosen.append(key)
            n_val += size
        elif n_val < lowest and n_tried < MAX_CUTS_TRIED and (size >= MIN_CUT_TOKENS or len(keys) == 1):
            n_tried += 1
            document = _find(folder, info, worker, key)
            wanted = (total * val_fraction - n_val, lowest - n_val, highest - n_val)
            if parts := _cut(document, size, wanted, worker):
                tail = worker.encode([parts[1]])
                return Division(frozenset(chosen), key, parts, n_val + len(tail.ids))
    return Division(frozenset(chosen), n_val=n_val) if chosen else None


def _find(folder: Path, info: DatasetInfo, worker: Worker, key: int) -> Document:
    """The document whose digest begins with `key`."""
    for split in SPLITS:
        for line in document_lines(folder, info, split):
            if int(worker.digests([line])[0, 0]) == key:
                return read_document_line(line, info.format)
    raise AssertionError("a digest without a document")


def _cut(
    document: Document, size: int, wanted: tuple[float, float, float], worker: Worker
) -> tuple[Document, Document] | None:
    """Cut a document of `size` tokens in two; its end gets about wanted[0] tokens, from wanted[1] to wanted[2]."""
    target, fewest, most = wanted
    if is_pair(document):
        return None
    if not isinstance(document, str):
        sizes = [len(worker.tokenizer.encode_chat([message])) for message in document]
        parts = cut_conversation(document, sizes, int(target))
        return parts if parts and fewest <= len(worker.encode([parts[1]]).ids) <= most else None
    # The characters per token may differ within a text, so the range in characters is corrected after each attempt.
    per_token = len(document) / size
    for _ in range(4):
        lengths = (math.ceil(tokens * per_token) for tokens in (target, 1.05 * fewest, 0.95 * most))
        cut = cut_text(document, *lengths)
        if cut is None:
            return None
        n_tail = len(worker.encode([cut[1]]).ids)
        if fewest <= n_tail <= most:
            return cut
        per_token = len(cut[1]) / n_tail
    return None


def _write(batch: Encoded, division: Division, writers: Mapping[str, SplitWriter], worker: Worker) -> None:
    keys = batch.digests[:, 0]
    in_val = np.isin(keys, np.array(sorted(division.val), dtype=np.uint64))
    is_cut = np.zeros(len(keys), dtype=bool) if division.cut is None else keys == np.uint64(division.cut)
    writers["val"].write(batch.select(in_val))
    writers["train"].write(batch.select(~in_val & ~is_cut))
    if is_cut.any() and division.parts is not None:
        for split, part in zip(SPLITS, division.parts, strict=True):
            writers[split].write(worker.encode([part]))
