"""What a training step needs in memory: the micro-batch that fits, and what to say where none does."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.cli import UserError
from common.device import is_out_of_memory
from model import GPT, GPTConfig
from training.parallel import ALONE, World
from fast.tied_head import LOSS_CHUNK_ROWS

HEADROOM = 0.9  # share of the free memory that a step may fill
LEAST_SHARE, LEAST_SHARE_COMPILED = 0.5, 0.25  # of `step_bytes` that a step takes at least, in bfloat16


def move_model(model: GPT, device: str) -> GPT:
    """The model on the device. Raises UserError where its weights alone do not fit."""
    try:
        return model.to(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{device} has no room for the model's {model.n_params() * 4 / 2**30:.1f} GiB of weights; choose a smaller "
            "--preset or another --device"
        ) from error


def smaller_micro_batch(batch_size: int, gradient_accumulation_steps: int) -> tuple[int, int] | None:
    """A micro-batch of half the size or less with the accumulation that keeps their product; None for one of 1.

    >>> smaller_micro_batch(12, 1)
    (6, 2)
    """
    sequences = batch_size * gradient_accumulation_steps
    sizes = [size for size in divisors(sequences) if size <= batch_size // 2]
    return (sizes[0], sequences // sizes[0]) if sizes else None


def out_of_memory_error(config, go_on: str = "") -> UserError:
    """The sentence for a step that does not fit: a smaller micro-batch that makes the same iteration.

    `go_on` is what the command needs besides, such as the checkpoint to resume.
    """
    smaller = smaller_micro_batch(config.batch_size, config.gradient_accumulation_steps)
    if smaller is None:
        return UserError("out of memory with --batch_size 1; use a smaller --block_size, --n_layer or --n_embd")
    return UserError(
        f"out of memory with --batch_size {config.batch_size}; run again with {go_on}--batch_size {smaller[0]} "
        f"--gradient_accumulation_steps {smaller[1]}, the same tokens an iteration in less memory"
    )


def divisors(number: int) -> list[int]:
    """The divisors of a number, largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def fit_batch_size(
    model: GPT, config, step: Callable, world: World = ALONE, most: int | None = None
) -> tuple[int, int]:
    """The largest micro-batch that fits, of `most` rows or fewer, and the accumulation that keeps an iteration's rows.

    On CUDA and MPS by trying: `step(model, config, ids, targets)` makes the gradients of one micro-batch while the
    room that the optimizers will need is taken. On a CPU, where too much memory ends the process, by an estimate of
    what a step needs and what the system says is available. The model's gradients are gone afterwards. Several
    processes take the smallest size that one of them finds.
    """
    sequences = config.batch_size * config.gradient_accumulation_steps
    sizes = [size for size in divisors(sequences // world.size) if most is None or size <= most]
    if config.device == "cpu":
        available = available_memory_bytes()
        if available is None:
            print("warning: this system does not say how much memory is free; --batch_size auto changes nothing")
            return config.batch_size, config.gradient_accumulation_steps
        room = HEADROOM * available / world.local_size
        recomputes = config.activation_checkpointing
        fits = (size for size in sizes if step_bytes(model.config, size, recomputes) <= room)
    else:
        fits = (size for size in sizes if _step_fits(model, config, step, size, world))
    size = world.smallest(next(fits, 1))
    return size, sequences // size


def check_memory(model: GPT, config, world: World = ALONE) -> None:
    """Raise UserError where a step cannot fit into a CPU's memory, and warn where it may not.

    Linux grants memory that it does not have and later kills the process that takes it, which then can say nothing.
    """
    available = available_memory_bytes()
    if config.device != "cpu" or available is None:
        return
    config = world.micro_batches(config)
    most = step_bytes(model.config, config.batch_size, config.activation_checkpointing)
    least = most * (LEAST_SHARE_COMPILED if config.compile else LEAST_SHARE)
    if least > available / world.local_size:
        raise out_of_memory_error(config)
    if most > available / world.local_size:
        print(
            f"warning: a step with --batch_size {config.batch_size} may need {most / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} are available; if the system ends the program, use a smaller --batch_size"
        )


def _step_fits(model: GPT, config, step: Callable, batch_size: int, world: World = ALONE) -> bool:
    """Whether a step with this micro-batch runs through on the device beside what training holds besides."""
    tried = dataclasses.replace(config, batch_size=batch_size, gradient_accumulation_steps=1)
    ids = np.zeros((batch_size, config.block_size), dtype=np.int64)
    held = []
    try:
        free = torch.cuda.mem_get_info(config.device)[0] if config.device.startswith("cuda") else 0
        held.append(torch.empty(int((1 - HEADROOM) * free), device=config.device, dtype=torch.uint8))
        # Two states of the optimizers, and of several processes the buckets in which gradients are averaged.
        n_copies = 2 + (world.size > 1)
        held += [torch.empty_like(weight) for weight in model.parameters() for _ in range(n_copies)]
        step(model, tried, ids, ids)
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        held.clear()  # else the next try would find less free
        model.zero_grad(set_to_none=True)
        gc.collect()  # the exception's traceback held the step's tensors
        if config.device.startswith("cuda"):
            torch.cuda.empty_cache()


def step_bytes(config: GPTConfig, batch_size: int, recomputes: bool = False) -> int:
    """The most that a training step on a CPU takes beside the weights, in bytes: that of an eager one in float32.

    Per layer and token 18 widths are kept for the backward pass (the inputs of each LayerNorm, Linear and GELU), with
    activation checkpointing 1 and the 18 of one layer at a time; 16 more are the gradients of the layer at work. The
    logits exist a chunk at a time, beside the head's weight and the last part of its gradient. Gradients, two optimizer
    states and what an optimizer's step computes with are the weights' size each; 128 MiB are the libraries' own.
    """
    tokens = batch_size * config.block_size
    kept = config.n_layer + 18 if recomputes else 18 * config.n_layer
    activations = tokens * config.n_embd * (kept + 16)
    logits = (min(LOSS_CHUNK_ROWS, tokens) + 2 * config.n_embd) * config.vocab_size
    weights = config.vocab_size * config.n_embd + 12 * config.n_layer * config.n_embd**2
    return 4 * (activations + logits + 4 * weights) + (128 << 20)


def available_memory_bytes() -> int | None:
    """Memory that this process may still take, in bytes; None where the system does not say (Linux does)."""
    available = _number_in(Path("/proc/meminfo"), "MemAvailable:")
    if available is None:
        return None
    found = [available * 1024]
    limit = _number_in(Path("/sys/fs/cgroup/memory.max"))  # a container's; "max" where there is none
    used = _number_in(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and used is not None:
        found.append(max(0, limit - used))
    return min(found)


def _number_in(path: Path, label: str = "") -> int | None:
    """The number behind `label` at a line's start in one of the system's text files."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):  # another system
        return None
    words = next((line[len(label) :].split() for line in lines if line.startswith(label)), [])
    return int(words[0]) if words and words[0].isdecimal() else None
