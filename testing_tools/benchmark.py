"""Measure training, generation and data preparation: against another program, and against the device's limits.

    python testing_tools/benchmark.py train --preset small --peer transformers
    python testing_tools/benchmark.py generate --preset gpt2 --max_tokens 200 --peer transformers --json generate.json
    python testing_tools/benchmark.py prepare --input TinyStoriesV2-GPT4-train.txt --peer tiktoken
    python testing_tools/benchmark.py serve --help
    python testing_tools/benchmark.py busy --help

Prints a line per round and a table: tokens per second (median, minimum and maximum of the rounds), start-up (the first
step, including compilation), peak memory, the ratio, FLOP/s and their share of the device's peak (model FLOPs
utilization, MFU), and the limit: the speed at which the device would only do the work that no program can avoid. Each
side runs in its own process, so that its memory is measured separately, and the rounds alternate (A B A B).
Weights and ids are random, which does not change the speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import benchmark_busy  # noqa: E402
import benchmark_serve  # noqa: E402
from benchmark_timing import timed  # noqa: E402
from benchmark_training import gpt_config  # noqa: E402
from benchmark_work import PEERS, WORKS, generation_config, peer_setting, training_config  # noqa: E402
from device_limits import cpu_name, generation_floor, measure_machine, training_floor  # noqa: E402

from common.cli import UserError, check_options, option, parse_options, run_script  # noqa: E402
from common.device import (  # noqa: E402
    choose_device,
    device_option,
    dtype_option,
    is_out_of_memory,
    n_cores,
    plain_option,
    quantize_option,
)
from common.files import atomic_write, require_target  # noqa: E402

PACKAGES = ("transformers", "tiktoken")  # peers that must be installed
SHOWN_SETTINGS = (
    *("preset", "n_layer", "n_head", "n_embd", "block_size", "device", "dtype", "batch_size"),
    *("gradient_accumulation_steps", "optimizer", "compile", "compile_scope", "residual_dtype"),
    *("quantize", "streams", "prompt_tokens"),
    *("max_tokens", "input", "rounds"),
)


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure, and on what."""

    task: str = option(None, "what to measure", positional=True, nargs=None, choices=tuple(PEERS))
    peer: str | None = option(
        None,
        "what to compare with: transformers; train: also a loop like nanoGPT's, plain (its defaults on a CPU) or "
        "compiled (its best flags); prepare: tiktoken",
        choices=tuple(dict.fromkeys(itertools.chain(*PEERS.values()))),
    )
    rounds: int = option(5, "measured rounds", at_least=1)
    round_s: float = option(3.0, "duration of a round of training or generation in seconds", metavar="S", above=0)
    json: str | None = option(None, "also write the figures to this file", metavar="FILE")
    plain: bool = plain_option()

    preset: str | None = option(
        None, "model size, as for train.py (default: gpt2 on CUDA, small elsewhere)", group="model"
    )
    n_layer: int | None = option(None, "layers (default: the preset's)", at_least=1, group="model")
    n_head: int | None = option(None, "attention heads (default: the preset's)", at_least=1, group="model")
    n_embd: int | None = option(None, "width (default: the preset's)", at_least=1, group="model")
    block_size: int | None = option(None, "context length in tokens (default: the preset's)", at_least=1, group="model")
    device: str | None = device_option()
    dtype: str | None = dtype_option()

    n_vocab: int | None = option(
        None, "ids of the vocabulary (default: 50,259, GPT-2's with ChatML)", at_least=1, group="train"
    )
    batch_size: int | None = option(None, "sequences per micro-batch (default: 16)", at_least=1, group="train")
    gradient_accumulation_steps: int | None = option(
        None, "micro-batches per iteration (default: train.py's)", at_least=1, group="train"
    )
    optimizer: str | None = option(
        None, "our optimizer (default: train.py's)", choices=("muon", "adamw"), group="train"
    )
    compile: bool | None = option(
        None, "use torch.compile on our side (default: as train.py for a long run)", group="train"
    )
    compile_scope: str | None = option(
        None,
        "compile our blocks one by one, or all as one piece (default: block)",
        choices=("block", "model"),
        group="train",
    )
    residual_dtype: str | None = option(
        None, "precision of our residual stream (default: float32)", choices=("float32", "bfloat16"), group="train"
    )

    quantize: str | None = quantize_option("generate")
    streams: int = option(1, "texts generated together", at_least=1, group="generate")
    prompt_tokens: int = option(16, "tokens of the prompt", at_least=1, group="generate")
    max_tokens: int = option(200, "new tokens", at_least=1, group="generate")

    input: str | None = option(None, "the text file to prepare", metavar="FILE", group="prepare")

    def __post_init__(self) -> None:
        check_options(self)
        if self.peer not in (None, *PEERS[self.task]):
            raise ValueError(f"{self.task} can be compared with {' or '.join(PEERS[self.task])}, not {self.peer}")
        if (self.input is None) == (self.task == "prepare"):
            raise ValueError("prepare needs --input FILE, and no other task takes it")
        if self.quantize and (self.task != "generate" or self.plain):
            raise ValueError("--quantize is only for generate, without --plain")


