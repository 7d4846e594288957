"""The device to run on, its precision and the options for both, seeds, the number of cores, and a GPU's peak FLOP/s.

Importing this module does not import torch; the functions that need it import it when they are called.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

from common.cli import UserError, is_terminal, option

# Dense tensor-core peak in bfloat16 (float16 on cards older than Ampere), in FLOP/s, from the vendors' data sheets.
# The first entry whose name occurs as whole words in the device's name is used, so longer names come first.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 4080": 97.5e12,
    "RTX 3090": 71e12,
    "RTX 3080": 59.5e12,
    "V100": 125e12,
    "T4": 65e12,
}
# Peak in float32 of the cards without TF32. On all others, TF32 reaches half of PEAK_FLOPS.
PEAK_FLOPS_WITHOUT_TF32 = {"V100": 15.7e12, "T4": 8.1e12}


# --- options that several scripts have ---


def device_option(group: str | None = "device") -> Any:
    """The option --device; see `choose_device`."""
    return option(
        None,
        "cpu, mps, cuda or cuda:N (default: the best one; in a terminal, you may choose a CUDA device)",
        group=group,
        metavar="NAME",
    )


def dtype_option(
    group: str | None = "device",
    help: str = "precision of matrix products; float32 means TF32 on CUDA (default: the device's best)",
) -> Any:
    """The option --dtype; see `choose_dtype`."""
    return option(None, help, choices=("float32", "bfloat16", "float16"), group=group)


def quantize_option(group: str | None = "device") -> Any:
    """The option --quantize, for models that only generate."""
    return option(None, "8-bit weights: faster on a CPU, slightly less exact", choices=("int8",), group=group)


def plain_option(group: str | None = "device") -> Any:
    """The option --plain; see common/speedups.py."""
    return option(False, "use only the plain code, without the faster parts in fast/", group=group)


# --- devices ---


class CudaDevice(TypedDict):
    index: int
    name: str
    free_gib: float
    total_gib: float


def n_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # respects taskset and a container's cpuset; Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def n_cuda_devices() -> int:
    """The number of CUDA devices. Unlike `cuda_devices`, it allocates no memory on any of them."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cuda_devices() -> list[CudaDevice]:
    """All CUDA devices with their free and total memory."""
    import torch

    devices: list[CudaDevice] = []
    for index in range(n_cuda_devices()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        devices.append({"index": index, "name": name, "free_gib": free_bytes / 2**30, "total_gib": total_bytes / 2**30})
    return devices


def choose_device(
    requested: str | None = None, devices: list[CudaDevice] | None = None, ask: Callable[[str], str] | None = None
) -> str:
    """Choose the device to run on and print it; returns a name that torch accepts ("cuda:1", "mps", "cpu").

    If `requested` is None or "auto", the user chooses from a list when there are CUDA devices and a terminal;
    otherwise it is the CUDA device with the most free memory, else MPS, else the CPU. Raises UserError if the machine
    does not have the requested device. A CUDA device becomes torch's current device, on which streams, graphs and
    pinned memory are created. Tests pass `devices` and `ask` to simulate a machine and a user.
    """
    import torch

    if requested in (None, "auto"):
        device = _best_device(cuda_devices() if devices is None else devices, ask)
    else:
        device = _check_device(requested, n_cuda_devices() if devices is None else len(devices))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return device


def _best_device(devices: list[CudaDevice], ask: Callable[[str], str] | None) -> str:
    import torch

    if devices:
        emptiest = max(devices, key=lambda device: device["free_gib"])["index"]
        if ask is None and not is_terminal():
            print(f"device: cuda:{emptiest} ({devices[emptiest]['name']}); choose another with --device")
            return f"cuda:{emptiest}"
        return f"cuda:{_ask_for_device(devices, emptiest, ask or input)}"
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    print(f"device: {device} (no CUDA device found)")
    return device


def _check_device(requested: str, n_devices: int) -> str:
    import torch

    kind, _, index = requested.partition(":")
    if kind == "cuda" and (not index or index.isdecimal()):
        if not n_devices:
            raise UserError(f"--device {requested}: this machine has no usable CUDA device; use --device cpu")
        if int(index or 0) >= n_devices:
            raise UserError(
                f"--device {requested}: there are {n_devices} CUDA devices; use cuda:0 to cuda:{n_devices - 1}"
            )
        return f"cuda:{int(index or 0)}"
    if requested == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this machine has no MPS device; use --device cpu")
        return "mps"
    if requested == "cpu":
        return "cpu"
    raise UserError(f"--device {requested}: unknown device; use cpu, mps, cuda or cuda:N")


def _ask_for_device(devices: list[CudaDevice], emptiest: int, ask: Callable[[str], str]) -> int:
    print("CUDA devices:")
    for device in devices:
        print(f"  {device['index']}: {device['name']}, {device['free_gib']:.1f} of {device['total_gib']:.1f} GiB free")
    while True:
        try:
            answer = ask(f"Device number [{emptiest}]: ").strip()
        except EOFError:
            answer = ""
        if not answer:
            return emptiest
        if answer.isdecimal() and int(answer) < len(devices):
            return int(answer)
        print(f"{answer!r} is not one of 0 to {len(devices) - 1}")


def has_fast_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware instead of emulating it."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device == "cpu":
        # AMX and AVX512_BF16 on x86; these names are private in torch, so a version without them counts as "no".
        checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return any(check() for check in checks if check)
    return False


def tensor_core_dtype(device: str) -> Any:
    """The precision in which Muon multiplies on a device: bfloat16, unless the device only emulates it.

    A CPU without it uses float32. CUDA devices before Ampere (Volta, Turing) have tensor cores for float16; older ones
    have no tensor cores and use float32.
    """
    import torch

    if device == "cpu":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if not device.startswith("cuda") or has_fast_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability(device)[0] >= 7 else torch.float32


def choose_dtype(requested: str | None, device: str) -> str:
    """The precision of matrix products: "bfloat16", "float16" or "float32".

    The default is bfloat16 if the hardware supports it, else float16 on CUDA and float32 elsewhere. A slow choice is
    accepted with a warning.
    """
    if requested in (None, "auto"):
        if has_fast_bfloat16(device):
            return "bfloat16"
        return "float16" if device.startswith("cuda") else "float32"
    if requested == "bfloat16" and not has_fast_bfloat16(device):
        print(f"warning: {device} only emulates bfloat16, which is slow; --dtype float32 is likely faster")
    if requested == "float16" and device == "cpu":
        print("warning: float16 is slow on most CPUs; --dtype float32 or bfloat16 is likely faster")
    return requested


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """The context in which matrix products on `device` run in `dtype`; for float32 it does nothing."""
    import torch

    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.partition(":")[0], dtype=getattr(torch, dtype))


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, including those of all CUDA devices."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_determinism(deterministic: bool) -> None:
    """Use only deterministic CUDA kernels, or allow all; call it before the first use of CUDA."""
    import torch

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def allow_tf32() -> None:
    """Allow TF32 on CUDA: float32 products run on tensor cores, which read 10 of the 23 mantissa bits."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep torch from choosing cuDNN's attention on CUDA; also a decorator, for everything but training.

    cuDNN builds a plan for each new shape, which for each new prompt length takes far longer than the attention itself.
    It also gives wrong results for fewer than 8 heads on some cards (PyTorch issue 193893).
    """
    import torch

    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def empty_cache(device: str) -> None:
    """Free the device memory that torch caches for later tensors (on CUDA and MPS)."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def peak_flops(device_name: str, dtype: str = "bfloat16") -> float | None:
    """The peak FLOP/s of dense matrix products on the device of this name; None if it is not known.

    The two 16-bit precisions have the same peak; float32 means TF32 where the device has it.

    >>> peak_flops("NVIDIA H200")
    989000000000000.0
    """
    other_model = r"(?! (?:Ti|SUPER|Laptop|Max-Q|D)\b)"  # an "RTX 3080 Ti" is not an "RTX 3080"
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{re.escape(name)}\b{other_model}", device_name, re.IGNORECASE):
            return peak if dtype != "float32" else PEAK_FLOPS_WITHOUT_TF32.get(name, peak / 2)
    return None


def has_cpp_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs for code that runs on a CPU."""
    import shutil

    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "cl"))


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # CUDA and MPS, the CPU, CUDA's libraries


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device, or the machine itself, has run out of memory."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _OUT_OF_MEMORY)
