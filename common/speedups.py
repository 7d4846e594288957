"""Loads the faster parts of fast/, unless --plain leaves them out or the folder is gone.

Temporary: until fast/ has these functions itself, they are put together here from today's parts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

Speedups = Any


def load_speedups(plain: bool) -> Speedups | None:
    """What scripts use of fast/; None with --plain."""
    if plain:
        return None
    from fast.allocator import keep_freed_memory

    return SimpleNamespace(
        keep_freed_memory=keep_freed_memory,
        speed_up_training=_speed_up_training,
        compile_training=_compile_training,
        logits_rows=_logits_rows,
    )


def _speed_up_training(model, activation_checkpointing: bool = False) -> None:
    model.activation_checkpointing = activation_checkpointing


def _logits_rows(device: str) -> int:
    from training.tied_head import HEAD_CHUNK, HEAD_CHUNK_CUDA

    return HEAD_CHUNK_CUDA if device.startswith("cuda") else HEAD_CHUNK


def _compile_training(model, trial_step: Callable[[], None], any_failed: Callable[[bool], bool]) -> None:
    import gc
    import time

    from fast.allocator import give_back_freed_memory
    from training.memory import is_out_of_memory

    start, failure = time.perf_counter(), None
    model.compile_training()
    try:
        trial_step()
    except Exception as error:  # compilers fail in many ways; without one the same work runs, only slower
        if is_out_of_memory(error):
            raise
        failure = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
    if any_failed(failure is not None):
        print(f"warning: torch.compile failed ({failure or 'in another process'}); continuing without it")
        model.uncompile()
    else:
        print(f"torch.compile: ready after {time.perf_counter() - start:.1f} s")
    gc.collect()  # the compiler leaves hundreds of thousands of objects, here and there in what the step has freed
    give_back_freed_memory()
