"""What gpu_check.py times in detail, each in a process of its own: decode steps, and the kernels of an iteration.

TIMES["profile"](Setting("cuda:0", Path("gpu_check"), is_small=False))
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from gpu_checks import Setting, compile_model, fast_parts, random_rows, report

from common.device import allow_tf32, has_fast_bfloat16
from generation.decoding import DecodeStep
from model import GPT, Attention, KVCache
from training.objectives import NextToken
from training.optimizers import init_optimizer_states, make_optimizers
from training.step import forward_backward

N_TIMED = 5  # decode steps of which the median is taken, after as many that are not timed


@torch.inference_mode()
def attention(setting: Setting) -> None:
    """The time of a decode step with the attention kernel and with torch's attention, in short and in long contexts."""
    dtype = torch.bfloat16 if has_fast_bfloat16(setting.device) else torch.float32
    for n_rows in (1, 16):
        torch.manual_seed(0)
        model = GPT(setting.shape("gpt2")).to(setting.device, dtype).eval().requires_grad_(False)
        decode = fast_parts().speed_up_generation(model, streams=n_rows).decode
        print(f"batch size {n_rows}: {decode_times(setting, model, decode, n_rows)}")
        if setting.on_cuda:
            has_kernel = all(type(block.attn) is not Attention for block in model.h)
            report(has_kernel, "attention runs in the kernel")
            for block in model.h:
                block.attn.__class__ = Attention
            print(f"batch size {n_rows}, torch's attention: {decode_times(setting, model, decode, n_rows)}")


def decode_times(setting: Setting, model: GPT, decode: DecodeStep, n_rows: int) -> str:
    """The milliseconds of a decode step after an eighth, a half, and nearly all of the context, in words.

    The steps are captured again, because the cache is a new one.
    """
    block_size, device = model.config.block_size, setting.device
    cache = KVCache(model.config, n_rows, torch.device(device), model.ln_f.weight.dtype)
    ids, found = torch.zeros(n_rows, dtype=torch.long, device=device), []
    for start in (block_size // 8, block_size // 2, block_size - 2 * N_TIMED - 1):
        times = []
        for length in range(start, start + 2 * N_TIMED):
            began = time.perf_counter()
            decode(model, ids, [length] * n_rows, cache)
            if setting.on_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        found.append(f"{1000 * sorted(times[N_TIMED:])[N_TIMED // 2]:.3f} ms at {start + N_TIMED:,} tokens")
    return ", ".join(found)


def profile(setting: Setting) -> None:
    """The kernels of an iteration, and what a new prompt length costs with cuDNN's attention and without."""
    allow_tf32()
    n_rows, steps = (2, 1) if setting.is_small else (64, 2)
    config = setting.run_config("gpt2", batch_size=n_rows, gradient_accumulation_steps=steps)
    model = GPT(setting.shape("gpt2")).to(setting.device).train()
    fast_parts().speed_up_training(model)
    ids = random_rows(n_rows * steps, config.block_size)
    compile_model(setting, model, config, ids)
    optimizers = make_optimizers(model, config)
    init_optimizer_states(optimizers)
    objective = NextToken(config)

    def step() -> None:
        forward_backward(model, config, objective, [ids, ids])
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    kind = torch.profiler.ProfilerActivity.CUDA if setting.on_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as found:
        step()
        if setting.on_cuda:
            torch.cuda.synchronize()
    total = "device_time_total" if setting.on_cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, total))
    print(f"an iteration: {sum(event.count for event in events)} kernels; the longest, in ms:")
    for event in events[:24]:
        print(f"{getattr(event, total) / 1000:9.2f} {event.count:6} {event.key[:90]}")
    if setting.on_cuda:
        for is_allowed in (True, False):
            print(f"attention of new lengths, cuDNN {'allowed' if is_allowed else 'off'}: {new_lengths(is_allowed)}")


@torch.inference_mode()
def new_lengths(is_cudnn_allowed: bool) -> str:
    """The time of attention for prompt lengths that have not occurred before, in words."""
    torch.backends.cuda.enable_cudnn_sdp(is_cudnn_allowed)
    times = []
    for length in range(300, 311):
        q, k, v = torch.randn(3, 1, 12, length, 64, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return f"median {sorted(times)[5]:.2f} ms, longest {max(times):.1f} ms"


TIMES: dict[str, Callable[[Setting], None]] = {check.__name__: check for check in (attention, profile)}
