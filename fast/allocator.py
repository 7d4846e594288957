"""glibc's allocator, set to keep freed memory for the next tensor.

Replaces: nothing; it changes settings of the process. Without it, a training step on a CPU spends a third of its time
on page faults in fresh memory, and generation a tenth on address translation.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: with --plain, on systems other than Linux, and with another C library.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next tensor, in huge pages; call it before the first tensor."""
    import ctypes

    libc = _glibc()
    if libc is None:
        return
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # <malloc.h>
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_arena_max, 1)  # other threads, such as the one in which serve.py loads a model, share the heap, too
    libc.mallopt(m_trim_threshold, -1)  # never return memory to the system
    libc.mallopt(m_top_pad, 1 << 26)
    # Reserve addresses, without memory yet, for all later tensors. torch's own huge pages (THP_MEM_ALLOC_ENABLE) start
    # each tensor at a new page, which takes 7 % more memory.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], [ctypes.c_void_p]
    size, page, madv_hugepage = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, 2**21, 14
    if start := libc.malloc(size):
        first = -(-start // page) * page
        libc.madvise(first, (start + size - first) // page * page, madv_hugepage)
        libc.free(start)


def give_back_freed_memory() -> None:
    """Return the memory that is free now to the system; what is freed from now on is kept again."""
    if libc := _glibc():
        libc.malloc_trim(0)
        keep_freed_memory()  # the reserved addresses at the end of the heap are gone too


def _glibc() -> Any:
    """The GNU C library, or None if this process uses another one."""
    import ctypes

    try:
        return ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    except OSError:
        return None
