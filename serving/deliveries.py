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
    """Puts outputs into the queues of their requests, which belong to `loop`.

    Waking the event loop and sending an event take about 0.3 ms of a core's time, a third of what a small model needs
    for a token. An output is therefore held back if the loop was woken less than `interval_s` ago, and is put into its
    queue together with the next output that is not, of whatever text. The first and the last output of a text are never
    held back. No timer wakes the loop: while texts are generated, the next output follows soon.

    One thread, the one that computes, calls `put`.
    """

    def __init__(self, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.perf_counter):
        self.interval_s, self.clock = interval_s, clock
        self._held: list[tuple[asyncio.Queue[Delivery], Delivery]] = []
        self._woken_s = -float("inf")

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Delivery], index: int, output: Output) -> None:
        """Put an output into its queue, now or with one of the next outputs."""
        now = self.clock()
        self._held.append((queue, Delivery(index, output, now)))
        is_first_or_last = output.n_tokens <= 1 or output.finish_reason is not None
        if is_first_or_last or now - self._woken_s >= self.interval_s:
            held, self._held, self._woken_s = self._held, [], now
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(_put_all, held)


def _put_all(held: list[tuple[asyncio.Queue[Delivery], Delivery]]) -> None:
    for queue, delivery in held:
        queue.put_nowait(delivery)
