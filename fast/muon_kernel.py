"""Muon's Newton-Schulz iteration on a CPU with AMX: one kernel in C for the matrices of one shape.

    speed_up_optimizers(optimizers)     # instances of torch.optim.Muon with a method `orthogonalised`

Replaces: Muon.orthogonalised of training/muon.py, which takes 15 products of matrices one by one. The precision is the
same: matrices and products are rounded to bfloat16, and sums are in float32.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: without AMX, and for sizes that are not multiples of 32, or so large that torch's products are as fast.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fast.c_library import build_library

MAX_ROWS = 512  # of the shorter side


class _Iteration(ctypes.Structure):
    """`struct iteration` of muon_tiles.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("count", "rows", "columns", "steps", "threads")),
        *((name, ctypes.c_float) for name in ("a", "b", "c", "eps")),
    )


@functools.cache
def _library() -> Any:
    """The compiled kernel, or None where it cannot be built."""
    library = build_library(("muon_tiles.c",), "native")
    if library is not None:
        library.supports_sizes.argtypes = [ctypes.c_long, ctypes.c_long]
        library.iteration_memory_bytes.restype = ctypes.c_long
    return library


def speed_up_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let Muon orthogonalize its updates in the kernel, wherever that is possible."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Muon):
            plain = optimizer.orthogonalised  # type: ignore[attr-defined]  # of training/muon.py
            optimizer.orthogonalised = functools.partial(_orthogonalised, plain)  # type: ignore[attr-defined]


def supports(matrices: Tensor) -> bool:
    """Whether there is a kernel for matrices (n, rows, columns); the first call loads it."""
    if matrices.device.type != "cpu" or matrices.dtype != torch.bfloat16 or _library() is None:
        return False
    return min(matrices.shape[1:]) <= MAX_ROWS and bool(_library().supports_sizes(*matrices.shape[1:]))


def orthogonalised_(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Matrices (n, rows, columns) in bfloat16 with all singular values made nearly one; may overwrite `matrices`.

    Raises NotImplementedError if there is no kernel for them.
    """
    if not supports(matrices):
        raise NotImplementedError(f"no kernel for matrices of {tuple(matrices.shape[1:])} in {matrices.dtype}")
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).contiguous()
    iteration = ctypes.byref(_Iteration(*x.shape, steps, torch.get_num_threads(), *coefficients, eps))
    memory = torch.empty(_library().iteration_memory_bytes(iteration), dtype=torch.uint8)
    _library().orthogonalise(iteration, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(memory.data_ptr()))
    return x.mT.contiguous() if is_tall else x


def _orthogonalised(plain: Callable[[Tensor, dict], Tensor], matrices: Tensor, group: dict) -> Tensor:
    if not supports(matrices):
        return plain(matrices, group)
    return orthogonalised_(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])
