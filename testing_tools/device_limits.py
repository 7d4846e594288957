"""The limits of a device, measured, and the least time in which it could train or generate.

machine = measure_machine("cpu", "bfloat16")
flops_per_token, seconds_per_token = training_floor(config, machine)
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_timing import on_device, timed
from benchmark_training import gpt_config

from common.device import allow_tf32, n_cores, peak_flops

if TYPE_CHECKING:
    from model import GPT

# Bytes per weight: weight, gradient and 2 or 1 moments are read; all but the gradient are written.
OPTIMIZER_BYTES = {"adamw": 28, "muon": 20}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device's name, its peak in FLOP/s for matrix products, and its memory bandwidth in bytes per second."""

    name: str
    peak: float
    peak_source: str
    bandwidth: float


def measure_machine(device: str, dtype: str) -> Machine:
    """The limits of the device. The peak is that of its data sheet if known, else that of a matmul in `dtype`."""
    import torch

    on_cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_cuda else cpu_name()
    allow_tf32()  # as train.py does
    known = peak_flops(name, dtype) if on_cuda else None
    size = 8192 if on_cuda else 4096
    peak = known or matmul_flops(device, dtype, size)
    bandwidth = memory_bandwidth(device, 1 << (30 if on_cuda else 28))
    if on_cuda:
        torch.cuda.empty_cache()
    return Machine(name, peak, "data sheet" if known else f"a matmul of {size}", bandwidth)


def matmul_flops(device: str, dtype: str, size: int) -> float:
    """FLOP/s of a product of two square matrices."""
    import torch

    a, b, c = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(3))
    return 2 * size**3 / least_seconds(lambda: torch.mm(a, b, out=c), device)


def memory_bandwidth(device: str, n_bytes: int) -> float:
    """Bytes per second of a copy or of a read, whichever is faster."""
    import torch

    source = torch.ones(n_bytes // 4, device=device)
    target = torch.zeros_like(source)
    copy_s = least_seconds(lambda: target.copy_(source), device)
    read_s = least_seconds(lambda: source.sum(), device)
    return n_bytes * max(2 / copy_s, 1 / read_s)


def least_seconds(action: Callable[[], object], device: str, for_s: float = 0.5) -> float:
    """The shortest time of an action in at least 3 tries and about `for_s` seconds."""
    work = on_device(lambda: action() is None or 1, device)
    timed(work, 1)
    tries = [timed(work, 1)[0] for _ in range(3)]
    while sum(tries) < for_s:
        tries.append(timed(work, 1)[0])
    return min(tries)


def cpu_name() -> str:
    """The processor's name and how many cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"{name or platform.processor() or platform.machine()}, {n_cores()} cores"


def training_floor(config: Any, machine: Machine) -> tuple[float, float]:
    """(FLOPs per token, seconds per token that no program can avoid), from the FLOPs and the bytes to move.

    The forward and the backward pass each read every weight once per micro-batch in the training precision, or are
    limited by their FLOPs. The optimizer must wait for the gradients' norm, and moves OPTIMIZER_BYTES per weight.
    """
    model = weightless_model(config)
    flops = model.flops_per_token()
    weight_bytes = 2 * itemsize(config.dtype) * model.n_params() * config.gradient_accumulation_steps
    passes_s = max(flops * config.tokens_per_iter / machine.peak, weight_bytes / machine.bandwidth)
    optimizer_s = OPTIMIZER_BYTES[config.optimizer] * model.n_params() / machine.bandwidth
    return flops, (passes_s + optimizer_s) / config.tokens_per_iter


def generation_floor(options: Any, config: Any, machine: Machine) -> tuple[float, float]:
    """(FLOPs per new token, seconds per new token that no program can avoid), from the FLOPs and the bytes to move.

    Each step reads every weight once for all streams, and each stream's keys and values. The prompt is one step.
    """
    model = weightless_model(config)
    shape, streams = model.config, options.streams
    head = shape.n_vocab * shape.n_embd
    body = model.n_params() - model.wte.weight.numel() - model.wpe.weight.numel()
    weight_bytes = (1 if options.quantize else itemsize(config.dtype)) * (body + head)
    width = shape.n_layer * shape.n_embd
    flops = streams * (2 * body * options.prompt_tokens + 2 * head + 2 * width * options.prompt_tokens**2)
    seconds = max(flops / machine.peak, weight_bytes / machine.bandwidth)
    for context in range(options.prompt_tokens + 1, options.prompt_tokens + options.max_tokens):
        step_flops = streams * (2 * (body + head) + 4 * width * context)
        step_bytes = weight_bytes + streams * 2 * itemsize(config.dtype) * width * context
        flops += step_flops
        seconds += max(step_flops / machine.peak, step_bytes / machine.bandwidth)
    n_new = streams * options.max_tokens
    return flops / n_new, seconds / n_new


def weightless_model(config: Any) -> GPT:
    """The model on the meta device, without memory for its weights, to count them."""
    import torch

    from model import GPT

    with torch.device("meta"):
        return GPT(gpt_config(config))


def itemsize(dtype: str) -> int:
    """Bytes per number."""
    return 4 if dtype == "float32" else 2
