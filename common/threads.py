"""OpenMP's threads on a processor that other programs use, too.

torch's threads wait for each other by spinning. If another program occupies a core, the thread that it displaces cannot
finish its part, and the others spin on the cores that it could run on: everything takes up to 20 times as long. Threads
that sleep while they wait (OMP_WAIT_POLICY=PASSIVE) leave their cores to the displaced one. On an idle processor,
waking them costs small models some speed. OpenMP reads the variable once, when torch is loaded, so a script decides
when it starts.

    if __name__ == "__main__":
        sleep_while_waiting_if_busy()
        run_script(main)

The results are the same bit for bit: which thread computes what does not change.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from common.device import n_cores

POLICY = "OMP_WAIT_POLICY"
USER_SETTINGS = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "LOCAL_RANK")  # torchrun's processes have one thread each
SAMPLE_S = 0.2
BUSY_CORES = 0.4  # more than this is not just background noise
SLOWDOWN = 3  # another busy program makes steps take at least this many times as long


def sleep_while_waiting_if_busy(
    environment: MutableMapping[str, str] = os.environ,
    measure: Callable[[], float | None] | None = None,
    restart: Callable[[], object] | None = None,
) -> None:
    """Let OpenMP's threads sleep while they wait, if other programs use the processor now.

    The user's own settings take precedence. If torch is loaded already, the same command starts again in this process,
    with the variable set. `measure` returns the number of cores that are busy, None if unknown.
    """
    if n_cores() < 2 or any(name in environment for name in USER_SETTINGS):
        return
    busy = (measure or busy_cores)()
    if busy is None or busy < BUSY_CORES:
        return
    environment[POLICY] = "PASSIVE"
    if "torch" in sys.modules:
        (restart or _restart)()


def _restart() -> None:
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def busy_cores(sample_s: float = SAMPLE_S) -> float | None:
    """How many of the cores that this process may use are busy with other programs; None if unknown (not Linux)."""
    before, own, started = _busy_ticks(), time.process_time(), time.perf_counter()
    if before is None:
        return None
    time.sleep(sample_s)
    after, ticks_per_s = _busy_ticks(), os.sysconf("SC_CLK_TCK")
    if after is None:
        return None
    busy_s = (after - before) / ticks_per_s - (time.process_time() - own)
    return busy_s / (time.perf_counter() - started)


def _busy_ticks() -> int | None:
    """The clock ticks since the system started in which this process's cores ran something."""
    try:
        text = Path("/proc/stat").read_text()
        allowed = os.sched_getaffinity(0)
    except (OSError, AttributeError):
        return None
    total = 0
    for number, fields in re.findall(r"^cpu(\d+) (.*)$", text, re.MULTILINE):
        user, nice, system, _idle, _waiting, interrupt, soft_interrupt = map(int, fields.split()[:7])
        if int(number) in allowed:
            total += user + nice + system + interrupt + soft_interrupt
    return total


class SlowSteps:
    """Notices when training becomes far slower because another program has started."""

    def __init__(self, measure: Callable[[], float | None] = busy_cores, environment: Mapping[str, str] = os.environ):
        self._measure, self._environment = measure, environment
        self._best_s = float("inf")
        self._n_slow = 0
        self._has_warned = False

    def is_disturbed(self, step_s: float) -> bool:
        """Whether to warn the user: True once, after two consecutive steps SLOWDOWN times as long as the fastest."""
        self._best_s = min(self._best_s, step_s)
        self._n_slow = self._n_slow + 1 if step_s > SLOWDOWN * self._best_s else 0
        if self._n_slow < 2 or self._has_warned or any(name in self._environment for name in USER_SETTINGS):
            return False
        self._has_warned = (self._measure() or 0) >= BUSY_CORES
        return self._has_warned
