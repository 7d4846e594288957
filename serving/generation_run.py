"""The texts of one HTTP request: queued, received as they are generated, and cancelled when the client leaves."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from generation.batching import QueueFull
from generation.stream import Output, Request, Stream, first_of_each_prompt
from serving.deliveries import Delivery
from serving.errors import ApiError, too_busy
from serving.metrics import Metrics
from serving.models import ModelCard, ModelPool, PooledModel

T = TypeVar("T")


class ClientLeft(Exception):
    """The client has closed the connection before its answer was complete."""


class GenerationRun:
    """Generates the texts of one request. Always call `close`, which frees the rows.

    Raises ApiError 429 at once if too many texts are waiting.
    """

    def __init__(self, pool: ModelPool, metrics: Metrics, card: ModelCard, requests: Sequence[Request]):
        self.pool, self.metrics, self.card, self.requests = pool, metrics, card, requests
        self.firsts = first_of_each_prompt(requests)
        self.started = time.perf_counter()
        self.queue: asyncio.Queue[Delivery] = asyncio.Queue()
        self.streams: list[Stream] = []
        self.digest: str | None = None  # of the weights that generate
        self.on_close: Callable[[], None] = lambda: None
        self.acquiring: asyncio.Task[PooledModel] | None = None  # while the model is not in memory
        self.model = pool.acquire_loaded(card)
        try:
            if self.model:
                self._submit(self.model)
            else:
                pool.check_waiting()
        except QueueFull:
            self.close()
            raise too_busy(5) from None

    def _submit(self, model: PooledModel) -> None:
        deliver = functools.partial(self.pool.deliveries.put, asyncio.get_running_loop(), self.queue)
        device = model.engine.device
        streams = [
            Stream(request, functools.partial(deliver, index), device) for index, request in enumerate(self.requests)
        ]
        self.pool.worker.submit(model.engine, streams)
        self.streams = streams
        self.digest = model.digest
        self.metrics.prompt_tokens.inc(sum(len(self.requests[index].prompt) for index in self.firsts))

    async def outputs(self, comment_s: float) -> AsyncGenerator[list[tuple[int, Output]], None]:
        """Lists of (index of the text, output) as outputs arrive; an empty list after `comment_s` seconds without any.

        Raises ApiError if the model cannot be loaded or fails.
        """
        if self.model is None:
            self.acquiring = asyncio.create_task(self.pool.acquire(self.card))
            while not (await asyncio.wait({self.acquiring}, timeout=comment_s))[0]:
                yield []
            try:
                self.model = self.acquiring.result()
                self._submit(self.model)
            except QueueFull:
                raise too_busy(5) from None
            except asyncio.CancelledError as cancelled:  # by `abort`
                raise ApiError(503, str(cancelled)) from None
        last: dict[int, tuple[float, int]] = {}
        remaining = len(self.requests)
        while remaining:
            try:
                async with asyncio.timeout(comment_s):
                    found = [await self.queue.get()]
            except TimeoutError:
                yield []
                continue
            while not self.queue.empty():
                found.append(self.queue.get_nowait())
            arrived: list[tuple[int, Output]] = []
            for delivery in found:
                index, output = delivery.index, delivery.output
                if output.finish_reason == "error":
                    if arrived:
                        yield arrived
                    raise ApiError(503, output.error)
                self._measure(last, delivery)
                remaining -= output.finish_reason is not None
                arrived.append((index, output))
            yield arrived

    def _measure(self, last: dict[int, tuple[float, int]], delivery: Delivery) -> None:
        """Count an output; `last` has the time and the number of tokens of each text's previous output."""
        index, output, now = delivery.index, delivery.output, delivery.time_s
        before, n_before = last.get(index, (self.started, 0))
        if index in last:
            self.metrics.per_token_s.observe(now - before)
        else:
            self.metrics.first_token_s.observe(now - before)
            if index in self.firsts:
                self.metrics.cached_tokens.inc(output.cached_tokens)
        self.metrics.generated_tokens.inc(output.n_tokens - n_before)
        last[index] = now, output.n_tokens

    def abort(self, message: str) -> None:
        """End the request with an error, as at a shutdown."""
        if self.acquiring is not None:
            self.acquiring.cancel(message)
        error = Output(finish_reason="error", error=message)
        self.queue.put_nowait(Delivery(0, error, time.perf_counter()))

    def close(self) -> None:
        """Cancel what still runs and release the model; may be called twice."""
        self.on_close()
        model, self.model = self.model, None
        acquiring, self.acquiring = self.acquiring, None
        if model is None and acquiring is not None:
            acquiring.cancel()
            acquiring.add_done_callback(self._release_acquired)  # it may have succeeded just now
        if model is not None:
            self.pool.worker.cancel([stream for stream in self.streams if not stream.is_finished])
            self.pool.release(model)

    def _release_acquired(self, acquiring: asyncio.Task[PooledModel]) -> None:
        if not acquiring.cancelled() and acquiring.exception() is None:
            self.pool.release(acquiring.result())


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client closes the connection: then raises ClientLeft."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
