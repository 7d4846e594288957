"""runtime: options from a dataclass, devices, precision, exit statuses."""

from __future__ import annotations

import errno
import io
import os
import platform
import random
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import cli
from common import device as device_module
from common.cli import UserError, given_options, option, parse_options
from common.device import choose_device, choose_dtype, peak_flops

ROOT = Path(cli.__file__).parent.parent


@dataclass(frozen=True)
class Options:
    checkpoint: str | None = option(None, "the checkpoint", positional=True)
    nonstop: bool = option(False, "never stop")
    compile: bool = option(True, "compile the model")
    delay: bool | None = option(None, "wait between tokens")
    temp: float = option(0.8, "temperature", metavar="T")
    top_k: int | None = option(None, "keep the k likeliest tokens")
    dtype: str = option("auto", "precision", choices=("auto", "float32"))
    input: tuple[str, ...] = option((), "files", nargs="+")
    dropout: float = option(0.0, "share of activations dropped")
    internal: int = 7  # without help: no option

    def __post_init__(self):
        if self.temp < 0:
            raise ValueError(f"temp must be at least 0, not {self.temp}")


def parse(*argv: str) -> Options:
    return parse_options(Options, "Generate text.\n\nMore.", argv)


def test_options_have_the_fields_defaults():
    assert parse() == Options()


def test_options_are_parsed_as_their_types():
    options = parse("a.pt", "--nonstop", "--no-compile", "--temp", "0", "--top_k", "5", "--input", "b", "c")
    assert options == Options("a.pt", nonstop=True, compile=False, temp=0.0, top_k=5, input=("b", "c"))
    assert isinstance(options.temp, float) and isinstance(options.input, tuple)


def test_a_bool_has_both_ways_unless_it_is_off_by_default():
    assert parse("--compile").compile is True
    assert parse("--delay").delay is True and parse("--no-delay").delay is False
    with pytest.raises(SystemExit):
        parse("--no-nonstop")


@pytest.mark.parametrize(
    "argv",
    [
        ("--top_k", "five"),
        ("--top_k",),
        ("--dtype", "float8"),
        ("--temp", "-1"),
        ("--unknown",),
        ("--internal", "3"),
        ("--non",),  # no abbreviations: a new option must not change what an old command means
        ("a.pt", "b.pt"),
        ("--input",),
    ],
)
def test_wrong_options_are_a_usage_error(argv, capsys):
    with pytest.raises(SystemExit) as exit_status:
        parse(*argv)
    assert exit_status.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_sentence_of_post_init_reaches_the_user(capsys):
    with pytest.raises(SystemExit):
        parse("--temp", "-1")
    assert "temp must be at least 0, not -1.0" in capsys.readouterr().err


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as exit_status:
        parse("--help")
    text = capsys.readouterr().out
    assert exit_status.value.code == 0
    assert "Generate text." in text and "More." not in text
    for word in ("checkpoint", "--nonstop", "--no-compile", "--top_k", "--input", "(default: 0.8)", "(default: 0.0)"):
        assert word in text
    assert "internal" not in text and "(default: None)" not in text


def test_given_options_are_those_on_the_command_line_even_if_equal_to_the_default():
    assert given_options(Options, []) == {}
    argv = ["a.pt", "--temp", "0.8", "--no-compile", "--nonstop", "--top_k", "5"]
    expected = {"checkpoint": "a.pt", "temp": 0.8, "compile": False, "nonstop": True, "top_k": 5}
    assert given_options(Options, argv) == expected


def run_program(body: str, **settings) -> subprocess.CompletedProcess:
    imports = "import sys, os, signal\nfrom common.cli import *\nfrom common.device import *"
    program = f"{imports}\ndef main():\n    {body}\nrun_script(main)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, **settings)


