"""The CUDA and MPS paths on devices that exist in name only: no device mix-up, and nothing waits for the device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_devices import build_guard

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/fake_device_checks.py reports: {"checks": {name: error or None}, "faults": the same}."""
    library = build_guard(tmp_path_factory.mktemp("guard"))
    if isinstance(library, str):
        pytest.skip(library)
    command = [sys.executable, "-m", "tests.fake_device_checks", str(library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_steps_evaluation_and_decoding_run_on_fake_devices(found):
    assert len(found["checks"]) >= 20
    assert {name: error for name, error in found["checks"].items() if error} == {}


def test_planted_faults_are_found(found):
    assert len(found["faults"]) >= 12
    assert [fault for fault, error in found["faults"].items() if not error] == []
    words = ("FakeTensorDeviceMismatchError", "DataDependentOutputException", "float64 tensor on MPS")
    others = {fault: error for fault, error in found["faults"].items() if not any(word in error for word in words)}
    assert others == {}, "a fault is found because of devices, not because the changed source is wrong"
