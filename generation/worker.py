"""The thread in which all models compute, while another one serves HTTP."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from common.device import is_out_of_memory
from generation.batching import BatchEngine
from generation.stream import Stream

log = logging.getLogger("jojo")


class Worker(threading.Thread):
    """Runs the steps of all engines in turn, and sleeps while there is nothing to do.

    `after_step` is called after each step, in the same thread.
    """

    def __init__(self, after_step: Callable[[], None] = lambda: None) -> None:
        super().__init__(name="model", daemon=True)
        self.after_step = after_step
        self.engines: list[BatchEngine] = []
        self._wake = threading.Event()
        self._is_stopping = False

    def run(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            are_busy = [self._step(engine) for engine in list(self.engines)]
            if not any(are_busy):
                self._wake.wait()

    def _step(self, engine: BatchEngine) -> bool:
        try:
            is_busy = engine.step()
            self.after_step()
            return is_busy
        except Exception as error:  # after any error, continue to serve other requests
            log.exception("a step of the model failed")
            engine.fail("the device is out of memory" if is_out_of_memory(error) else "the model failed")
            return True

    def submit(self, engine: BatchEngine, streams: Sequence[Stream]) -> None:
        """Queue texts and wake the thread. Raises QueueFull as the engine does."""
        engine.submit(streams)
        self._wake.set()

    def cancel(self, streams: Sequence[Stream]) -> None:
        """Free the rows of these texts before the next step."""
        for stream in streams:
            stream.cancel()
        self._wake.set()

    def stop(self) -> None:
        """End the thread after the current step."""
        self._is_stopping = True
        self._wake.set()
        self.join()
