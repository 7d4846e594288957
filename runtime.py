"""What every script needs to run: user errors, options from a dataclass, device, precision, memory, seeds, peak FLOP/s.

Importing this module imports no torch, so that `--help` and data preparation start at once; the functions that
need torch import it when they are called.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence

# Dense tensor-core peak in bfloat16 (float16 on cards older than Ampere), FLOP/s, from the vendors' data sheets.
# The first name that stands as whole words in the device's name counts, so longer names stand before shorter ones.
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


class UserError(Exception):
    """A fault that the user can mend: one sentence saying what failed, then the command or option that mends it."""


def first_cause(error: BaseException) -> str:
    """An exception's first cause in one short line: a server's answer where there is one."""
    while error.__cause__ is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is None:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}{': ' if lines else ''}{lines[0].strip()[:200] if lines else ''}"
    if response.status_code in (401, 403):
        return f"HTTP {response.status_code}: the hub wants its terms accepted and HF_TOKEN set"
    return f"HTTP {response.status_code}: {response.reason_phrase or type(error).__name__}"


def run_script(main: Callable[[], int | None], needs_output: bool = True) -> None:
    """Run a script's `main` and exit with its status; the one place where a UserError is printed.

    Exit status: what main returns (None is 0), 1 for a UserError, 130 for Ctrl-C. Any other exception is a bug and
    shows its traceback. A script that does not need its output goes on where the disk under that is full.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that cannot show a character shows "?"
    output = StandardOutput(sys.stdout, needs_output)
    try:
        with contextlib.nullcontext() if sys.stdout is None else contextlib.redirect_stdout(output):  # None: closed
            status = main()
            output.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `python gen.py | head`: the reader left
        output.has_failed = True
        status = 141
    if output.has_failed:  # what it still holds would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


class StandardOutput:
    """Standard output, which may lie on a full disk: refused text is a UserError if it is needed, else left out.

    That is said once on standard error. A reader that left (BrokenPipeError) is left to `run_script`.
    """

    def __init__(self, stream, is_needed: bool):
        self.stream, self.is_needed, self.has_failed = stream, is_needed, False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments) -> None:
        if self.stream is None:
            return
        try:
            getattr(self.stream, method)(*arguments)
        except BrokenPipeError:
            raise
        except OSError as error:
            is_first, self.has_failed = not self.has_failed, True
            if self.is_needed:
                raise UserError(f"standard output not written: {error.strerror}; send it somewhere else") from error
            if is_first:
                with contextlib.suppress(OSError):
                    print(f"warning: standard output not written: {error.strerror}; going on", file=sys.stderr)


def option(default, help: str, **argparse_settings):
    """A dataclass field that `parse_options` turns into a command-line option.

    `argparse_settings` go to `add_argument` (choices, nargs, metavar); `positional=True` makes it an argument
    without dashes.
    """
    return dataclasses.field(default=default, metadata={"help": help, **argparse_settings})


def parse_options(cls, description: str, argv: Sequence[str] | None = None):
    """Command-line options from the fields of dataclass `cls`, as an instance of it.

    A `bool` that is False by default becomes `--name`, any other `bool` `--name/--no-name`; `X | None` parses as X.
    A ValueError of `__post_init__` is a usage error (exit status 2), as argparse's own are.

    >>> @dataclasses.dataclass
    ... class Options:
    ...     top_k: int | None = option(None, "keep the k likeliest tokens")
    >>> parse_options(Options, "", ["--top_k", "5"])
    Options(top_k=5)
    """
    parser = _option_parser(cls, description)
    values = vars(parser.parse_args(argv))
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except ValueError as error:
        parser.error(str(error))


def given_options(cls, argv: Sequence[str] | None = None) -> dict:
    """The options that the command line really gives, without the defaults; for a run that continues another."""
    return vars(_option_parser(cls, "", argument_default=argparse.SUPPRESS).parse_args(argv))


