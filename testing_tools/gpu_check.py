"""Check that a GPU computes correctly and measure its speed: the most valuable steps first, within a time limit.

    python testing_tools/gpu_check.py
    python testing_tools/gpu_check.py 900 --json figures.json

Prints what each step finds and a table at the end, and writes the figures as JSON. Results are compared with float64,
with the CPU, and with the plain code. Each step is a process of its own with a limit; steps that no longer fit into the
seconds are left out. Needs no download. Exit status 1 if a check failed. With `--device cpu` the same steps run with
tiny models, which shows that the script itself works.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.cli import UserError, check_options, option, parse_options, run_script  # noqa: E402
from common.device import choose_device, device_option  # noqa: E402
from common.files import atomic_write, require_target  # noqa: E402

MIN_SECONDS = 15  # a step that would have less time is left out
SHOWN_LINES = 30  # of each step's output
SMALL = ("--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "64")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


@dataclasses.dataclass(frozen=True)
class GpuCheckOptions:
    """How long to measure, on which device, and where to write the results."""

    seconds: float = option(460.0, "time for all steps together", positional=True, nargs="?", above=0)
    device: str | None = device_option(group=None)
    json: str = option("gpu_check.json", "file for the figures", metavar="FILE")
    folder: str | None = option(None, "folder for logs and runs (default: a new temporary one)", metavar="DIR")
    only: tuple[str, ...] = option((), "run only these steps", nargs="+", metavar="STEP")
    check: str | None = option(None, "run one check in this process; the script calls itself this way", metavar="NAME")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step: its limit in seconds, the words after `python`, and a package that it needs."""

    name: str
    limit_s: float
    words: tuple[str, ...]
    needs: str | None = None


@dataclasses.dataclass
class Result:
    """The outcome of a step ("ok", "failed", "too long" or "left out"), its time, and its lines."""

    name: str
    status: str
    seconds: float
    lines: list[str]

    @property
    def failures(self) -> list[str]:
        return [line for line in self.lines if line.startswith("FAIL")]


def plan(device: str, folder: Path) -> list[Step]:
    """All steps, the most valuable first."""
    is_small = not device.startswith("cuda")

    def check(name: str, limit_s: float) -> Step:
        script = ("testing_tools/gpu_check.py", "--check", name, "--device", device, "--folder", str(folder))
        return Step(name, limit_s, script)

    def speed(name: str, limit_s: float, task: str, *shape: str, also: str = "", peer: str | None = None) -> Step:
        """A step of benchmark.py: `shape` is left out where models are small, and `also` is not."""
        rounds = ("--rounds", "1", "--round_s", "0.1", "--max_tokens", "8") if is_small else ("--rounds", "2")
        words = [*(SMALL if is_small else shape), *rounds, *also.split(), *(("--peer", peer) if peer else ())]
        if is_small and task == "train" and "--compile_scope" not in words:
            words.append("--no-compile")
        to = ("--device", device, "--json", str(folder / f"{name}.json"))
        return Step(name, limit_s, ("testing_tools/benchmark.py", task, *words, *to), peer)

    def training(name: str, preset: str, rows: int, steps: int, limit_s: float, **more: str) -> Step:
        batch = ("--batch_size", str(rows), "--gradient_accumulation_steps", str(steps))
        return speed(name, limit_s, "train", "--preset", preset, *batch, **more)

    in_bfloat16, as_one_piece = "--dtype bfloat16 --residual_dtype bfloat16", "--compile --compile_scope model"

    return [
        check("environment", 60),
        check("numbers", 90),
        check("steps", 150),
        check("decoding", 90),
        check("muon", 60),
        training("train_gpt2_64x2", "gpt2", 64, 2, 110),
        speed("generate_gpt2", 90, "generate", "--preset", "gpt2"),
        check("attention", 60),
        check("beside_cpu", 120),
        check("repeats", 150),
        training("train_gpt2_64x2_residual_bfloat16", "gpt2", 64, 2, 110, also=in_bfloat16),
        training("train_gpt2_64x2_as_one_piece", "gpt2", 64, 2, 150, also=as_one_piece),
        training("train_gpt2_16x8", "gpt2", 16, 8, 90),
        training("train_tiny_128x1", "tiny", 128, 1, 60),
        training("train_gpt2_beside_transformers", "gpt2", 16, 8, 150, peer="transformers"),
        speed("generate_gpt2_beside_transformers", 120, "generate", "--preset", "gpt2", peer="transformers"),
        check("profile", 100),
        training("train_tiny_16x8", "tiny", 16, 8, 60),
        training("train_gpt2-medium_32x4", "gpt2-medium", 32, 4, 150),
        training("train_gpt2-xl_8x16", "gpt2-xl", 8, 16, 240),
        speed("generate_gpt2-xl", 120, "generate", "--preset", "gpt2-xl"),
    ]


