"""The memory of a training step: the micro-batch that fits, and the errors if none does."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from common.cli import UserError
from common.device import autocast, empty_cache, is_out_of_memory
from common.lora import Adapter
from model import GPT, GPTConfig
from training.frozen_model import trial_model
from training.parallel import local_world_size, micro_batch_size, reduce, world_size

MICRO_BATCH_TOKENS = 1 << 16  # of the default micro-batch on CUDA; smaller ones keep the device waiting for the host
HEADROOM = 0.9  # fraction of the free memory that a step may fill
# A step takes at least these fractions of `step_bytes`, in bfloat16.
MIN_SHARE, MIN_SHARE_COMPILED = 0.5, 0.25


def move_model(model: GPT, device: str) -> GPT:
    """The model on the device. Raises UserError if its weights alone do not fit."""
    try:
        return model.to(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _weights_too_large_error(model.config, device) from error


def _weights_too_large_error(config: GPTConfig, device: str) -> UserError:
    return UserError(
        f"the model's {4 * _n_weights(config) / 2**30:.1f} GiB of weights do not fit on {device}; choose a smaller "
        "--preset or another --device"
    )


def out_of_memory_error(batch_size: int, gradient_accumulation_steps: int, resume: str = "") -> UserError:
    """The UserError for a step that does not fit: use a smaller micro-batch with the same tokens per iteration.

    `resume` is an option that the command also needs, such as `--resume models/story5000.pt `.
    """
    smaller = smaller_micro_batch(batch_size, gradient_accumulation_steps)
    if smaller is None:
        return UserError("out of memory with --batch_size 1; use a smaller --block_size, --n_layer or --n_embd")
    return UserError(
        f"out of memory with --batch_size {batch_size}; run again with {resume}--batch_size {smaller[0]} "
        f"--gradient_accumulation_steps {smaller[1]}, which needs less memory for the same tokens per iteration"
    )


def smaller_micro_batch(batch_size: int, gradient_accumulation_steps: int) -> tuple[int, int] | None:
    """A micro-batch of at most half the size, and the accumulation steps that keep the product; None for size 1.

    >>> smaller_micro_batch(12, 1)
    (6, 2)
    """
    sequences = batch_size * gradient_accumulation_steps
    sizes = [size for size in divisors(sequences) if size <= batch_size // 2]
    return (sizes[0], sequences // sizes[0]) if sizes else None


def divisors(number: int) -> list[int]:
    """The divisors of a number, largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


# --- the micro-batch that fits ---

SpeedUp = Callable[[GPT, bool, str], None]  # (model, activation_checkpointing, residual_dtype)


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """What decides, together with the number of rows, how much memory a training step takes."""

    model: GPTConfig
    device: str
    dtype: str
    document_mask: bool = False
    activation_checkpointing: bool = False
    residual_dtype: str = "float32"
    compile: bool = False
    is_sharded: bool = False
    logits_rows: int | None = None  # rows whose logits exist at once; None: all
    adapter: Adapter | None = None  # what is trained next to frozen weights; None: all weights train

    def bytes(self, batch_size: int) -> int:
        """`step_bytes` of a micro-batch."""
        n_trained = None if self.adapter is None else self.adapter.n_params(self.model)
        return step_bytes(self.model, batch_size, self.logits_rows, self.activation_checkpointing, n_trained)


