"""C kernels for the work of each decode step; this module builds them for this processor and calls them.

    if build():
        y = RowProduct(weight, None, bias)(x)    # x @ weight.T + bias
        y = attend(qkv, keys_values, slice(position, position + 1))

Replaces: F.linear for a few rows (row_product.c) and attention of one new token per row (row_attention.c).
Gains: see docs/performance.md, "What each fast part gains".
Skipped: without a C compiler and on processors without AVX2.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.c_library import build_library

SOURCES = ("row_product.c", "row_attention.c")
KINDS = (torch.bfloat16, torch.int8, torch.float32)  # of weights, numbered as in row_product.c


class Layer(ctypes.Structure):
    """`struct layer` of row_product.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_long) for name in ("outputs", "inputs")),
        *((name, ctypes.c_int) for name in ("kind", "is_bfloat16")),
    )


class Step(ctypes.Structure):
    """`struct step` of row_attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "positions")),
        *((name, ctypes.c_long) for name in ("tokens", "first_row", "longest", "cache_rows", "heads", "size", "room")),
        ("is_bfloat16", ctypes.c_int),
    )


def build(processor: str = "native") -> ctypes.CDLL | None:
    """The compiled SOURCES; None without a C compiler or on a processor without AVX2."""
    return _build(processor)


@functools.cache  # not `build` itself: calls with and without the default argument would set this up twice
def _build(processor: str) -> ctypes.CDLL | None:
    library = build_library(SOURCES, processor)
    if library is None:
        return None
    library.row_product.argtypes = [ctypes.POINTER(Layer), *[ctypes.c_void_p] * 3, ctypes.c_long, ctypes.c_int]
    library.row_product.restype = None
    library.gelu_in_place.argtypes, library.gelu_in_place.restype = [ctypes.c_void_p, ctypes.c_long], None
    library.max_rows.argtypes = [ctypes.POINTER(Layer)]
    library.max_rows.restype = ctypes.c_long
    library.row_attention.argtypes = [ctypes.POINTER(Step), *[ctypes.c_void_p] * 3]
    library.row_attention.restype = None
    library.supports_head_size.argtypes = [ctypes.c_long]
    return library


def _require_kernels(processor: str) -> ctypes.CDLL:
    """The compiled SOURCES. Raises NotImplementedError if they cannot be built."""
    library = build(processor)
    if library is None:
        raise NotImplementedError("no C compiler, or a processor without AVX2")
    return library


class RowProduct:
    """x @ weight.T * scale + bias, (N, M), summed in float32, for x (N, K) of up to `max_rows` rows.

    Optionally with GELU (tanh) applied and a residual (N, M) added before the result is rounded.

    weight (M, K) in float32, bfloat16 or int8, scale and bias (M,) or None, all on the CPU. All but an int8 weight have
    the same precision, float32 or bfloat16. Raises NotImplementedError for another one, and if the kernel cannot be
    built.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, processor: str = "native"
    ):
        library = _require_kernels(processor)
        self.tensors = [None if one is None else one.contiguous() for one in (weight, scale, bias)]  # kept alive
        pointers = (None if one is None else one.data_ptr() for one in self.tensors)
        self.dtype, self.outputs = weight.dtype if scale is None else scale.dtype, weight.shape[0]
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise NotImplementedError(f"no kernel for {self.dtype}")
        kind, is_bfloat16 = KINDS.index(weight.dtype), self.dtype == torch.bfloat16
        self.layer = ctypes.byref(Layer(*pointers, *weight.shape, kind, is_bfloat16))
        self.function, self.max_rows = library.row_product, library.max_rows(self.layer)

    def __call__(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        x = x.to(self.dtype).contiguous()  # autocast may have changed the precision, which the kernel could not see
        y = torch.empty(len(x), self.outputs, dtype=self.dtype)
        added = None
        if residual is not None:
            residual = residual.to(self.dtype).contiguous()
            added = residual.data_ptr()
        self.function(self.layer, x.data_ptr(), added, y.data_ptr(), len(x), gelu)
        return y


def gelu(x: Tensor) -> Tensor:
    """GELU (tanh) of x on the CPU, which it may overwrite. In float32, torch takes five times as long."""
    library = build()
    if library is None or x.dtype != torch.float32 or not x.is_contiguous():
        return F.gelu(x, approximate="tanh")
    library.gelu_in_place(x.data_ptr(), x.numel())
    return x


def attend(
    qkv: Tensor,
    keys_values: Tensor,
    positions: slice | Tensor,
    rows: slice | Tensor = slice(None),
    longest: int = 0,
    processor: str = "native",
) -> Tensor:
    """Attention (N, C) of one new token per row: stores its keys and values at `positions`, and attends up to there.

    qkv is (N, 3 C); keys_values (2, B, H, block_size, D) is a layer's part of a KVCache. `positions` and `rows` are
    slices, for N consecutive rows at the same position, or tensors (N,), with the largest position as `longest`. All
    are float32 or all bfloat16, contiguous and on the CPU.
    """
    qkv = qkv.to(keys_values.dtype)  # as in RowProduct
    _, cache_rows, heads, room, size = keys_values.shape
    y = torch.empty(len(qkv), heads * size, dtype=qkv.dtype)
    first_row = (rows.start or 0) if isinstance(rows, slice) else 0
    step = Step(
        None if isinstance(rows, slice) else rows.data_ptr(),
        None if isinstance(positions, slice) else positions.data_ptr(),
        *(len(qkv), first_row, positions.start if isinstance(positions, slice) else longest),
        *(cache_rows, heads, size, room, qkv.dtype == torch.bfloat16),
    )
    _require_kernels(processor).row_attention(ctypes.byref(step), qkv.data_ptr(), keys_values.data_ptr(), y.data_ptr())
    return y
