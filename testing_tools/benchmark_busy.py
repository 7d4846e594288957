"""Measure training, generation and evaluation next to another busy program, and on an idle machine.

    python testing_tools/benchmark.py busy
    python testing_tools/benchmark.py busy --preset tiny --rounds 3 --json busy.json

Runs the scripts as a user starts them, in four alternating settings: idle or busy, with OpenMP's default waiting or
with what the scripts choose. The busy program is a loop in a process and a session of its own. Prints the median tokens
per second, and each as a share of the idle speed with the default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

from common.cli import UserError, check_options, option, parse_options  # noqa: E402
from common.files import atomic_write, require_target  # noqa: E402
from common.threads import USER_SETTINGS  # noqa: E402

DEFAULT = {"KMP_BLOCKTIME": "200"}  # another OpenMP's default: torch's ignores it, and the scripts change nothing
SETTINGS = {  # (whether another program runs, the variables that the user sets)
    "idle, default": (False, DEFAULT),
    "idle": (False, {}),
    "busy, default": (True, DEFAULT),
    "busy": (True, {}),
}


@dataclasses.dataclass(frozen=True)
class BusyOptions:
    """What to run, and how often."""

    task: str = option("busy", "what to measure", positional=True, choices=("busy",))
    preset: str = option("small", "model size, as for train.py", group="model")
    rounds: int = option(3, "measured rounds", at_least=1)
    iterations: int = option(6, "training iterations per round", at_least=2)
    max_tokens: int = option(100, "tokens to generate per round", at_least=2)
    eval_tokens: int = option(16_384, "tokens to evaluate per round", at_least=1)
    json: str | None = option(None, "also write the figures to this file", group="files", metavar="FILE")

    def __post_init__(self) -> None:
        check_options(self)


@contextlib.contextmanager
def busy_program() -> Iterator[None]:
    """Keep one core busy while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run(command: Sequence[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts. Raises UserError with what it printed if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in USER_SETTINGS} | variables
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT
    )
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr.strip()[-300:]}; run it by hand")
    return done


def train(folder: Path, options: BusyOptions, variables: dict[str, str]) -> float:
    """Tokens per second of train.py: the median of its iterations but the first."""
    command = ["train.py", "--dataset", "random", "--data_dir", str(folder), "--out_dir", str(folder)]
    command += ["--preset", options.preset, "--max_iters", str(options.iterations), "--log_interval", "1"]
    command += ["--eval_iters", "1", "--eval_interval", "1000", "--device", "cpu"]
    text = run(command, variables).stdout
    speeds = [float(number.replace(",", "")) for number in re.findall(r"([\d,]+) tokens/s", text)]
    return statistics.median(speeds[1:])


def generate(folder: Path, options: BusyOptions, variables: dict[str, str]) -> float:
    """Tokens per second of gen.py after the first token."""
    command = ["gen.py", str(_checkpoint(folder, options)), "--prompt", "a", "--nonstop", "--verbose", "--no_delay"]
    done = run([*command, "--max_tokens", str(options.max_tokens), "--device", "cpu"], variables)
    match = re.search(r"then ([\d.]+) tokens/s", done.stderr)
    assert match is not None, done.stderr
    return float(match[1])


def evaluate(folder: Path, options: BusyOptions, variables: dict[str, str]) -> float:
    """Tokens per second of evaluate.py."""
    report = folder / "evaluate.json"
    command = ["evaluate.py", str(_checkpoint(folder, options)), "--dataset", "random", "--data_dir", str(folder)]
    run([*command, "--limit", str(options.eval_tokens), "--json", str(report), "--device", "cpu"], variables)
    return json.loads(report.read_text("utf-8"))["datasets"]["random"]["results"][0]["tokens_per_s"]


def _checkpoint(folder: Path, options: BusyOptions) -> Path:
    return folder / f"random{options.iterations}.pt"


Task = Callable[[Path, BusyOptions, dict[str, str]], float]
TASKS: dict[str, Task] = {
    "training": train,
    "generation": generate,
    "evaluation": evaluate,
}


def measure(options: BusyOptions, tasks: Mapping[str, Task] = TASKS) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of every round, by task and setting."""
    from random_data import write_dataset

    found: dict[str, dict[str, list[float]]] = {task: {name: [] for name in SETTINGS} for task in tasks}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, "random", "text", 8 * options.eval_tokens, seed=1)
        for number in range(options.rounds):
            for task, measure_task in tasks.items():
                for setting, (is_busy, variables) in SETTINGS.items():
                    with busy_program() if is_busy else contextlib.nullcontext():
                        speed = measure_task(folder, options, variables)
                    found[task][setting].append(speed)
                    print(f"round {number + 1}/{options.rounds}: {task}, {setting}: {speed:,.0f} tokens/s", flush=True)
    return found


def table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """The medians in lines, with their share of the idle speed."""
    lines = [f"{'tokens/s (share)':<18}" + "".join(f"{name:>22}" for name in SETTINGS)]
    for task, speeds in found.items():
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        full = medians["idle, default"]
        cells = (f"{value:,.0f} ({value / full:.0%})" for value in medians.values())
        lines.append(f"{task:<18}" + "".join(f"{cell:>22}" for cell in cells))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(BusyOptions, __doc__, argv)
    if options.json:
        require_target("json", options.json)
    found = measure(options)
    print("\n".join(["", *table(found)]))
    if options.json:
        with atomic_write(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": dataclasses.asdict(options), "tokens_per_s": found}, file, indent=1)
