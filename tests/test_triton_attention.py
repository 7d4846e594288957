"""The Triton kernel for attention in decode steps, in Triton's interpreter and through its compiler (no GPU needed)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import fast.generation
from tests.tiny_gpt import generating_gpt

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")


def run_checks(what):
    """What tests/triton_checks.py reports."""
    command = [sys.executable, "-m", "tests.triton_checks", what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_the_kernel_computes_attention_and_its_self_check_finds_planted_faults():
    found = run_checks("numbers")
    assert len(found["checks"]) >= 14
    assert {name: error for name, error in found["checks"].items() if error} == {}
    assert len(found["faults"]) >= 8
    errors = [error or "" for error in found["faults"].values()]
    assert all("results differ" in error or "into the cache" in error for error in errors), found["faults"]


@needs_triton
def test_the_kernel_compiles_for_gpus_from_turing_to_hopper():
    found = run_checks("compilation")
    assert len(found) >= 4
    assert {name: error for name, error in found.items() if error} == {}


def test_without_triton_attention_is_torchs(capsys):
    gpt = generating_gpt()
    with mock.patch.dict(sys.modules, {"fast.triton_attention": None}):
        assert not fast.generation._use_triton_attention(gpt)
    assert capsys.readouterr().out == "" and type(gpt.h[0].attn).__name__ == "Attention"
