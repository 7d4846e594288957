"""Stop a run between two steps when it receives a signal."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

from training.parallel import is_first


class StopSignal:
    """Stores SIGINT, SIGTERM or SIGHUP in `number`, so that the current step can end; a second Ctrl-C exits at once.

    A second SIGTERM changes nothing: `timeout` and batch systems send it twice.
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> StopSignal:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            os._exit(128 + number)
        if not self.number:
            self.number = number
            # Not print(): the handler may have interrupted a print(), and a nested one would raise an error.
            if is_first():
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, b"\nstopping after this iteration; press Ctrl-C again to exit at once\n")
