"""Attention within documents for training on a CPU: kernels in C that skip what a query may not see.

    if supports(head_size, torch.float32):
        y = document_attention(qkv, first_keys(documents), n_head, dropout=0.0)

Replaces: F.scaled_dot_product_attention in Attention.forward, with the document mask or the causal mask.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: for few tokens, without a C compiler, and with dropout in float32 or in compiled code. Float32 needs AVX2 and a
head size that is a multiple of 16 (32 with AVX512); bfloat16 needs AMX, on Linux, and a multiple of 32.

Shapes: B batch, T time, C n_embd, H heads.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fast.c_library import build_library
from fast.dropout import Dropout, new_seed
from fast.dropout import dropout as dropout_of

MASK_DTYPE = torch.int32  # of first_keys; no other mask has it


class Shape(ctypes.Structure):
    """`struct shape` of document_attention.h."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "tokens", "heads", "size", "threads")),
        ("is_bfloat16", ctypes.c_int),
        ("dropout", Dropout),
    )


@functools.cache
def _library() -> Any:
    """The compiled kernels, or None where they cannot be built."""
    library = build_library(("document_attention.c", "document_tiles.c"), "native")
    if library is not None:
        library.supports_head_size.argtypes = [ctypes.c_long, ctypes.c_int]
        library.memory_bytes.restype = ctypes.c_long
        for function, n_tensors in ((library.document_attention, 5), (library.document_attention_backward, 7)):
            function.argtypes, function.restype = [ctypes.POINTER(Shape), *[ctypes.c_void_p] * n_tensors], None
    return library


def supports(head_size: int, dtype: torch.dtype, dropout: float = 0.0) -> bool:
    """Whether there is a kernel for heads of this size in this precision, with dropout; the first call loads it."""
    if dtype not in (torch.float32, torch.bfloat16) or (dropout and dtype == torch.float32) or _library() is None:
        return False
    return bool(_library().supports_head_size(head_size, dtype == torch.bfloat16))


def first_keys(documents: Tensor) -> Tensor:
    """The first position (B, T) that each position may attend to: the start of its document.

    A document of `documents` (B, T) is a run of the same number.

    >>> first_keys(torch.tensor([[4, 4, 5, 5, 5]]))
    tensor([[0, 0, 2, 2, 2]], dtype=torch.int32)
    """
    positions = torch.arange(documents.shape[1], device=documents.device)
    continues = torch.zeros_like(documents, dtype=torch.bool)
    continues[:, 1:] = documents[:, 1:] == documents[:, :-1]
    return torch.where(continues, 0, positions).cummax(1).values.to(MASK_DTYPE)


def document_attention(qkv: Tensor, first_keys: Tensor, n_head: int, dropout: float = 0.0) -> Tensor:
    """Attention (B, T, C) for qkv (B, T, 3 C): position t attends to first_keys[:, t] (B, T) up to t.

    In float32, or in bfloat16, where the scores, the softmax and all sums are in float32. `dropout` is the probability
    with which a weight of the softmax is dropped, in bfloat16 only.
    """
    return _Attention.apply(qkv, first_keys, n_head, dropout, new_seed() if dropout else 0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, first_keys: Tensor, n_head: int, dropout: float, seed: int) -> Tensor:
        y, logsumexp = forward(qkv, first_keys, n_head, dropout, seed)
        ctx.save_for_backward(qkv, first_keys, y, logsumexp)
        ctx.dropout = dropout, seed
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return backward(*grads, *ctx.saved_tensors, *ctx.dropout), None, None, None, None


# Operators of torch, because torch.compile cannot look into a C library. Their schemas are written out: older versions
# cannot infer them from annotations that `from __future__ import annotations` has turned into text.
FORWARD = "(Tensor qkv, Tensor first_keys, int n_head, float dropout, int seed) -> (Tensor, Tensor)"
BACKWARD = (
    "(Tensor y_grad, Tensor qkv, Tensor first_keys, Tensor y, Tensor logsumexp, float dropout, int seed) -> Tensor"
)


@torch.library.custom_op("jojo::document_attention", mutates_args=(), schema=FORWARD)
def forward(qkv: Tensor, first_keys: Tensor, n_head: int, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
    """The output (B, T, C) of `document_attention`, and the logarithm of each softmax's sum (B, H, T) in float32."""
    qkv, first_keys = qkv.contiguous(), first_keys.contiguous()
    y, logsumexp = _empty_outputs(qkv, first_keys, n_head, dropout, seed)
    _call("document_attention", n_head, dropout_of(dropout, seed), qkv, first_keys, y, logsumexp)
    return y, logsumexp


@forward.register_fake
def _empty_outputs(qkv: Tensor, first_keys: Tensor, n_head: int, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
    B, T, three_c = qkv.shape
    return qkv.new_empty(B, T, three_c // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32)


@torch.library.custom_op("jojo::document_attention_backward", mutates_args=(), schema=BACKWARD)
def backward(
    y_grad: Tensor, qkv: Tensor, first_keys: Tensor, y: Tensor, logsumexp: Tensor, dropout: float, seed: int
) -> Tensor:
    """The gradient of qkv (B, T, 3 C), from the gradient of y and the arguments and results of `forward`."""
    y_grad, qkv, *rest = (tensor.contiguous() for tensor in (y_grad, qkv, first_keys, y, logsumexp))
    qkv_grad, n_head = torch.empty_like(qkv), logsumexp.shape[1]
    _call("document_attention_backward", n_head, dropout_of(dropout, seed), qkv, y_grad, *rest, qkv_grad)
    return qkv_grad


@backward.register_fake
def _empty_gradient(
    y_grad: Tensor, qkv: Tensor, first_keys: Tensor, y: Tensor, logsumexp: Tensor, dropout: float, seed: int
) -> Tensor:
    return torch.empty_like(qkv)


def _call(name: str, n_head: int, dropout: Dropout, qkv: Tensor, *others: Tensor) -> None:
    """Call a function of the kernels with the shape of qkv (B, T, 3 C), the tensors, and memory for the threads.

    Raises NotImplementedError if there is no kernel for them.
    """
    B, T, three_c = qkv.shape
    size, threads = three_c // 3 // n_head, torch.get_num_threads()
    if not supports(size, qkv.dtype, dropout.least):  # which also asks the system for AMX
        way = " with dropout" if dropout.least else ""
        raise NotImplementedError(f"no kernel for attention with heads of {size} in {qkv.dtype}{way}")
    shape = ctypes.byref(Shape(B, T, n_head, size, threads, qkv.dtype == torch.bfloat16, dropout))
    memory = torch.empty(threads * _library().memory_bytes(shape), dtype=torch.uint8)
    getattr(_library(), name)(shape, *(tensor.data_ptr() for tensor in (qkv, *others, memory)))
