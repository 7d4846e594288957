"""The product of a few rows with a matrix, in C: builds row_product.c for this processor and calls it.

if build():
    y = RowProduct(weight, None, bias)(x)    # x @ weight.T + bias
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
MOST_ROWS = 4  # that a call takes; the time of more is no longer the memory's
BUILD_S = 60


class Layer(ctypes.Structure):
    """`struct layer` of row_product.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_long) for name in ("outputs", "inputs")),
        *((name, ctypes.c_int) for name in ("is_int8", "is_bfloat16")),
    )


@functools.cache
def build(processor: str = "native") -> Callable | None:
    """The compiled `row_product`; None without a C compiler or on a processor without AVX2.

    Building takes a fraction of a second, so that nothing is left behind on the disk.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "clang", "cc"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        parts = [str(Path(folder, name)) for name in ("row_product.o", "row_product.so")]
        compiling = [compiler, "-O3", f"-march={processor}", "-fopenmp", "-fPIC", "-c", str(SOURCE), "-o", parts[0]]
        try:
            # Linked without OpenMP's library: torch has loaded one, and a second would bring its own threads.
            for command in (compiling, [compiler, "-shared", parts[0], "-o", parts[1]]):
                subprocess.run(command, check=True, capture_output=True, timeout=BUILD_S)
            function = ctypes.CDLL(parts[1], mode=os.RTLD_NOW).row_product
        except (OSError, subprocess.SubprocessError):  # another processor, or a compiler that knows no OpenMP
            return None
    function.argtypes = [ctypes.POINTER(Layer), *[ctypes.c_void_p] * 3, ctypes.c_long]
    function.restype = None
    return function


class RowProduct:
    """x @ weight.T * scale + bias + residual, (N, M), summed in float32, for x (N, K) of up to MOST_ROWS rows.

    weight (M, K) in bfloat16 or int8, scale and bias (M,) or None, residual (N, M) or None; all on the CPU, all but the
    weight bfloat16 or all float32. Raises NotImplementedError where the kernel cannot be built.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, processor="native"):
        self.function = build(processor)
        if self.function is None:
            raise NotImplementedError("no C compiler, or a processor without AVX2")
        self.tensors = [None if one is None else one.contiguous() for one in (weight, scale, bias)]  # kept alive
        pointers = (None if one is None else one.data_ptr() for one in self.tensors)
        others_dtype = next((one.dtype for one in (scale, bias) if one is not None), torch.bfloat16)
        self.dtype, self.outputs = others_dtype, weight.shape[0]
        is_int8, is_bfloat16 = weight.dtype == torch.int8, others_dtype == torch.bfloat16
        self.layer = ctypes.byref(Layer(*pointers, *weight.shape, is_int8, is_bfloat16))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.contiguous()
        y = torch.empty(len(x), self.outputs, dtype=self.dtype)
        if residual is not None:
            residual = residual.contiguous()
        self.function(self.layer, x.data_ptr(), None if residual is None else residual.data_ptr(), y.data_ptr(), len(x))
        return y