def find_micro_batch(
    step: StepMemory,
    requested: int | str | None,
    batch_size: int,
    gradient_accumulation_steps: int,
    speed_up: SpeedUp | None = None,
    may_grow: bool = True,
) -> tuple[int, int]:
    """(batch_size, gradient_accumulation_steps), unchanged or with a micro-batch that fits and the same product.

    `requested` is the option: a number is kept, "auto" finds the largest micro-batch that fits, and None, on CUDA, the
    largest that fits and has at most MICRO_BATCH_TOKENS (without `may_grow`, at most `batch_size` rows). `speed_up` is
    applied to the trial model. On a CPU, raises UserError if a step cannot fit.
    """
    unchanged = batch_size, gradient_accumulation_steps
    if requested != "auto" and step.device == "cpu":
        check_memory(step, batch_size, gradient_accumulation_steps)
    is_sharded = step.is_sharded and world_size() > 1
    if is_sharded and requested == "auto":
        raise UserError("--batch_size auto cannot try sizes with --parallel fsdp; give a number")
    sequences = batch_size * gradient_accumulation_steps
    most = max(batch_size, MICRO_BATCH_TOKENS // step.model.block_size) if may_grow else batch_size
    sizes = sizes_to_try(step.device, requested, most, sequences // world_size())
    if is_sharded or not sizes:
        return unchanged
    if step.device == "cpu":
        size = largest_by_estimate(step, sizes)
    else:
        size = largest_by_trying(step, sizes, speed_up)
    if size is None:
        print("warning: this system does not report its free memory; --batch_size auto has no effect")
        return unchanged
    size = int(reduce("min", size)[0])  # the same in all processes
    steps = sequences // size
    if requested == "auto" or size != batch_size:
        kind = "auto" if requested == "auto" else "the default"
        kind += f" of {batch_size} does not fit" if requested is None and size < batch_size else ""
        tokens = f"{sequences * step.model.block_size:,} tokens per iteration"
        print(f"batch size ({kind}): {size} x {steps} sequences, {tokens}")
    return size, steps


def sizes_to_try(device: str, requested: int | str | None, most: int, sequences: int) -> list[int]:
    """The micro-batch sizes to try, largest first, for a process with `sequences` per iteration; none if one is given.

    By default, sizes are tried only on CUDA, up to `most` rows.
    """
    if requested == "auto":
        return divisors(sequences)
    if requested is None and device.startswith("cuda"):  # the defaults should work on a small card, too
        return [size for size in divisors(sequences) if size <= most]
    return []


def check_memory(step: StepMemory, batch_size: int, steps: int) -> None:
    """Raise UserError if a step cannot fit into a CPU's memory, and print a warning if it might not.

    Linux grants more memory than it has, and later kills the process that uses it without a message.
    """
    available = available_memory_bytes()
    if available is None:
        return
    size = micro_batch_size(batch_size, steps)
    most = step.bytes(size)
    least = most * (MIN_SHARE_COMPILED if step.compile else MIN_SHARE)
    if least > available / local_world_size():
        raise out_of_memory_error(size, batch_size * steps // size)
    if most > available / local_world_size():
        print(
            f"warning: a step with --batch_size {size} may need {most / 2**30:.1f} GiB, but "
            f"{available / 2**30:.1f} GiB are free; if the system kills the program, use a smaller --batch_size"
        )


def largest_by_estimate(step: StepMemory, sizes: list[int]) -> int | None:
    """The first of `sizes` that fits a CPU's free memory by `step_bytes`, else 1; None if that memory is not known.

    On a CPU nothing is tried: the system would kill a process that takes too much.
    """
    available = available_memory_bytes()
    if available is None:
        return None
    room = HEADROOM * available / local_world_size()
    return next((size for size in sizes if step.bytes(size) <= room), 1)


def largest_by_trying(step: StepMemory, sizes: list[int], speed_up: SpeedUp | None = None) -> int:
    """The first of `sizes` with which a step of a throwaway model completes on the device, else 1."""
    try:
        model = trial_model(step.model, step.adapter, step.device, step.dtype).train()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _weights_too_large_error(step.model, step.device) from error
    if speed_up:
        speed_up(model, step.activation_checkpointing, step.residual_dtype)
    return next((size for size in sizes if fits(model, functools.partial(try_step, model, step, size), step.device)), 1)


def try_step(model: GPT, step: StepMemory, batch_size: int) -> None:
    """Forward and backward pass of one micro-batch."""
    ids = torch.zeros(batch_size, step.model.block_size, device=step.device, dtype=torch.long)
    documents = ids if step.document_mask else None
    with autocast(step.device, step.dtype):
        _, loss = model(ids, ids, documents=documents, positions=documents)
    loss.backward()


def fits(model: GPT, run_step: Callable[[], None], device: str) -> bool:
    """Whether a step completes while the rest of the memory that training needs is allocated."""
    reserved = []
    try:
        free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else 0
        reserved.append(torch.empty(int((1 - HEADROOM) * free), device=device, dtype=torch.uint8))
        # Two optimizer states and, with several processes, the buckets in which gradients are averaged.
        n_copies = 2 + (world_size() > 1)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        reserved += [torch.empty_like(weight) for weight in trained for _ in range(n_copies)]
        run_step()
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        reserved.clear()  # otherwise the next try would find less free memory
        model.zero_grad(set_to_none=True)
        gc.collect()  # the exception's traceback kept the step's tensors alive
        empty_cache(device)


def model_fits(config: GPTConfig, device: str, batch_size: int, logits_rows: int | None = None) -> bool:
    """Whether the weights of a model and a training step of `batch_size` rows fit into the device's free memory.

    An estimate; True if that memory is not known.
    """
    on_cuda = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_cuda else available_memory_bytes() if device == "cpu" else None
    needed = 4 * _n_weights(config) + step_bytes(config, batch_size, logits_rows)
    return free is None or needed * (1 if on_cuda else local_world_size()) <= HEADROOM * free


# --- estimates ---


def step_bytes(
    config: GPTConfig,
    batch_size: int,
    logits_rows: int | None = None,
    activation_checkpointing: bool = False,
    n_trained: int | None = None,
) -> int:
    """The most memory in bytes that a training step on a CPU takes in addition to the weights: eager, in float32.

    Per layer and token, 18 vectors of length n_embd are kept for the backward pass (the inputs of each LayerNorm,
    Linear and GELU); with activation checkpointing 1, and the 18 of one layer at a time. The gradients of the current
    layer take 16 more. At most `logits_rows` rows of logits exist at once (None: all rows, and their gradient), in
    addition to a copy of the head's weight and a part of its gradient. Gradients, two optimizer states and the
    optimizer's temporaries take the size of the weights each, and the libraries 128 MiB. With `n_trained`, only that
    many weights have those; the others are frozen.
    """
    n_weights = _n_weights(config) if n_trained is None else n_trained
    tokens = batch_size * config.block_size
    kept = config.n_layer + 18 if activation_checkpointing else 18 * config.n_layer
    activations = tokens * config.n_embd * (kept + 16)
    rows = 2 * tokens if logits_rows is None else min(logits_rows, tokens)
    logits = (rows + 2 * config.n_embd) * config.vocab_size
    return 4 * (activations + logits + 4 * n_weights) + (128 << 20)


def _n_weights(config: GPTConfig) -> int:
    """About how many weights a model has."""
    return config.vocab_size * config.n_embd + 12 * config.n_layer * config.n_embd**2


def available_memory_bytes() -> int | None:
    """Memory that this process may still take, in bytes; None if the system does not report it (Linux does)."""
    available = _number_in(Path("/proc/meminfo"), "MemAvailable:")
    if available is None:
        return None
    found = [available * 1024]
    limit = _number_in(Path("/sys/fs/cgroup/memory.max"))  # a container's; "max" if there is no limit
    used = _number_in(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and used is not None:
        found.append(max(0, limit - used))
    return min(found)


def _number_in(path: Path, label: str = "") -> int | None:
    """The number after `label` at the start of a line of a system file; None if there is no such file or line."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):  # another system
        return None
    words = next((line[len(label) :].split() for line in lines if line.startswith(label)), [])
    return int(words[0]) if words and words[0].isdecimal() else None
