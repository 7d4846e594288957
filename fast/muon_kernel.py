"""Muon's step on a CPU with AMX: kernels in C for the Newton-Schulz iteration and for what is before and after it.

    speed_up_optimizers(optimizers)     # those of make_optimizers; AdamW stays as it is

Replaces: Muon.orthogonalised of training/muon.py, which takes 15 products of matrices one by one, and the passes over
memory in Muon.write_direction and Muon.apply. The precision is the same: matrices and products are rounded to bfloat16,
sums, the momentum and the weights are in float32.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: without AMX, and for sizes that are not multiples of 32, or so large that torch's products are as fast.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, cast

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
        pointer, number, factor = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
        library.write_direction.argtypes = [pointer, pointer, pointer, number, factor, ctypes.c_int, number]
        library.apply_update.argtypes = [pointer, pointer, number, factor, factor, number]
        library.write_direction.restype = library.apply_update.restype = None
    return library


def speed_up_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let Muon compute its steps in the kernels, wherever that is possible."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Muon):
            optimizer.__class__ = _faster(cast(Any, type(optimizer)))  # as modules are replaced (see fast/training.py)


@functools.cache
def _faster(plain: Any) -> Any:
    """A subclass of Muon of training/muon.py, or of a subclass, whose steps use the kernels."""

    class FastMuon(plain):
        def write_direction(self, update: Tensor, weight: Tensor, group: dict) -> None:
            grad, momentum = weight.grad, self.momentum(weight)
            assert grad is not None
            if not supports(update[None]) or not _are_dense(grad, momentum):
                return super().write_direction(update, weight, group)
            share, threads = 1 - group["momentum"], torch.get_num_threads()
            pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (grad, momentum, update))
            return _library().write_direction(*pointers, update.numel(), share, group["nesterov"], threads)

        def orthogonalised(self, matrices: Tensor, group: dict) -> Tensor:
            if not supports(matrices):
                return super().orthogonalised(matrices, group)
            return orthogonalised_(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])

        def apply(self, weights: list[Tensor], updates: Tensor, group: dict) -> None:
            if not supports(updates) or not _are_dense(*weights):
                return super().apply(weights, updates, group)
            decay = 1 - group["lr"] * group["weight_decay"]
            rate = group["lr"] * max(1, updates.shape[1] / updates.shape[2]) ** 0.5
            for weight, update in zip(weights, updates, strict=True):
                pointers = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(update.data_ptr())
                _library().apply_update(*pointers, update.numel(), decay, rate, torch.get_num_threads())

    return FastMuon


def _are_dense(*tensors: Tensor) -> bool:
    """Whether tensors are plain and contiguous, in float32."""
    is_plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    return is_plain and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)


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