@pytest.mark.parametrize(
    ("body", "status", "output", "error"),
    [
        ("print('done')", 0, "done\n", ""),
        ("return 3", 3, "", ""),
        ("raise UserError('a.bin not found; run: x')", 1, "", "error: a.bin not found; run: x\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "", "interrupted\n"),
        ("sys.exit(5)", 5, "", ""),
    ],
)
def test_a_script_ends_with_the_right_status(body, status, output, error):
    done = run_program(body)
    assert (done.returncode, done.stdout, done.stderr) == (status, output, error)


def test_a_bug_shows_its_traceback():
    done = run_program("return 1 // 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_a_reader_that_leaves_is_no_error():
    program = "from common.cli import *\nrun_script(lambda: [print('x' * 1000) for _ in range(10000)] and None)"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=20) == 141


def test_a_console_without_the_character_shows_a_question_mark():
    done = run_program("print('caf\\u00e9'); raise UserError('\\u4f60')", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (1, "caf?\n", "error: ?\n")


DEVICES = [
    {"index": 0, "name": "NVIDIA A100", "free_gib": 10.0, "total_gib": 40.0},
    {"index": 1, "name": "NVIDIA H100", "free_gib": 70.0, "total_gib": 80.0},
    {"index": 2, "name": "NVIDIA T4", "free_gib": 15.0, "total_gib": 16.0},
]


def answers(*lines: str):
    """Stands in for `input`: one line a question, then end of input."""
    left = list(lines)

    def ask(question: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return ask


@pytest.fixture(autouse=True)
def current(monkeypatch) -> list[str]:
    """The CUDA devices that were made torch's current one."""
    import torch

    devices = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    return devices


def refuse(question: str) -> str:
    raise AssertionError(f"asked {question!r} without a terminal")


@pytest.mark.parametrize(
    ("lines", "device"),
    [
        (["0"], "cuda:0"),
        ([" 2 "], "cuda:2"),
        ([""], "cuda:1"),
        (["7", "-1", "two", "1.0", "\u00b2", "cuda:0", "2"], "cuda:2"),
        (["99999999999999999999", ""], "cuda:1"),
        ([], "cuda:1"),
    ],
)
def test_the_person_chooses_among_cuda_devices(lines, device, capsys, current):
    assert choose_device(None, DEVICES, answers(*lines)) == device
    output = capsys.readouterr().out
    for listed in DEVICES:
        assert (
            f"{listed['index']}: {listed['name']}, {listed['free_gib']:.1f} of {listed['total_gib']:.1f} GiB" in output
        )
    assert output.count("is not one of 0 to 2") == max(0, len(lines) - 1)
    assert current == [device]


def test_without_a_terminal_nobody_is_asked(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(device_module, "is_terminal", lambda: False)
    assert choose_device(None, DEVICES) == "cuda:1"
    assert choose_device("auto", DEVICES) == "cuda:1"
    assert "cuda:1 (NVIDIA H100)" in capsys.readouterr().out


def test_on_a_terminal_the_person_is_asked(monkeypatch):
    monkeypatch.setattr("builtins.input", answers("2"))
    monkeypatch.setattr(device_module, "is_terminal", lambda: True)
    assert choose_device(None, DEVICES) == "cuda:2"


def test_without_cuda_it_says_what_it_took(monkeypatch, capsys):
    import torch

    for has_mps, device in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda has_mps=has_mps: has_mps)
        assert choose_device(None, [], refuse) == device
        assert f"device: {device}" in capsys.readouterr().out


def test_a_requested_device_is_taken_without_a_question(current):
    assert choose_device("cpu", DEVICES, refuse) == "cpu"
    assert choose_device("cuda", DEVICES, refuse) == "cuda:0"
    assert choose_device("cuda:2", DEVICES, refuse) == "cuda:2"
    assert current == ["cuda:0", "cuda:2"]


def test_a_requested_device_takes_no_memory_on_the_others(monkeypatch, current):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    assert choose_device("cuda:1") == "cuda:1" and current == ["cuda:1"]
    with pytest.raises(UserError, match="there are 2 CUDA devices; use cuda:0 to cuda:1"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    ("requested", "devices"),
    [
        ("cuda", []),
        ("cuda:0", []),
        ("cuda:3", DEVICES),
        ("cuda:-1", DEVICES),
        ("cuda:\u00b2", DEVICES),
        ("cuda:x", DEVICES),
        ("tpu", DEVICES),
        ("CPU", []),
        ("", []),
    ],
)
def test_a_device_that_is_not_there_is_named(requested, devices):
    with pytest.raises(UserError, match="--device") as error:
        choose_device(requested, devices, refuse)
    assert requested in str(error.value)


def test_a_missing_mps_device_is_named(monkeypatch):
    import torch

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu"):
        choose_device("mps", [])


@pytest.mark.parametrize(
    ("requested", "device", "fast", "dtype"),
    [
        (None, "cuda:0", True, "bfloat16"),
        (None, "cuda:0", False, "float16"),
        (None, "cpu", True, "bfloat16"),
        (None, "cpu", False, "float32"),
        ("auto", "mps", False, "float32"),
        ("float32", "cuda:0", True, "float32"),
        ("float16", "cuda:0", False, "float16"),
    ],
)
def test_the_precision_is_what_the_device_really_does(monkeypatch, capsys, requested, device, fast, dtype):
    monkeypatch.setattr(device_module, "has_fast_bfloat16", lambda device: fast)
    assert choose_dtype(requested, device) == dtype
    assert capsys.readouterr().out == ""


def test_a_slow_precision_is_used_and_said(monkeypatch, capsys):
    assert choose_dtype("float16", "cpu") == "float16"
    assert "float16 are slow on most CPUs; --dtype float32 or bfloat16" in capsys.readouterr().out


def test_an_emulated_bfloat16_is_allowed_and_said(monkeypatch, capsys):
    monkeypatch.setattr(device_module, "has_fast_bfloat16", lambda device: False)
    assert choose_dtype("bfloat16", "cpu") == "bfloat16"
    assert "emulates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("nvidia geforce rtx 4090", 165.2),
        ("NVIDIA L4", 121),
        # Other cards whose names contain a known one.
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_the_peak_belongs_to_the_very_device(name, teraflops):
    assert peak_flops(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other means")
def test_freed_memory_is_kept_until_its_gaps_are_given_back_but_not_the_addresses():
    body = """import torch
    from fast.allocator import give_back_freed_memory, keep_freed_memory
    def held_mib(what):
        return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) // 1024
    keep_freed_memory()
    before, addresses = held_mib("VmRSS"), held_mib("VmData")
    tensor, behind = torch.ones(256, 2**18), torch.ones(2**10)  # 256 MiB, and what makes them a gap when they are freed
    del tensor
    print(held_mib("VmRSS") - before > 250)
    give_back_freed_memory()
    print(held_mib("VmRSS") - before < 20)
    print(held_mib("VmData") - addresses > -20)  # half the machine's memory, if the end were cut off"""
    assert run_program(body).stdout.split() == ["True", "True", "True"]


def test_a_seed_fixes_every_generator():
    import numpy as np
    import torch

    def draw(seed: int) -> tuple:
        device_module.seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = draw(1337)
    assert draw(1337) == first
    assert all(a != b for a, b in zip(draw(1338), first, strict=True))
    draw(2**40)  # larger than NumPy's seeds


def test_colour_is_for_terminals_and_no_color_wins(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert not cli.shows_colour()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.shows_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not cli.shows_colour()
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert not cli.shows_colour()
    monkeypatch.delenv("NO_COLOR")
    assert cli.shows_colour()


# Output that is not taken


class Refusing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_output_that_a_full_disk_refuses_is_left_out_where_nobody_needs_it_and_that_is_said_once(capsys):
    stream = cli.StandardOutput(Refusing(FULL), is_needed=False)
    for _ in range(2):
        print("a line", file=stream, flush=True)
    assert capsys.readouterr().err == "warning: standard output not written: No space left on device; going on\n"
    with pytest.raises(UserError, match="standard output not written: No space left on device"):
        print("a line", file=cli.StandardOutput(Refusing(FULL), is_needed=True))
    with pytest.raises(BrokenPipeError):
        print("a line", file=cli.StandardOutput(Refusing(BrokenPipeError()), is_needed=False))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("target", "needs_output", "status", "sentence"),
    [
        (">/dev/full", True, 1, "error: standard output not written: No space left on device"),
        (">/dev/full", False, 3, "warning: standard output not written: No space left on device; going on"),
        (">&-", True, 3, ""),
    ],
)
def test_a_script_whose_output_cannot_be_written(target, needs_output, status, sentence, unbuffered):
    program = f"from common import cli; cli.run_script(lambda: print('text') or 3, needs_output={needs_output})"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {target}"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == status
    assert sentence in done.stderr and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_full_disk_elsewhere_is_no_fault_of_the_output():
    def main():
        raise FULL

    with pytest.raises(OSError, match="No space left"):
        cli.run_script(main)
