"""The head's loss and gradients on a CPU with AMX: one kernel in C for the products, the softmax and cross entropy.

    if supports(weight, torch.bfloat16):
        losses, hidden_grad, weight_grad = losses_and_gradients(hidden, weight, targets, rows)

Replaces: the loop over chunks of rows in fast/tied_head.py. Products are of bfloat16 numbers and logits are rounded to
bfloat16, as under autocast; the softmax and all sums are in float32.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: without AMX, for sizes that are not multiples of 32, and for weights of more than MAX_NUMBERS, whose gradient
would not stay in the cache.

Shapes: V vocab_size, C n_embd, N rows, M rows that count.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fast.tile_kernels import MULTIPLE, memory, pointers, tile_kernels, useful_threads

MAX_NUMBERS = 3 << 19  # 4,096 x 384


class _Head(ctypes.Structure):
    """`struct head` of head_tiles.c."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("rows", "width", "ids", "threads"))


def supports(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for a head's weight (V, C) and products in `dtype`; the first call loads it."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or dtype != torch.bfloat16:
        return False
    has_sizes = weight.numel() <= MAX_NUMBERS and not any(size % MULTIPLE for size in weight.shape)
    return has_sizes and tile_kernels() is not None


def losses_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, wants_hidden: bool = True, wants_weight: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The cross entropies (M,) of hidden @ weight.T, and the gradients of their sum, all in float32.

    `hidden` is (N, C), `weight` (V, C) and `targets` (N,); `rows` (M,) are the rows that count. The gradients of
    `hidden` (N, C), 0 in the other rows, and of `weight` (V, C) are None unless they are wanted. Raises IndexError for
    a target that is not an id.
    """
    hidden, weight, targets = hidden.float().contiguous(), weight.detach().contiguous(), targets[rows].long()
    if len(rows) and not 0 <= targets.min() <= targets.max() < len(weight):
        raise IndexError(f"a target is not among the {len(weight)} ids")
    hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
    weight_grad = torch.empty_like(weight) if wants_weight else None
    losses, kernels = torch.empty(len(rows)), tile_kernels()
    head = ctypes.byref(_Head(len(rows), weight.shape[1], weight.shape[0], useful_threads(len(rows))))
    scratch = memory(kernels.head_memory_bytes(head))
    kernels.head_losses(head, *pointers(hidden, weight, rows, targets, losses, hidden_grad, weight_grad, scratch))
    return losses, hidden_grad, weight_grad
