"""Builds C files of this folder for this processor, and loads them.

Building takes a second or two. The result is kept in the user's cache folder, $XDG_CACHE_HOME/jojo or ~/.cache/jojo,
under a digest of the sources, the compiler and the processor. Where nothing can be kept, each process builds its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.cli import UserError
from common.files import atomic_write, make_folder

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
    compiling = [compiler, "-O3", f"-march={processor}", "-fopenmp", "-fPIC"]
    try:
        name = f"{Path(names[0]).stem}-{_digest(compiling)}.so"
        try:
            return _load(cache_folder() / name)
        except OSError:  # not built yet, or damaged
            return _build(names, compiling, name)
    except (OSError, subprocess.SubprocessError):  # another processor, or a compiler without OpenMP
        return None


def cache_folder() -> Path:
    """Where built files are kept, as in the XDG base directory specification. Raises FileNotFoundError without one."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(folder):  # a user without a home folder
        raise FileNotFoundError(folder)
    return Path(folder, "jojo")


def _digest(compiling: Sequence[str]) -> str:
    """A digest of all that a built file depends on: the sources, the compiler's version, and what "native" means."""
    # "-###" prints the commands that the compiler would run, without running them.
    command = [*compiling, "-###", "-S", "-x", "c", "-", "-o", "kernels.s"]
    asked = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=BUILD_S)
    sources = [path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]"))]
    return hashlib.sha256(b"\0".join([*sources, asked.stderr])).hexdigest()[:16]


def _build(names: Sequence[str], compiling: Sequence[str], kept_as: str) -> ctypes.CDLL:
    """Compile, load and keep the files. Raises OSError or SubprocessError if that is impossible here."""
    with tempfile.TemporaryDirectory() as folder:
        call = functools.partial(subprocess.run, check=True, capture_output=True, timeout=BUILD_S, cwd=folder)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: call([*compiling, "-c", str(FOLDER / name)]), names))
        # Linked without OpenMP's library: torch has loaded one, and a second one would start its own threads.
        call([compiling[0], "-shared", *(f"{Path(name).stem}.o" for name in names), "-o", "kernels.so"])
        built = Path(folder, "kernels.so")
        library = _load(built)
        with (
            contextlib.suppress(FileNotFoundError, UserError),
            atomic_write(make_folder(cache_folder()) / kept_as) as file,
        ):
            file.write(built.read_bytes())
    return library


def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
