"""Carries outputs from the thread that computes to the event loop, several at a time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable

from generation.stream import Output

INTERVAL_S = 0.04  # the time of a frame of film, so that text still appears smoothly


@dataclasses.dataclass(frozen=True)
class Delivery:
    """An output, the index of its text within the request, and when it was computed (a time of `clock`)."""

    index: int
    output: Output
    time_s: float


class Deliveries:
    """Puts outputs into the queues of their requests, which belong to an event loop.

    Waking the event loop and sending an event take about 0.3 ms of a core's time, a third of what a small model needs
    for a token. So outputs are held while the loop was woken less than `interval_s` ago, and then go to their queues
    together. The first and the last output of a text are never held.

    Only the thread that computes calls these methods: `put` for each output, and `flush` after each step.
    """

    def __init__(self, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.perf_counter):
        self.interval_s, self.clock = interval_s, clock
        self._held: list[tuple[asyncio.Queue[Delivery], Delivery]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken_s = -float("inf")

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Delivery], index: int, output: Output) -> None:
        """Deliver an output to a queue of the loop, at once or with a later `flush`."""
        self._loop = loop
        self._held.append((queue, Delivery(index, output, self.clock())))
        if output.n_tokens <= 1 or output.finish_reason is not None:
            self._deliver()

    def flush(self) -> None:
        """Deliver what is held, unless the loop was woken less than `interval_s` ago."""
        if self._held and self.clock() - self._woken_s >= self.interval_s:
            self._deliver()

    def _deliver(self) -> None:
        held, self._held, self._woken_s = self._held, [], self.clock()
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(_put_all, held)


def _put_all(held: list[tuple[asyncio.Queue[Delivery], Delivery]]) -> None:
    for queue, delivery in held:
        queue.put_nowait(delivery)
