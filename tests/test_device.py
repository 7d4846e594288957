"""common/device.py: choosing a device and a precision, seeds, peak FLOP/s, cores."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from common import device as device_module
from common.cli import UserError
from common.device import choose_device, choose_dtype, n_cores, peak_flops

ROOT = Path(device_module.__file__).parent.parent

DEVICES = [
    {"index": 0, "name": "NVIDIA A100", "free_gib": 10.0, "total_gib": 40.0},
    {"index": 1, "name": "NVIDIA H100", "free_gib": 70.0, "total_gib": 80.0},
    {"index": 2, "name": "NVIDIA T4", "free_gib": 15.0, "total_gib": 16.0},
]


def answers(*lines: str):
    """A replacement for `input`: one line per question, then end of input."""
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


def test_without_cuda_the_chosen_device_is_printed(monkeypatch, capsys):
    import torch

    for has_mps, device in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda has_mps=has_mps: has_mps)
        assert choose_device(None, [], refuse) == device
        assert f"device: {device}" in capsys.readouterr().out


def test_a_requested_device_is_used_without_a_question(current):
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
def test_a_missing_device_is_named(requested, devices):
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


def test_a_slow_precision_is_used_with_a_warning(monkeypatch, capsys):
    assert choose_dtype("float16", "cpu") == "float16"
    assert "float16 is slow on most CPUs; --dtype float32 or bfloat16" in capsys.readouterr().out


def test_an_emulated_bfloat16_is_used_with_a_warning(monkeypatch, capsys):
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
def test_the_peak_is_of_exactly_this_device(name, teraflops):
    assert peak_flops(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA H100 80GB HBM3", 494.5), ("NVIDIA A100-SXM4-40GB", 156), ("Tesla T4", 8.1), ("", None)],
)
def test_float32_has_the_peak_of_tf32_where_there_is_one(name, teraflops):
    assert peak_flops(name, "float32") == (None if teraflops is None else pytest.approx(teraflops * 1e12))
    assert peak_flops(name, "float16") == peak_flops(name)


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [
        ("mps", None, "bfloat16"),
        ("cuda:0", (9, 0), "bfloat16"),
        ("cuda:0", (8, 0), "bfloat16"),
        ("cuda:0", (7, 5), "float16"),
        ("cuda:0", (6, 1), "float32"),
    ],
)
def test_muon_multiplies_in_what_the_tensor_cores_have(monkeypatch, device, capability, dtype):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device_module.tensor_core_dtype(device) == getattr(torch, dtype)


@pytest.mark.parametrize(("has_amx", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_muon_multiplies_in_float32_on_a_cpu_that_emulates_bfloat16(monkeypatch, has_amx, dtype):
    import torch

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert device_module.tensor_core_dtype("cpu") == getattr(torch, dtype)


def test_without_cudnns_attention_only_while_it_is_asked_for():
    import torch

    enabled = torch.backends.cuda.cudnn_sdp_enabled
    was_enabled = enabled()
    try:
        for before in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(before)
            with device_module.without_cudnn_attention():
                assert not enabled()
            assert enabled() is before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


@pytest.mark.parametrize("device", ["cuda:0", "mps", "cpu"])
def test_the_cache_of_the_device_that_was_tried_is_emptied(monkeypatch, device):
    import torch

    emptied = []
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "empty_cache", lambda kind=kind: emptied.append(kind))
    device_module.empty_cache(device)
    assert emptied == [kind for kind in ("cuda", "mps") if device.startswith(kind)]


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


def test_the_cores_are_those_that_this_process_may_use():
    assert 1 <= n_cores() <= os.cpu_count()
    if hasattr(os, "sched_setaffinity"):
        program = "import os; from common.device import n_cores; os.sched_setaffinity(0, {%d}); print(n_cores())"
        core = min(os.sched_getaffinity(0))
        done = subprocess.run([sys.executable, "-c", program % core], capture_output=True, text=True, cwd=ROOT)
        assert (done.stdout, done.stderr) == ("1\n", "")
