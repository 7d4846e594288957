"""Muon's step on a CPU with AMX: kernels in C for the momentum, the Newton-Schulz iteration and the update.

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

from fast.tile_kernels import MULTIPLE, memory, pointers, tile_kernels

MAX_ROWS = 512  # of the shorter side


class _Iteration(ctypes.Structure):
    """`struct iteration` of muon_tiles.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("count", "rows", "columns", "steps", "threads")),
        *((name, ctypes.c_float) for name in ("a", "b", "c", "eps")),
    )


def speed_up_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let Muon of training/muon.py, but no variant of it, compute its steps in the kernels where that is possible."""
    for optimizer in optimizers:
        if torch.optim.Muon in type(optimizer).__bases__:
            optimizer.__class__ = _faster(cast(Any, type(optimizer)))  # as modules are replaced (see fast/training.py)


@functools.cache
def _faster(plain: Any) -> Any:
    """A subclass of Muon of training/muon.py whose steps use the kernels."""

    class FastMuon(plain):
        def write_direction(self, update: Tensor, weight: Tensor, group: dict) -> None:
            grad, momentum = weight.grad, self.momentum(weight)
            assert grad is not None
            if not supports(update[None]) or not _are_dense(grad, momentum):
                return super().write_direction(update, weight, group)
            share, threads = 1 - group["momentum"], torch.get_num_threads()
            given = pointers(grad, momentum, update)
            return tile_kernels().write_direction(*given, update.numel(), share, group["nesterov"], threads)

        def orthogonalised(self, matrices: Tensor, group: dict) -> Tensor:
            if not supports(matrices):
                return super().orthogonalised(matrices, group)
            return orthogonalised_(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])

        def apply(self, weights: list[Tensor], updates: Tensor, group: dict) -> None:
            if not supports(updates) or not _are_dense(*weights):
                return super().apply(weights, updates, group)
            decay = 1 - group["lr"] * group["weight_decay"]
            rate = self.rate(weights[0], group)
            for weight, update in zip(weights, updates, strict=True):
                given = pointers(weight, update)
                tile_kernels().apply_update(*given, update.numel(), decay, rate, torch.get_num_threads())

    return FastMuon


def _are_dense(*tensors: Tensor) -> bool:
    """Whether tensors are plain and contiguous, in float32."""
    is_plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    return is_plain and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)


def supports(matrices: Tensor) -> bool:
    """Whether there are kernels for matrices (n, rows, columns); the first call loads them."""
    if matrices.device.type != "cpu" or matrices.dtype != torch.bfloat16 or min(matrices.shape[1:]) > MAX_ROWS:
        return False
    return not any(size % MULTIPLE for size in matrices.shape[1:]) and tile_kernels() is not None


def orthogonalised_(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Matrices (n, rows, columns) in bfloat16 with all singular values made nearly one; may overwrite `matrices`.

    Raises NotImplementedError if there is no kernel for them.
    """
    if not supports(matrices):
        raise NotImplementedError(f"no kernel for matrices of {tuple(matrices.shape[1:])} in {matrices.dtype}")
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).contiguous()
    iteration, kernels = _Iteration(*x.shape, steps, torch.get_num_threads(), *coefficients, eps), tile_kernels()
    scratch = memory(kernels.iteration_memory_bytes(ctypes.byref(iteration)))
    kernels.orthogonalise(ctypes.byref(iteration), *pointers(x, scratch))
    return x.mT.contiguous() if is_tall else x
