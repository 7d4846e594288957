"""Attention within documents for training on a CPU: kernels in C that skip what a query may not see.

    if supports(head_size, torch.float32):
        y = document_attention(qkv, first_keys(documents), n_head)

Replaces: F.scaled_dot_product_attention in Attention.forward, with the document mask or the causal mask.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: with dropout, for few tokens, and without a C compiler. Float32 needs AVX2 and a head size that is a multiple
of 16 (32 with AVX512); bfloat16 needs AMX, on Linux, and a multiple of 32.

Shapes: B batch, T time, C n_embd, H heads.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fast.c_library import build_library

MASK_DTYPE = torch.int32  # of first_keys; no other mask has it


class Shape(ctypes.Structure):
    """`struct shape` of document_attention.h."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "tokens", "heads", "size", "threads")),
        ("is_bfloat16", ctypes.c_int),
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


def supports(head_size: int, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for heads of this size in this precision; the first call loads it."""
    if dtype not in (torch.float32, torch.bfloat16) or _library() is None:
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


def document_attention(qkv: Tensor, first_keys: Tensor, n_head: int) -> Tensor:
    """Attention (B, T, C) for qkv (B, T, 3 C): position t attends to first_keys[:, t] (B, T) up to t.

    In float32, or in bfloat16, where the scores, the softmax and all sums are in float32.
    """
    return _Attention.apply(qkv, first_keys, n_head)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, first_keys: Tensor, n_head: int) -> Tensor:
        y, logsumexp = forward(qkv, first_keys, n_head)
        ctx.save_for_backward(qkv, first_keys, y, logsumexp)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return backward(*grads, *ctx.saved_tensors), None, None


# Operators of torch, because torch.compile cannot look into a C library. Their schemas are written out: older versions
# cannot infer them from annotations that `from __future__ import annotations` has turned into text.
FORWARD = "(Tensor qkv, Tensor first_keys, int n_head) -> (Tensor, Tensor)"
BACKWARD = "(Tensor y_grad, Tensor qkv, Tensor first_keys, Tensor y, Tensor logsumexp) -> Tensor"


@torch.library.custom_op("jojo::document_attention", mutates_args=(), schema=FORWARD)
def forward(qkv: Tensor, first_keys: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """The output (B, T, C) of `document_attention`, and the logarithm of each softmax's sum (B, H, T) in float32."""
    qkv, first_keys = qkv.contiguous(), first_keys.contiguous()
    y, logsumexp = _empty_outputs(qkv, first_keys, n_head)
    _call("document_attention", n_head, qkv, first_keys, y, logsumexp)
    return y, logsumexp


@forward.register_fake
def _empty_outputs(qkv: Tensor, first_keys: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    B, T, three_c = qkv.shape
    return qkv.new_empty(B, T, three_c // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32)


@torch.library.custom_op("jojo::document_attention_backward", mutates_args=(), schema=BACKWARD)
def backward(y_grad: Tensor, qkv: Tensor, first_keys: Tensor, y: Tensor, logsumexp: Tensor) -> Tensor:
    """The gradient of qkv (B, T, 3 C), from the gradient of y and the arguments and results of `forward`."""
    y_grad, *rest = (tensor.contiguous() for tensor in (y_grad, qkv, first_keys, y, logsumexp))
    qkv_grad = _empty_gradient(y_grad, *rest)
    _call("document_attention_backward", logsumexp.shape[1], rest[0], y_grad, *rest[1:], qkv_grad)
    return qkv_grad


@backward.register_fake
def _empty_gradient(y_grad: Tensor, qkv: Tensor, first_keys: Tensor, y: Tensor, logsumexp: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _call(name: str, n_head: int, qkv: Tensor, *others: Tensor) -> None:
    """Call a function of the kernels with the shape of qkv (B, T, 3 C), the tensors, and memory for the threads.

    Raises NotImplementedError if there is no kernel for them.
    """
    B, T, three_c = qkv.shape
    size, threads = three_c // 3 // n_head, torch.get_num_threads()
    if not supports(size, qkv.dtype):  # which also asks the system for AMX
        raise NotImplementedError(f"no kernel for attention with heads of {size} in {qkv.dtype}")
    shape = ctypes.byref(Shape(B, T, n_head, size, threads, qkv.dtype == torch.bfloat16))
    memory = torch.empty(threads * _library().memory_bytes(shape), dtype=torch.uint8)
    getattr(_library(), name)(shape, *(tensor.data_ptr() for tensor in (qkv, *others, memory)))
