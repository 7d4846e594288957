"""The kernels in C for training on a CPU with AMX, as one library: blocks, the head, and Muon.

    kernels = tile_kernels()                   # None where there are none
    kernels.function(structure, *pointers(tensor, other))

fast/block_kernel.py, fast/head_kernel.py and fast/muon_kernel.py call them.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fast.c_library import build_library

MULTIPLE = 32  # of which all sizes must be multiples: the side of what is computed at a time
CHUNK = 128  # as in tile_products.h: tokens, or rows, that a thread takes at a time


@functools.cache
def tile_kernels() -> Any:
    """The compiled kernels, or None without a C compiler, on another processor, or if the system does not allow AMX."""
    library = build_library(("block_tiles.c", "head_tiles.c", "muon_tiles.c"), "native")
    if library is None or not library.has_tiles():
        return None
    pointer, number, factor = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    for function in (library.block_memory_bytes, library.head_memory_bytes, library.iteration_memory_bytes):
        function.restype = number
    library.write_direction.argtypes = [pointer, pointer, pointer, number, factor, ctypes.c_int, number]
    library.apply_update.argtypes = [pointer, pointer, number, factor, factor, number]
    return library


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Where tensors start, 0 for None. Keep the tensors until the kernel has returned."""
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def memory(n_bytes: int) -> Tensor:
    """Memory in which a kernel computes."""
    return torch.empty(n_bytes, dtype=torch.uint8)


def useful_threads(n_rows: int) -> int:
    """The number of torch's threads, or of chunks of rows if that is smaller."""
    return max(1, min(torch.get_num_threads(), -(-n_rows // CHUNK)))
