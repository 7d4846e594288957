"""The head's loss and gradients on a CPU with AMX: one kernel in C for the products, the softmax and cross entropy.

    if supports(weight, torch.bfloat16):
        losses, hidden_grad, weight_grad = losses_and_gradients(hidden, weight, targets, rows)

Replaces: the loop over chunks of rows in fast/tied_head.py. Products are of bfloat16 numbers and logits are rounded to
bfloat16, as under autocast; the softmax and all sums are in float32.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: without AMX, and for weights of more than MAX_NUMBERS, whose gradient would not stay in the cache.

Shapes: V vocab_size, C n_embd, N rows, M rows that count.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fast.c_library import build_library

MAX_NUMBERS = 3 << 19  # 4,096 x 384


class _Head(ctypes.Structure):
    """`struct head` of head_tiles.c."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("rows", "width", "ids", "threads"))


@functools.cache
def _library() -> Any:
    """The compiled kernel, or None where it cannot be built."""
    library = build_library(("head_tiles.c",), "native")
    if library is not None:
        library.supports_head.argtypes = [ctypes.c_long, ctypes.c_long]
        library.head_memory_bytes.restype = ctypes.c_long
    return library


def supports(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for a head's weight (V, C) and products in `dtype`; the first call loads it."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or dtype != torch.bfloat16:
        return False
    if weight.numel() > MAX_NUMBERS or _library() is None:
        return False
    return bool(_library().supports_head(weight.shape[1], weight.shape[0]))


def losses_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, wants_hidden: bool = True, wants_weight: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The cross entropies (M,) of hidden @ weight.T, and the gradients of their sum, all in float32.

    `hidden` is (N, C), `weight` (V, C) and `targets` (N,); `rows` (M,) are the rows that count. The gradients of
    `hidden` (N, C), 0 in the other rows, and of `weight` (V, C) are None unless they are wanted.
    """
    hidden, weight = hidden.float().contiguous(), weight.detach().contiguous()
    hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
    weight_grad = torch.empty_like(weight) if wants_weight else None
    losses = torch.empty(len(rows))
    head = ctypes.byref(_Head(len(rows), weight.shape[1], weight.shape[0], torch.get_num_threads()))
    memory = torch.empty(_library().head_memory_bytes(head), dtype=torch.uint8)
    tensors = (hidden, weight, rows, targets[rows], losses, hidden_grad, weight_grad, memory)
    pointers = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
    _library().head_losses(head, *pointers)
    return losses, hidden_grad, weight_grad