# --- one process per side ---


def serve(side: str, options: BenchmarkOptions, config: Any, pipe: Any, works: Mapping = WORKS) -> None:
    """Run one side in its own process: build its work, measure rounds on request, then send memory and latencies."""
    try:
        start = time.perf_counter()
        if config is not None:
            choose_device(config.device)  # makes it the current device of this process, as in the scripts
        work = works[options.task][side](options, config)
        if work.repeats:
            timed(work, 1)  # compiles, captures graphs, allocates memory
        pipe.send(time.perf_counter() - start)
        steps = max(1, round(options.round_s / timed(work, 1)[0])) if work.repeats else 1
        while pipe.recv() == "round":
            pipe.send(timed(work, steps))
        pipe.send((work.peak_bytes(), work.latencies_s()))
    except UserError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the parent is ending and prints the reason
        return
    except Exception as error:
        if not is_memory_error(error):
            raise
        pipe.send(UserError("out of memory; use a smaller --batch_size, --streams or --preset"))


def is_memory_error(error: Exception) -> bool:
    """Whether memory ran out; does not import torch into a process that has not needed it."""
    return is_out_of_memory(error) if "torch" in sys.modules else isinstance(error, MemoryError)


class Side:
    """A process that does one side's work on request."""

    def __init__(self, side: str, options: BenchmarkOptions, config: Any):
        context = multiprocessing.get_context("spawn")  # a fresh process, whose memory is only its own
        self.name = side
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(side, options, config, theirs), daemon=True)
        self.process.start()
        theirs.close()
        print(f"{self.name}: starting")
        self.start_up_s = self._receive()

    def measure(self) -> float:
        """Tokens per second of one round."""
        seconds, tokens = self._ask("round")
        return tokens / seconds

    def finish(self) -> tuple[int | None, dict[str, float]]:
        """End the process; returns its peak memory in bytes and its latencies in seconds."""
        answer = self._ask("end")
        self.process.join()
        return answer

    def _ask(self, what: str) -> Any:
        with contextlib.suppress(BrokenPipeError):  # the process has ended; `_receive` reports that better
            self.pipe.send(what)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise UserError(
                f"the process that measures {self.name} ended with status {self.process.exitcode}; if no reason is "
                "printed above, memory ran out: use a smaller --batch_size, --streams or --preset"
            ) from error
        if isinstance(answer, UserError):
            raise answer
        return answer


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int, warm_up: bool = False) -> dict[str, list[float]]:
    """Each side's tokens per second, measured in alternating rounds (A B A B).

    A warm-up round does not count: the caches of a side that waited for the other one to start are cold.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(0 if warm_up else 1, rounds + 1):
        speeds = {name: measure() for name, measure in sides.items()}
        shown = ", ".join(f"{name} {_number(speed)}" for name, speed in speeds.items())
        print(f"{f'round {number}/{rounds}' if number else 'warm-up'}: {shown} tokens/s", flush=True)
        for name, speed in speeds.items() if number else ():
            found[name].append(speed)
    return found


# --- the figures ---


def figures(ours: list[float], peer: list[float] | None) -> dict:
    """The median tokens per second of both sides, and their ratio."""
    ours_median = statistics.median(ours)
    peer_median = statistics.median(peer) if peer else None
    return {
        "ours_tokens_per_s": ours_median,
        "peer_tokens_per_s": peer_median,
        "ratio": ours_median / peer_median if peer_median else None,
        "ours_rounds": ours,
        "peer_rounds": peer,
    }


def measure_model(
    options: BenchmarkOptions, measure_machine: Callable = measure_machine, make_side: type = Side
) -> dict:
    """The figures of train and generate."""
    config = training_config(options) if options.task == "train" else generation_config(options)
    gpt_config(config)  # raises UserError for a shape that does not fit together
    machine = measure_machine(config.device, config.dtype)
    if options.task == "train":
        flops, floor_s = training_floor(config, machine)
    else:
        flops, floor_s = generation_floor(options, config, machine)
    found = measure_sides(options, config, make_side)
    achieved = found["ours_tokens_per_s"] * flops
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    has_own_shape = any(getattr(options, name) for name in shape)
    if options.task == "train":
        names = ("batch_size", "gradient_accumulation_steps", "optimizer", "compile", "compile_scope", "residual_dtype")
        settings = {name: getattr(config, name) for name in names}
    else:
        settings = {name: getattr(options, name) for name in ("quantize", "streams", "prompt_tokens", "max_tokens")}
    return {
        "task": options.task,
        "preset": "custom" if has_own_shape else config.preset,
        "device": config.device,
        "device_name": machine.name,
        "dtype": config.dtype,
        **shape,
        **settings,
        **found,
        "flops_per_s": achieved,
        "mfu": achieved / machine.peak,
        "peak_flops": machine.peak,
        "peak_flops_source": machine.peak_source,
        "bandwidth_bytes_per_s": machine.bandwidth,
        "floor_tokens_per_s": 1 / floor_s,
    }


def measure_preparation(options: BenchmarkOptions) -> dict:
    """The figures of prepare; the limit is one thread's speed of encoding, on every core."""
    found = measure_sides(options, None)
    one_thread = found["peer_tokens_per_s"]
    if one_thread is None:
        side = Side("tiktoken", options, None)
        one_thread = side.measure()
        side.finish()
    facts = {"task": "prepare", "preset": None, "device": "cpu", "device_name": cpu_name(), "dtype": None}
    return {**facts, "input": options.input, **found, "mfu": None, "floor_tokens_per_s": n_cores() * one_thread}


