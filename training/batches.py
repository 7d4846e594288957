"""Batches of rows: the training batches, prefetched by a thread, and the fixed validation batches."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from model import IGNORED


class Rows(Protocol):
    """Rows in epochs: TextRows, ChatRows, MixedRows or PairRows. A row is a tuple of ids, targets and perhaps more."""

    def start_epoch(self, epoch: int) -> int: ...

    def row(self, index: int) -> tuple[np.ndarray, ...]: ...


class Batches:
    """Endless batches of rows in epoch order, prefetched by a thread.

    `position` is {"epoch", "row"} of the first row that has not been returned yet. New Batches that start at this
    position continue with the same rows.
    """

    def __init__(self, rows: Rows, n_rows: int, position: dict | None = None):
        self.position = dict(position or {"epoch": 0, "row": 0})
        self._rows, self._n_rows = rows, n_rows
        self._ready: queue.Queue = queue.Queue(maxsize=2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(dict(self.position),), daemon=True)
        self._thread.start()

    def _work(self, position: dict) -> None:
        try:
            for item in self._make(position):
                if not self._put(item):
                    return
        except BaseException as error:  # raised again by next()
            self._put(error)

    def _put(self, item: object) -> bool:
        """Put an item into the queue when there is space; False if the batches are closed first."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.2)
                return True
        return False

    def _make(self, position: dict) -> Iterator[tuple[list[np.ndarray], dict]]:
        epoch, row = position["epoch"], position["row"]
        n_rows = self._rows.start_epoch(epoch)
        while True:
            made: list[tuple[np.ndarray, ...]] = []
            while len(made) < self._n_rows:
                if row >= n_rows:
                    epoch, row = epoch + 1, 0
                    n_rows = self._rows.start_epoch(epoch)
                made.append(self._rows.row(row))
                row += 1
            yield [np.stack(column) for column in zip(*made, strict=True)], {"epoch": epoch, "row": row}

    def next(self) -> list[np.ndarray]:
        """The next rows, stacked by column: ids and targets, (n_rows, block_size) in int64, and any other columns."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        columns, self.position = item
        return columns

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join()


def fixed_batches(rows: Rows, batch_size: int, max_rows: int) -> list[tuple[np.ndarray, ...]]:
    """The first `max_rows` rows of a split's epoch 0 in batches, the same at every call, for validation.

    The last batch is padded with rows without targets, which do not count.
    """
    n_rows = min(rows.start_epoch(0), max_rows)
    batches = []
    for first in range(0, n_rows, batch_size):
        made = [rows.row(index) for index in range(first, min(first + batch_size, n_rows))]
        made += [(made[0][0], np.full_like(made[0][1], IGNORED), *made[0][2:])] * (batch_size - len(made))
        batches.append(tuple(np.stack(column) for column in zip(*made, strict=True)))
    return batches
