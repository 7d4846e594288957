"""Builds C files of this folder for this processor, and loads them.

Each set of files is built once per process, which takes a second or two and leaves nothing on the disk.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
BUILD_S = 60


@functools.cache
def build_library(names: tuple[str, ...], processor: str) -> ctypes.CDLL | None:
    """The compiled C files of these names; None without a C compiler, or on a processor without AVX2.

    `processor` is what the compiler calls it: "native" is this one.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "clang", "cc"))), None)
    if compiler is None:
        return None
    sources = [FOLDER / name for name in names]
    with tempfile.TemporaryDirectory() as folder:
        compiling = [compiler, "-O3", f"-march={processor}", "-fopenmp", "-fPIC", "-c"]
        # Linked without OpenMP's library: torch has loaded one, and a second one would start its own threads.
        linking = [compiler, "-shared", *(f"{source.stem}.o" for source in sources), "-o", "kernels.so"]
        call = functools.partial(subprocess.run, check=True, capture_output=True, timeout=BUILD_S, cwd=folder)
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda source: call([*compiling, str(source)]), sources))
            call(linking)
            return ctypes.CDLL(str(Path(folder, "kernels.so")), mode=os.RTLD_NOW)
        except (OSError, subprocess.SubprocessError):  # another processor, or a compiler without OpenMP
            return None