def _option_parser(cls, description: str, **parser_settings) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=next(iter(description.strip().splitlines()), ""),
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        **parser_settings,
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        settings = dict(field.metadata)
        if "help" not in settings:
            continue
        positional = settings.pop("positional", False)
        kind = _option_type(hints[field.name])
        default = parser_settings.get("argument_default", field.default)
        is_shown = field.default not in (None, ()) and field.default is not False  # 0 is shown
        if is_shown and "default" not in settings["help"]:
            settings["help"] += f" (default: {field.default})"
        if kind is bool:
            settings["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
        else:
            settings.setdefault("type", kind)
        if positional:
            settings.setdefault("nargs", "?")
        parser.add_argument(field.name if positional else f"--{field.name}", default=default, **settings)
    return parser


def _option_type(hint) -> type:
    """The type that one command-line word is parsed as: `int | None` is int, `tuple[str, ...]` is str."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint


def is_terminal() -> bool:
    """Whether a person can be asked: standard input and output are both a terminal, and no launcher runs us."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() and "RANK" not in os.environ


def shows_colour() -> bool:
    """Whether standard output shows ANSI colours: a terminal without NO_COLOR, or anything with FORCE_COLOR."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and os.environ.get("TERM") != "dumb")


def n_cuda_devices() -> int:
    """How many CUDA devices there are; unlike `cuda_devices` it takes no memory on any of them."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cuda_devices() -> list[dict]:
    """Every CUDA device: {"index", "name", "free_gib", "total_gib"}."""
    import torch

    devices = []
    for index in range(n_cuda_devices()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        devices.append({"index": index, "name": name, "free_gib": free_bytes / 2**30, "total_gib": total_bytes / 2**30})
    return devices


def choose_device(requested: str | None = None, devices: list[dict] | None = None, ask=None) -> str:
    """The device to run on, as a string that torch takes ("cuda:1", "mps", "cpu"), and say which it is.

    `requested` None or "auto": with CUDA devices and a terminal, list them and ask; otherwise the CUDA device with
    most free memory, else MPS, else the CPU. Raises UserError for a device that this machine lacks.
    A CUDA device becomes torch's current one, on which streams, graphs and pinned memory are made.
    `devices` and `ask` stand in for the machine and the person in tests.
    """
    import torch

    if requested in (None, "auto"):
        device = _best_device(cuda_devices() if devices is None else devices, ask)
    else:
        device = _check_device(requested, n_cuda_devices() if devices is None else len(devices))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return device


def _best_device(devices: list[dict], ask) -> str:
    import torch

    if devices:
        roomiest = max(devices, key=lambda device: device["free_gib"])["index"]
        if ask is None and not is_terminal():
            print(f"device: cuda:{roomiest} ({devices[roomiest]['name']}); choose another with --device")
            return f"cuda:{roomiest}"
        return f"cuda:{_ask_for_device(devices, roomiest, ask or input)}"
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


def _ask_for_device(devices: list[dict], roomiest: int, ask) -> int:
    print("CUDA devices:")
    for device in devices:
        print(f"  {device['index']}: {device['name']}, {device['free_gib']:.1f} of {device['total_gib']:.1f} GiB free")
    while True:
        try:
            answer = ask(f"Device number [{roomiest}]: ").strip()
        except EOFError:
            answer = ""
        if not answer:
            return roomiest
        if answer.isdecimal() and int(answer) < len(devices):
            return int(answer)
        print(f"{answer!r} is not one of 0 to {len(devices) - 1}")


def has_fast_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware rather than emulating them."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device == "cpu":
        # AMX and AVX512_BF16 on x86; private names in torch, so a torch without them counts as "no".
        checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return any(check() for check in checks if check)
    return False


def choose_dtype(requested: str | None, device: str) -> str:
    """The precision of the matrix work: "bfloat16", "float16" or "float32".

    By default bfloat16 where the device really does it, else float16 on CUDA and float32 elsewhere. A bfloat16 that
    the device only emulates is allowed, and said.
    """
    if requested in (None, "auto"):
        if has_fast_bfloat16(device):
            return "bfloat16"
        return "float16" if device.startswith("cuda") else "float32"
    if requested == "bfloat16" and not has_fast_bfloat16(device):
        print(f"warning: {device} only emulates bfloat16, which is slow; --dtype float32 is likely faster")
    if requested == "float16" and device == "cpu":
        print("warning: products in float16 are slow on most CPUs; --dtype float32 or bfloat16 is likely faster")
    return requested


def autocast(device: str, dtype: str):
    """The context in which matrix work on `device` runs in `dtype`; for float32 it changes nothing."""
    import torch

    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.partition(":")[0], dtype=getattr(torch, dtype))


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensor, in huge pages (Linux, glibc).

    A training step on a CPU otherwise spends a third of its time on page faults in fresh memory, and generation a
    tenth on looking up where pages lie. Call it before the first large tensor.
    """
    import ctypes

    libc = _glibc()
    if libc is None:
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # <malloc.h>
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)  # never give back
    libc.mallopt(m_top_pad, 1 << 26)
    # Addresses without memory behind them, for all that is to come. torch's own huge pages (THP_MEM_ALLOC_ENABLE) begin
    # each tensor at a new one, which takes 7 % more.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], [ctypes.c_void_p]
    size, page, madv_hugepage = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, 2**21, 14
    if start := libc.malloc(size):
        first = -(-start // page) * page
        libc.madvise(first, (start + size - first) // page * page, madv_hugepage)
        libc.free(start)


def give_back_freed_memory() -> None:
    """Let the system have what is free now (Linux, glibc), and keep from here on what will be freed."""
    if libc := _glibc():
        libc.malloc_trim(0)
        keep_freed_memory()  # the addresses at the heap's end are gone too


def _glibc():
    """GNU's C library; None where another one, which has other means, serves this process."""
    import ctypes

    try:
        return ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    except OSError:
        return None


def has_cpp_compiler() -> bool:
    """Whether the C++ compiler that torch.compile calls for code on a CPU is there."""
    import shutil

    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "cl"))


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, those of every CUDA device included."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_determinism(deterministic: bool) -> None:
    """Make CUDA's kernels repeat themselves exactly, where asked; before the first use of CUDA."""
    import torch

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def allow_tf32() -> None:
    """Let float32 products on CUDA run on tensor cores, which read 10 of the 23 bits of each mantissa."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def peak_flops(device_name: str) -> float | None:
    """The dense 16-bit matrix peak of a device in FLOP/s by its name, None where it is not known.

    >>> peak_flops("NVIDIA H200")
    989000000000000.0
    """
    other_model = r"(?! (?:Ti|SUPER|Laptop|Max-Q|D)\b)"  # "RTX 3080 Ti" is another card than "RTX 3080"
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{re.escape(name)}\b{other_model}", device_name, re.IGNORECASE):
            return peak
    return None
