"""OpenMP's waiting policy is chosen before torch computes, and only beside other busy programs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.device import n_cores
from common.threads import BUSY_CORES, POLICY, SlowSteps, busy_cores, sleep_while_waiting_if_busy

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "testing_tools"))
import benchmark_busy  # noqa: E402

needs_cores = pytest.mark.skipif(n_cores() < 2, reason="needs two cores")


def choose(busy: float | None, **environment: str) -> tuple[dict[str, str], int]:
    """What the environment is afterwards, and how often the script was started again."""
    restarts: list[int] = []
    sleep_while_waiting_if_busy(environment, lambda: busy, lambda: restarts.append(1))
    return environment, len(restarts)


@needs_cores
def test_threads_sleep_beside_a_busy_program():
    import torch  # noqa: F401  # it is loaded, so the script starts again

    assert choose(1.0) == ({POLICY: "PASSIVE"}, 1)
    assert choose(BUSY_CORES / 2) == ({}, 0)
    assert choose(None) == ({}, 0), "unknown"


@needs_cores
def test_the_users_own_settings_win():
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "LOCAL_RANK"):
        assert choose(1.0, **{name: "1"}) == ({name: "1"}, 0)


@needs_cores
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/stat")
def test_a_busy_program_is_noticed():
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        assert busy_cores(0.5) > 0.5
    finally:
        loop.kill()
        loop.wait()


@needs_cores
@pytest.mark.parametrize("loads_torch", [True, False])
def test_a_script_that_starts_again_keeps_its_command_line_and_its_input(tmp_path, loads_torch):
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{'import torch' if loads_torch else ''}\n"
        "from common.threads import sleep_while_waiting_if_busy\n"
        "sleep_while_waiting_if_busy(measure=lambda: 1.0)\n"
        "print(sys.argv[1:], os.environ['OMP_WAIT_POLICY'], sys.stdin.read(), sys.flags.dont_write_bytecode)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP", "KMP"))}
    done = subprocess.run(
        [sys.executable, "-B", str(script), "--name", "a b"],
        **{"input": "typed", "capture_output": True, "text": True, "env": environment, "check": True},
    )
    assert done.stdout == "['--name', 'a b'] PASSIVE typed 1\n"


def test_training_that_became_slow_beside_another_program_is_noticed_once():
    def noticed(busy: float | None, *steps_s: float, **environment: str) -> list[bool]:
        watch = SlowSteps(lambda: busy, environment)
        return [watch.is_disturbed(step_s) for step_s in steps_s]

    assert noticed(1.0, 1, 9, 1, 9, 9, 9, 9) == [False, False, False, False, True, False, False]
    assert not any(noticed(0.0, 1, 9, 9, 9)), "a slow disk, for example"
    assert not any(noticed(1.0, 1, 2, 2, 2))
    assert not any(noticed(1.0, 1, 9, 9, 9, OMP_WAIT_POLICY="PASSIVE"))


def loop_is_running() -> bool:
    """Whether some process is benchmark_busy's loop; a process that has just started may not have its name yet."""
    commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    return any(b"while True: pass" in command for command in commands)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_benchmark_alternates_between_an_idle_and_a_busy_processor(capsys):
    seen = []

    def task(folder, options, variables):
        seen.append((any(loop_is_running() or time.sleep(0.01) for _ in range(20)), list(variables)))
        return 100.0 if len(seen) % 4 == 1 else 50.0

    found = benchmark_busy.measure(benchmark_busy.BusyOptions(rounds=2), {"training": task})
    default = ["KMP_BLOCKTIME"]
    assert seen == [(False, default), (False, []), (True, default), (True, [])] * 2
    assert "100 (100%)" in benchmark_busy.table(found)[1] and "50 (50%)" in benchmark_busy.table(found)[1]