def measure_sides(options: BenchmarkOptions, config: Any, make_side: type = Side) -> dict:
    """Start both sides, measure alternating rounds, and end them: speeds, start-up times and peak memory."""
    names = ("ours", options.peer) if options.peer else ("ours",)
    sides = {name: make_side(name, options, config) for name in names}
    speeds = alternate({name: side.measure for name, side in sides.items()}, options.rounds, options.task != "prepare")
    found = figures(speeds["ours"], speeds.get(options.peer or ""))
    for prefix, name in (("", "ours"), ("peer_", options.peer)):
        side = sides.get(name or "")
        found[f"{prefix}start_up_s"] = side and side.start_up_s
        found[f"{prefix}peak_memory_bytes"], latencies_s = side.finish() if side else (None, {})
        found |= {"latencies_s": latencies_s} if latencies_s else {}
    setting = peer_setting(options.task, options.peer, config.device if config else "cpu") if options.peer else None
    return {**found, "peer": options.peer, "peer_setting": setting, "rounds": options.rounds}


def table(found: dict) -> list[str]:
    """The figures as lines of text."""
    settings = {name: found[name] for name in SHOWN_SETTINGS if found.get(name) is not None}
    lines = [f"{found['task']} on {found['device_name']}"]
    lines.append(", ".join(f"{name} {value}" for name, value in settings.items()))
    if found["peer"]:
        lines.append(f"{found['peer']}: {found['peer_setting']}")
    lines.append(_row("", "ours", found["peer"] or ""))
    for label, ours_key, peer_key, show in (
        ("tokens/s, median", "ours_tokens_per_s", "peer_tokens_per_s", _number),
        ("min to max", "ours_rounds", "peer_rounds", _range),
        ("start-up, s", "start_up_s", "peer_start_up_s", _number),
        ("peak memory, MiB", "peak_memory_bytes", "peer_peak_memory_bytes", lambda size: _number(size / 2**20)),
    ):
        cells = ["n/a" if found[key] is None else show(found[key]) for key in (ours_key, peer_key)]
        lines.append(_row(label, cells[0], cells[1] if found["peer"] else ""))
    if found["ratio"] is not None:
        lines.append(_row("ratio", f"{found['ratio']:.2f}", "1"))
    if found["mfu"] is not None:
        peak = f"of {_number(found['peak_flops'] / 1e12)} ({found['peak_flops_source']})"
        lines.append(_row("TFLOP/s", _number(found["flops_per_s"] / 1e12), peak))
        lines.append(_row("MFU", f"{found['mfu']:.1%}", ""))
    lines += [_row(f"{name}, ms", _number(1000 * s), "") for name, s in found.get("latencies_s", {}).items()]
    share = found["ours_tokens_per_s"] / found["floor_tokens_per_s"]
    lines.append(_row("limit, tokens/s", _number(found["floor_tokens_per_s"]), f"ours: {share:.0%}"))
    return lines


def _row(label: str, ours: str, peer: str) -> str:
    return f"{label:20}{ours:>20}{peer:>28}".rstrip()


def _range(speeds: list[float]) -> str:
    return f"{_number(min(speeds))}-{_number(max(speeds))}"


def _number(value: float) -> str:
    """A number with three digits or more: 0.123, 12.3, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    if sys.argv[1:2] in (["serve"], ["busy"]):  # these have options of their own
        return {"serve": benchmark_serve, "busy": benchmark_busy}[sys.argv[1]].main()
    options = parse_options(BenchmarkOptions, __doc__)
    if options.peer in PACKAGES and importlib.util.find_spec(options.peer) is None:
        raise UserError(f"--peer {options.peer} is not installed; run: pip install -r requirements-dev.txt")
    if options.json:
        require_target("json", options.json)
    found = measure_preparation(options) if options.task == "prepare" else measure_model(options)
    print("\n".join(["", *table(found)]))
    if options.json:
        with atomic_write(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    run_script(main)
