"""The guard that makes "cuda:0" and "mps" devices of a process without them: `build_guard`, then `load_guard`."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def build_guard(folder: Path) -> Path | str:
    """Compile the guard into `folder`; returns its path, or the reason why it cannot be built."""
    import torch
    from torch.utils.cpp_extension import include_paths

    if torch.backends.cuda.is_built():
        return "needs a build of torch without CUDA; the other builds register its devices themselves"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))), None)
    if compiler is None or sys.platform != "linux":
        return "needs Linux and a C++ compiler"
    library = folder / "guard.so"
    includes = [f"-I{path}" for path in include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", abi, *includes, str(SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return library if done.returncode == 0 else f"{compiler} cannot compile torch's headers: {done.stderr[:300]}"


def load_guard(library: str) -> None:
    """Load the guard; only before torch is imported, which asks for the devices once."""
    assert "torch" not in sys.modules
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    torch_cpu = Path(spec.origin).parent / "lib" / "libtorch_cpu.so"
    ctypes.CDLL(str(torch_cpu), mode=ctypes.RTLD_GLOBAL)  # the guard needs its symbols
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
