"""A block's training step on a CPU with AMX: kernels in C that keep what lies between two products in the cache.

    if supports(block, x, mask):
        y = block_with_kernel(block, x, mask)    # Block.forward(x, mask=mask) under autocast to bfloat16

Replaces: Block.forward, but for its attention (fast/document_attention.py). As under autocast, products are of bfloat16
numbers; but the sums of a product are rounded only where the next product needs them rounded. Sums for a weight's
gradient depend on the number of threads, as in torch.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: without AMX, with dropout, for layers with an adapter or without a gradient, for few tokens, and for widths
over MAX_WIDTH, whose sums for the weights' gradients would not stay in the cache.

Shapes: B batch, T time, C n_embd, H heads.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fast import document_attention
from fast.c_library import build_library
from fast.document_masks import compute_dtype
from model import Block

MAX_WIDTH = 512
MULTIPLE = 32  # of which the width and the number of tokens must be multiples


class _Shape(ctypes.Structure):
    """`struct block` of block_tiles.c."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("tokens", "width", "threads"))


_Parameters = ctypes.c_void_p * 12  # `struct parameters` of each layer: weight and bias


@functools.cache
def _library() -> Any:
    """The compiled kernels, or None where they cannot be built."""
    library = build_library(("block_tiles.c",), "native")
    if library is not None:
        library.supports_block.argtypes = [ctypes.c_long]
        library.block_memory_bytes.restype = ctypes.c_long
    return library


def supports(block: Block, x: Tensor, mask: Tensor | None) -> bool:
    """Whether there are kernels for this block, its input (B, T, C) and its mask; the first call loads them."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or compute_dtype(x) != torch.bfloat16:
        return False
    if mask is None or mask.dtype != document_attention.MASK_DTYPE or x.shape[:-1].numel() % MULTIPLE:
        return False
    parameters = [parameter for parameter in _parameters(block) if parameter is not None]
    if torch.is_grad_enabled() and not all(parameter.requires_grad for parameter in parameters):
        return False
    if any(parameter.dtype != torch.float32 for parameter in parameters) or _library() is None:
        return False
    return x.shape[-1] <= MAX_WIDTH and bool(_library().supports_block(x.shape[-1]))


def block_with_kernel(block: Block, x: Tensor, first_keys: Tensor) -> Tensor:
    """The block's output (B, T, C), where position t attends to first_keys[:, t] (B, T) up to t."""
    return _Block.apply(x, first_keys, block.attn.n_head, *_parameters(block))


def layers(block: Block) -> tuple[nn.LayerNorm | nn.Linear, ...]:
    """The block's layers in the order of `enum layer` of block_tiles.c."""
    return block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj


def _parameters(block: Block) -> list[Tensor | None]:
    return [parameter for layer in layers(block) for parameter in (layer.weight, layer.bias)]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first_keys: Tensor, n_head: int, *parameters: Tensor | None) -> Tensor:
        x = x.contiguous()
        B, T, C = x.shape
        qkv = x.new_empty(B, T, 3 * C, dtype=torch.bfloat16)
        _call("before_attention", [parameters], [x, qkv])
        y, logsumexp = document_attention.forward(qkv, first_keys, n_head)
        middle, out = torch.empty_like(x), torch.empty_like(x)
        hidden = x.new_empty(B, T, 4 * C, dtype=torch.bfloat16)
        _call("after_attention", [parameters], [x, y, middle, hidden, out])
        ctx.save_for_backward(x, first_keys, qkv, y, logsumexp, middle, hidden, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, first_keys, qkv, y, logsumexp, middle, hidden, *parameters = ctx.saved_tensors
        both = [parameters, [None if parameter is None else torch.empty_like(parameter) for parameter in parameters]]
        middle_grad, y_grad, x_grad = torch.empty_like(x), torch.empty_like(y), torch.empty_like(x)
        given = [grads[0].contiguous(), middle, hidden, y]
        _call("after_attention_backward", both, [*given, middle_grad, y_grad])
        qkv_grad = document_attention.backward(y_grad, qkv, first_keys, y, logsumexp)
        _call("before_attention_backward", both, [qkv_grad, middle_grad, x, x_grad])
        return x_grad, None, None, *both[1]


def _call(name: str, parameters: Sequence[Sequence[Tensor | None]], tensors: Sequence[Tensor]) -> None:
    """Call a kernel with a block's parameters, or these and their gradients, and with tensors (B, T, ...)."""
    (ln_1_weight, *_), *_ = parameters
    assert ln_1_weight is not None
    shape = ctypes.byref(_Shape(tensors[0].shape[:2].numel(), len(ln_1_weight), torch.get_num_threads()))
    pointers = [_Parameters(*(None if each is None else each.data_ptr() for each in group)) for group in parameters]
    memory = torch.empty(_library().block_memory_bytes(shape), dtype=torch.uint8)
    getattr(_library(), name)(shape, *pointers, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, memory)))
