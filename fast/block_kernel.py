"""A block's training step on a CPU with AMX: kernels in C that keep intermediate results in the cache.

    if supports(block, x, mask):
        y = block_with_kernel(block, x, mask)    # Block.forward(x, mask=mask) under autocast to bfloat16

Replaces: Block.forward, except for attention (fast/document_attention.py). As under autocast, products are of bfloat16
numbers, but their results are rounded only where they enter another product. The gradients of the weights depend on
the number of threads in their last digits, as in torch.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: without AMX, with a residual stream in bfloat16, for layers with an adapter or without a gradient, for few
tokens or sizes that are not multiples of 32, and for widths over MAX_WIDTH, whose sums for the weights' gradients would
not stay in the cache.

Shapes: B batch, T time, C n_embd, H heads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast import document_attention
from fast.document_masks import compute_dtype
from fast.dropout import Dropout, dropout, new_seed
from fast.tile_kernels import MULTIPLE, memory, pointers, tile_kernels, useful_threads
from model import Block

MAX_WIDTH = 512
EPSILON = 1e-5  # of LayerNorm; nn.LayerNorm's default


class _Shape(ctypes.Structure):
    """`struct block` of block_tiles.c."""

    _fields_ = (*((name, ctypes.c_long) for name in ("tokens", "width", "threads")), ("dropout", Dropout))


_Parameters = ctypes.c_void_p * 12  # `struct parameters` of each layer: weight and bias


def supports(block: Block, x: Tensor, mask: Tensor | None) -> bool:
    """Whether there are kernels for this block, its input (B, T, C) and its mask; the first call loads them."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or compute_dtype(x) != torch.bfloat16:
        return False
    if mask is None or mask.dtype != document_attention.MASK_DTYPE or x.shape[-1] > MAX_WIDTH:
        return False
    if x.shape[:-1].numel() % MULTIPLE or x.shape[-1] % MULTIPLE or tile_kernels() is None:
        return False
    parameters = [parameter for parameter in _parameters(block) if parameter is not None]
    if torch.is_grad_enabled() and not all(parameter.requires_grad for parameter in parameters):
        return False
    return all(parameter.dtype == torch.float32 and parameter.is_contiguous() for parameter in parameters) and all(
        layer.eps == EPSILON for layer in (block.ln_1, block.ln_2)
    )


def block_with_kernel(block: Block, x: Tensor, first_keys: Tensor) -> Tensor:
    """The block's output (B, T, C), where position t attends to first_keys[:, t] (B, T) up to t."""
    probability = block.mlp.dropout if block.training else 0.0
    seeds = [new_seed(), new_seed()] if probability else [0, 0]  # of the attention weights, and of the layers' outputs
    return _Block.apply(x, first_keys, block.attn.n_head, (probability, *seeds), *_parameters(block))


def layers(block: Block) -> tuple[nn.LayerNorm | nn.Linear, ...]:
    """The block's layers in the order of `enum layer` of block_tiles.c."""
    return block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj


def _parameters(block: Block) -> list[Tensor | None]:
    return [parameter for layer in layers(block) for parameter in (layer.weight, layer.bias)]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first_keys: Tensor, n_head: int, drops: tuple[float, int, int], *parameters: Tensor | None
    ) -> Tensor:
        x = x.contiguous()
        probability, attention_seed, seed = ctx.drops = drops
        B, T, C = x.shape
        qkv = x.new_empty(B, T, 3 * C, dtype=torch.bfloat16)
        _call("before_attention", [parameters], [x, qkv])
        y, logsumexp = document_attention.forward(qkv, first_keys, n_head, probability, attention_seed)
        middle, out = torch.empty_like(x), torch.empty_like(x)
        hidden = x.new_empty(B, T, 4 * C, dtype=torch.bfloat16)
        _call("after_attention", [parameters], [x, y, middle, hidden, out], dropout(probability, seed))
        ctx.save_for_backward(x, first_keys, qkv, y, logsumexp, middle, hidden, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, first_keys, qkv, y, logsumexp, middle, hidden, *parameters = ctx.saved_tensors
        probability, attention_seed, seed = ctx.drops
        both = [parameters, [None if parameter is None else torch.empty_like(parameter) for parameter in parameters]]
        middle_grad, y_grad, x_grad = torch.empty_like(x), torch.empty_like(y), torch.empty_like(x)
        given = [grads[0].contiguous(), middle, hidden, y]
        _call("after_attention_backward", both, [*given, middle_grad, y_grad], dropout(probability, seed))
        qkv_grad = document_attention.backward(y_grad, qkv, first_keys, y, logsumexp, probability, attention_seed)
        _call("before_attention_backward", both, [qkv_grad, middle_grad, x, x_grad])
        return x_grad, None, None, None, *both[1]


def _call(
    name: str,
    parameters: Sequence[Sequence[Tensor | None]],
    tensors: Sequence[Tensor],
    drops: Dropout | None = None,
) -> None:
    """Call a kernel with a block's parameters, or these and their gradients, and with tensors (B, T, ...)."""
    kernels, n_tokens = tile_kernels(), tensors[0].shape[:2].numel()
    (ln_1_weight, *_), *_ = parameters
    assert ln_1_weight is not None
    shape = ctypes.byref(_Shape(n_tokens, len(ln_1_weight), useful_threads(n_tokens), drops or dropout(0.0, 0)))
    groups = [_Parameters(*(pointer.value for pointer in pointers(*group))) for group in parameters]
    scratch = memory(kernels.block_memory_bytes(shape))
    getattr(kernels, name)(shape, *groups, *pointers(*tensors, scratch))