def run_step(step: Step, folder: Path, left_s: float) -> Result:
    """Run a step in its own process, for at most its limit and the time that is left."""
    if step.needs and importlib.util.find_spec(step.needs) is None:
        return Result(step.name, "left out", 0.0, [f"{step.needs} is not installed"])
    if left_s < min(MIN_SECONDS, step.limit_s):
        return Result(step.name, "left out", 0.0, ["no time left"])
    log, started = folder / f"{step.name}.log", time.monotonic()
    environment = {**os.environ, **OFFLINE, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *step.words],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(min(step.limit_s, left_s)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "too long"
        finally:
            if process.poll() is None:  # also after Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    result = Result(step.name, status, time.monotonic() - started, lines)
    if status == "ok" and result.failures:
        result.status = "failed"
    return result


def figures_of(step: Step, folder: Path) -> dict | None:
    """What benchmark.py wrote, if the step is a benchmark."""
    path = folder / f"{step.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(results: Sequence[Result], figures: dict[str, dict]) -> list[str]:
    """One line per step with its outcome, then one per speed."""
    lines = ["", f"{'step':36}{'outcome':>10}{'s':>7}"]
    for result in results:
        lines.append(f"{result.name:36}{result.status:>10}{result.seconds:>7.0f}")
        lines += [f"    {line[:110]}" for line in result.failures]
    if figures:
        lines += ["", f"{'speed':36}{'tokens/s':>12}{'MFU':>8}{'GiB':>8}{'ratio':>8}"]
    for name, found in figures.items():
        mfu = f"{found['mfu']:.1%}" if found.get("mfu") is not None else ""
        memory = f"{found['peak_memory_bytes'] / 2**30:.1f}" if found.get("peak_memory_bytes") else ""
        ratio = f"{found['ratio']:.2f}" if found.get("ratio") else ""
        lines.append(f"{name:36}{found['ours_tokens_per_s']:>12,.0f}{mfu:>8}{memory:>8}{ratio:>8}")
        lines += [f"    {what}: {1000 * seconds:.1f} ms" for what, seconds in found.get("latencies_s", {}).items()]
    return lines


def run_all(options: GpuCheckOptions, folder: Path, device: str) -> int:
    """Run the steps that fit into the time; returns the exit status."""
    deadline = time.monotonic() + options.seconds
    steps = [step for step in plan(device, folder) if not options.only or step.name in options.only]
    if not steps:
        names = ", ".join(step.name for step in plan(device, folder))
        raise UserError(f"--only {' '.join(options.only)}: no such step; choose from {names}")
    results, figures = [], {}
    for step in steps:
        result = run_step(step, folder, deadline - time.monotonic())
        results.append(result)
        print(f"\n--- {step.name}: {result.status}, {result.seconds:.0f} s")
        print("\n".join(line[:150] for line in result.lines[-SHOWN_LINES:]), flush=True)
        if (found := figures_of(step, folder)) is not None:
            figures[step.name] = found
    print("\n".join(table(results, figures)))
    outcomes = [{**dataclasses.asdict(result), "lines": result.lines[-SHOWN_LINES:]} for result in results]
    with atomic_write(options.json, "w", encoding="utf-8") as file:
        json.dump({"device": device, "steps": outcomes, "figures": figures}, file, indent=1)
    print(f"\nfigures: {options.json}, logs: {folder}")
    return int(any(result.status in ("failed", "too long") for result in results))


def main() -> int:
    options = parse_options(GpuCheckOptions, __doc__)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="gpu_check-"))
    folder.mkdir(parents=True, exist_ok=True)
    if options.check is None:
        require_target("json", options.json)
    device = choose_device(options.device)
    if options.check is None:
        return run_all(options, folder, device)
    from gpu_checks import CHECKS, Setting
    from gpu_times import TIMES

    checks = CHECKS | TIMES
    if options.check not in checks:
        raise UserError(f"--check {options.check}: unknown; use one of {', '.join(checks)}")
    checks[options.check](Setting(device, folder, is_small=not device.startswith("cuda")))
    return 0


if __name__ == "__main__":
    run_script(main)
