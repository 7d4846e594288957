"""GELU and the linear layer after it, in training on a CPU: one kernel in C for each pass.

    if supports(x):
        y = gelu_linear(x, weight, bias)    # F.linear(F.gelu(x, approximate="tanh"), weight, bias)

Replaces: the second half of MLP.forward. As torch.compile would do it, the backward pass computes GELU again instead of
keeping its result, but together with its gradient, so that both share the exponential.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: on other devices, without a C compiler, without AVX2, in float16, and if the layer has an adapter.

Shapes: N rows, K and M a layer's inputs and outputs.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.c_library import build_library
from fast.cpu_backward import linear_gradients

ALIGNMENT = 16  # the number of elements must be a multiple of it


@functools.cache
def _library() -> Any:
    """The compiled kernel, or None where it cannot be built."""
    library = build_library(("gelu.c",), "native")
    if library is not None:
        for function, n_tensors in ((library.gelu_forward, 2), (library.gelu_backward, 4)):
            function.restype = None
            function.argtypes = [*[ctypes.c_void_p] * n_tensors, ctypes.c_long, ctypes.c_long, ctypes.c_int]
    return library


@torch.compiler.assume_constant_result  # torch.compile cannot look into a C library
def is_available() -> bool:
    """Whether there is a kernel; the first call loads it."""
    return _library() is not None


def supports(x: Tensor) -> bool:
    """Whether there is a kernel for x, the input of GELU."""
    is_supported = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() % ALIGNMENT == 0
    return is_supported and is_available()


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(F.gelu(x, approximate="tanh"), weight, bias), for x (..., K) and weight (M, K)."""
    return _GeluLinear.apply(x, weight, bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y_grad,) = grads
        x, weight = ctx.saved_tensors
        activated, x_grad = gelu_backward(y_grad @ weight.to(y_grad.dtype), x)
        if not any(ctx.needs_input_grad[1:]):  # a frozen layer
            return x_grad, None, None
        weight_grad, bias_grad = linear_gradients(activated, weight, y_grad, ctx.has_bias)
        return x_grad, weight_grad, bias_grad


# Operators of torch, with written-out schemas, as in fast/document_attention.py.


@torch.library.custom_op("jojo::gelu", mutates_args=(), schema="(Tensor x) -> Tensor")
def gelu(x: Tensor) -> Tensor:
    """GELU with the tanh approximation, of any shape in float32 or bfloat16."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _call("gelu_forward", x, y)
    return y


@gelu.register_fake
def _empty_output(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("jojo::gelu_backward", mutates_args=(), schema="(Tensor y_grad, Tensor x) -> (Tensor, Tensor)")
def gelu_backward(y_grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x) and the gradient of x, from the gradient of gelu(x)."""
    x, y_grad = x.contiguous(), y_grad.to(x.dtype).contiguous()
    y, x_grad = torch.empty_like(x), torch.empty_like(x)
    _call("gelu_backward", x, y_grad, y, x_grad)
    return y, x_grad


@gelu_backward.register_fake
def _empty_gradient(y_grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_output(x), _empty_output(x)


def _call(name: str, x: Tensor, *others: Tensor) -> None:
    """Call a function of the kernel with x and other tensors. Raises NotImplementedError if it does not support x."""
    if not supports(x):
        raise NotImplementedError(f"no kernel for GELU of {x.numel()} numbers in {x.dtype}")
    pointers = (tensor.data_ptr() for tensor in (x, *others))
    getattr(_library(), name)(*pointers, x.numel(), torch.get_num_threads(), x.dtype == torch.bfloat16)
