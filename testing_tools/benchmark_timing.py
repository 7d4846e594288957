"""Time and memory of one side's work in benchmark.py.

seconds, tokens = timed(work, steps=10)
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SAMPLE_S = 0.1  # seconds between two samples of a process tree's memory


@dataclasses.dataclass(frozen=True)
class Work:
    """One side's work: `step` does it once and returns its tokens, `peak_bytes` returns its peak memory."""

    step: Callable[[], int]
    peak_bytes: Callable[[], int | None]
    synchronize: Callable[[], object] = lambda: None  # waits until the device has finished
    latencies_s: Callable[[], dict[str, float]] = dict  # other timings, taken after the rounds
    repeats: bool = True  # False: a step is long, so it gets no warm-up and one step makes a round


def timed(work: Work, steps: int, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
    """(seconds, tokens) of a number of steps, measured until the device has finished them."""
    work.synchronize()
    start = clock()
    tokens = sum(work.step() for _ in range(steps))
    work.synchronize()
    return clock() - start, tokens


def on_device(step: Callable[[], int], device: str) -> Work:
    """Work on a device: how to wait for it, and its memory (on a CPU that of the process)."""
    import torch

    if device.startswith("cuda"):
        return Work(step, lambda: torch.cuda.max_memory_allocated(device), lambda: torch.cuda.synchronize(device))
    return Work(step, process_peak_bytes, torch.mps.synchronize if device == "mps" else lambda: None)


def process_peak_bytes() -> int | None:
    """The peak memory of this process (Linux; elsewhere None)."""
    return _kib_in(Path("/proc/self/status"), "VmHWM:")


def tree_bytes(process_id: int) -> int:
    """The memory of a process and its descendants now; a shared page is divided among its users (Linux)."""
    folder = Path(f"/proc/{process_id}")
    total = _kib_in(folder / "smaps_rollup", "Pss:") or 0
    try:
        children = " ".join(path.read_text() for path in folder.glob("task/*/children")).split()
    except OSError:  # the process has ended
        return total
    return total + sum(tree_bytes(int(child)) for child in children)


def _kib_in(path: Path, label: str) -> int | None:
    """The number of KiB after `label` in one of Linux's status files, in bytes; None if it is missing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:  # another system, or the process has ended
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(label)), None)


class PeakMemory:
    """The peak memory of a process tree in bytes, sampled while it runs; None before that."""

    def __init__(self) -> None:
        self.bytes: int | None = None

    @contextlib.contextmanager
    def watch(self, process_id: int) -> Iterator[None]:
        """Sample the memory in a thread while the block runs."""
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(SAMPLE_S):
                if now := tree_bytes(process_id):
                    self.bytes = max(self.bytes or 0, now)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
