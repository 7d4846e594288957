"""Kill training with SIGKILL at random moments, resume it, and compare the result with an uninterrupted run.

    python testing_tools/crash_test.py --kills 200

Trains tiny models on random data, text and chat in turn, in processes forked from one that has imported torch. Half of
the kills are aimed at saves, which are slowed down: while the file is written, at fsync, at the rename. Prints a line
for each run and the counts at the end; exit status 0 says that every checkpoint was readable after every kill, and
that weights, optimizers, data position, random states, metrics, samples and the best checkpoint came out identical.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import mmap
import os
import random
import re
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from random_data import write_dataset  # noqa: E402

import setup_tokenizer  # noqa: E402
from common.checkpoint import digest, load_checkpoint  # noqa: E402
from common.cli import UserError, option, parse_options, run_script  # noqa: E402
from common.files import atomic_write  # noqa: E402
from training.metrics import read_metrics  # noqa: E402

PHASES = ("training", "writing", "fsync", "rename")
PAUSE_S = 0.01  # before and after each step of a save, so that kills hit it
COMMON = (
    *("--n_layer", "2", "--n_head", "2", "--n_embd", "8", "--block_size", "16", "--batch_size", "2"),
    *("--eval_interval", "5", "--eval_iters", "2", "--log_interval", "2"),
    *("--dtype", "float32", "--no-compile", "--device", "cpu"),
)
VARIANTS = (
    ("text", "--dropout 0.1"),
    ("chat", "--dropout 0.1 --optimizer adamw --gradient_accumulation_steps 2"),
    ("text", "--optimizer adamw --keep 2"),
    ("chat", "--keep 1"),
)


@dataclasses.dataclass(frozen=True)
class CrashOptions:
    """The settings of the test."""

    kills: int = option(200, "number of times to kill training")
    max_iters: int = option(100, "iterations of each run")
    seed: int = option(1, "seed for the random moments")
    json: str | None = option(None, "also write the counts to this file", metavar="FILE")


@dataclasses.dataclass
class Counts:
    """The results of the test."""

    runs: int = 0
    kills: int = 0
    kills_by_phase: Counter = dataclasses.field(default_factory=lambda: Counter(dict.fromkeys(PHASES, 0)))
    resumes: int = 0
    unreadable: list[str] = dataclasses.field(default_factory=list)
    went_back: list[str] = dataclasses.field(default_factory=list)
    differences: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not (self.unreadable or self.went_back or self.differences)

    def as_dict(self) -> dict:
        """The counts in a form that can be written as JSON."""
        counts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        in_saves = self.kills - self.kills_by_phase["training"]
        return {**counts, "kills_inside_saves": in_saves, "identical": not self.differences}


def start_training(arguments: list[str], output: Path, phase: mmap.mmap) -> int:
    """Fork a process that runs train.py as a person would, with slow saves; returns its id."""
    process_id = os.fork()
    if process_id:
        return process_id
    status = 70
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["train.py", *arguments]
        _slow_down_saves(phase)
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as finished:
        status = int(finished.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # so that the child never returns into the campaign


def _slow_down_saves(phase: mmap.mmap) -> None:
    """Make each step of a save slow and show in `phase` which one it is; draw no curves, which would take long."""
    sys.modules["matplotlib.figure"] = cast(Any, None)  # as if matplotlib were not installed
    os.fsync = _slowly(os.fsync, phase, "fsync")
    os.replace = _slowly(os.replace, phase, "rename")
    os.link = _slowly(os.link, phase, "rename")
    save = torch.save

    def save_slowly(content: object, file: Any) -> None:
        with _in_phase(phase, "writing"):
            save(content, cast(IO[bytes], _SlowFile(file)))

    setattr(torch, "save", save_slowly)  # noqa: B010  an assignment would need the exact signature


def _slowly(function: Callable, phase: mmap.mmap, name: str) -> Callable:
    def call(*arguments: Any) -> Any:
        with _in_phase(phase, name):
            time.sleep(PAUSE_S)
            result = function(*arguments)
            time.sleep(PAUSE_S)
        return result

    return call


@contextlib.contextmanager
def _in_phase(phase: mmap.mmap, name: str) -> Iterator[None]:
    before = phase[0]
    phase[0] = PHASES.index(name)
    yield
    phase[0] = before


class _SlowFile:
    """A file whose writes are slow."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def write(self, data: bytes) -> int:
        time.sleep(PAUSE_S / 100)  # hundreds of writes per save
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def kill_at(process_id: int, phase: mmap.mmap, delay_s: float, aim: str | None) -> str | None:
    """Wait, also for the phase `aim` if given, then kill; returns the phase hit, None if the process had ended."""
    start = time.perf_counter()
    while time.perf_counter() - start < delay_s or (aim is not None and phase[0] != PHASES.index(aim)):
        if os.waitpid(process_id, os.WNOHANG)[0]:
            return None
        time.sleep(0.0005)
    if aim is not None:
        time.sleep(random.uniform(0, 2 * PAUSE_S))
    os.kill(process_id, signal.SIGSTOP)
    _, status = os.waitpid(process_id, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        return None
    hit = PHASES[phase[0]]  # the process is stopped, so it is killed in this phase
    os.kill(process_id, signal.SIGKILL)
    os.waitpid(process_id, 0)
    return hit


def readable_checkpoints(folder: Path, counts: Counts) -> int:
    """Load all checkpoints in `folder` in full, count those that do not load; returns the run's iteration, or -1."""
    iter_num = -1
    for path in sorted(folder.glob("*.pt")):
        try:
            info = load_checkpoint(path)["info"]
        except UserError as error:
            counts.unreadable.append(str(error))
        else:
            if path.name == f"{folder.name}.pt":
                iter_num = info["iter_num"]
    return iter_num


def read_samples(output: Path) -> dict[int, set[str]]:
    """The sample texts that a run printed, by iteration: one text each, however often it was printed."""
    samples: dict[int, set[str]] = {}
    for iter_num, text in re.findall(r"^iter (\d+): validation.*\n  sample: (.*)\n", output.read_text("utf-8"), re.M):
        samples.setdefault(int(iter_num), set()).add(text)
    return samples


def differences(folder: Path, reference: Path) -> list[str]:
    """Where a run's files differ from those of the uninterrupted run, apart from times and names."""
    found = []
    names = {path.name for path in reference.iterdir()} ^ {path.name for path in folder.iterdir()}
    if names:
        found.append(f"files on only one side: {sorted(names)}")
    for path in sorted(reference.glob("*.pt")):
        try:
            ours, theirs = load_checkpoint(folder / path.name), load_checkpoint(path)
        except UserError as error:
            return [*found, str(error)]
        for saved in (ours, theirs):
            del saved["info"]["elapsed_s"]
            saved["info"]["config"] = {**saved["info"]["config"], "resume": None, "out_dir": None}
            for key, value in saved.pop("info").items():
                saved[f"info.{key}"] = value
            for key, value in saved.pop("training").items():
                saved[f"training.{key}"] = value
        keys = ours.keys() | theirs.keys()
        found += [f"{path.name}: {key}" for key in sorted(keys) if digest(ours.get(key)) != digest(theirs.get(key))]
    for path in reference.glob("*.jsonl"):
        our_records, their_records = (
            [{k: v for k, v in record.items() if k not in ("tokens_per_s", "elapsed_s")} for record in read_metrics(p)]
            for p in (folder / path.name, path)
        )
        if our_records != their_records:
            found.append(path.name)
    if read_samples(folder.with_suffix(".txt")) != read_samples(reference.with_suffix(".txt")):
        found.append("samples")
    return found


def campaign_run(folder: Path, number: int, kills: int, options: CrashOptions, counts: Counts) -> str:
    """Train once without and once with up to `kills` kills, and compare; returns a line about it."""
    kind, extra = VARIANTS[number % len(VARIANTS)]
    name = f"{kind}{options.max_iters}"
    phase = mmap.mmap(-1, 1)
    straight, killed = (folder / f"{way}-{number}" / name for way in ("straight", "killed"))
    straight_output, killed_output = straight.with_suffix(".txt"), killed.with_suffix(".txt")
    straight.mkdir(parents=True)
    killed.mkdir(parents=True)
    arguments = [*COMMON, *extra.split(), "--dataset", kind, "--data_dir", str(folder)]
    arguments += ["--seed", str(number), "--max_iters", str(options.max_iters)]
    start = time.perf_counter()
    _, status = os.waitpid(start_training([*arguments, "--out_dir", str(straight)], straight_output, phase), 0)
    if status:
        raise UserError(f"the uninterrupted run failed: {straight_output.read_text('utf-8')[-2000:]}")
    interval_s = (time.perf_counter() - start) / (options.max_iters / 5)

    arguments += ["--out_dir", str(killed)]
    iter_num = -1
    hits: Counter[str] = Counter()
    while True:
        resume = ["--resume"] if (killed / f"{name}.pt").exists() else []
        counts.resumes += len(resume)
        phase[0] = 0
        process_id = start_training([*arguments, *resume], killed_output, phase)
        if sum(hits.values()) == kills:
            _, status = os.waitpid(process_id, 0)
            break
        aim = random.choice(PHASES[1:]) if random.random() < 0.5 else None
        hit = kill_at(process_id, phase, random.uniform(0, 3 * interval_s), aim)
        if hit is None:  # it had ended before
            status = 0
            break
        hits[hit] += 1
        before, iter_num = iter_num, readable_checkpoints(killed, counts)
        if iter_num < before:
            counts.went_back.append(f"{name} of run {number}: iteration {before} -> {iter_num}")
    counts.runs += 1
    counts.kills += sum(hits.values())
    counts.kills_by_phase += hits
    found = differences(killed, straight)
    if status:
        found.append(f"exit status {status}: {killed_output.read_text('utf-8')[-2000:]}")
    counts.differences += [f"run {number} ({kind} {extra}): {difference}" for difference in found]
    inside = sum(hits.values()) - hits["training"]
    verdict = "identical" if not found else f"DIFFERENT: {'; '.join(found)}"
    return f"run {number + 1}: {kind} {extra}: {sum(hits.values())} kills, {inside} inside saves: {verdict}"


def crash_test(options: CrashOptions, folder: Path) -> Counts:
    """The whole campaign, in `folder`."""
    for name in ("training.run", "training.batches", "training.memory", "fast"):  # what train.py imports: once, here
        importlib.import_module(name)
    random.seed(options.seed)
    torch.set_num_threads(1)  # threads do not survive a fork
    torch.use_deterministic_algorithms(False)  # imports half of torch, here once instead of in each process
    setup_tokenizer.get_extended_tokenizer()
    for kind in ("text", "chat"):
        write_dataset(folder, kind, kind, 2000, options.seed)
    counts = Counts()
    while counts.kills < options.kills:
        print(campaign_run(folder, counts.runs, options.kills - counts.kills, options, counts), flush=True)
    return counts


def main() -> int:
    options = parse_options(CrashOptions, __doc__)
    if not hasattr(os, "fork"):
        raise UserError("the crash test forks processes, which this system cannot; run it on Linux or macOS")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = crash_test(options, Path(folder))
    facts = {**counts.as_dict(), "seconds": round(time.perf_counter() - start)}
    for line in (*counts.unreadable, *counts.went_back, *counts.differences):
        print(f"FAULT: {line}")
    hits = ", ".join(f"{count} in {phase}" for phase, count in counts.kills_by_phase.items())
    print(
        f"{counts.kills} kills ({hits}; {facts['kills_inside_saves']} inside saves), {counts.resumes} resumes, "
        f"{counts.runs} runs, {facts['seconds']} s: unreadable checkpoints {len(counts.unreadable)}, "
        f"identical {facts['identical']}"
    )
    if options.json:
        with atomic_write(options.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)
    return 0 if counts.is_good else 1


if __name__ == "__main__":
    run_script(main)
