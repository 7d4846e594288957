"""Signals, errors and kills: a run stops between two steps, and what it has done is not lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from common.cli import UserError
from tests.tiny import OPTIONS, fail, failing_at, in_step, load_checkpoint, run, same_as
from training.signals import StopSignal

ROOT = Path(train.__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")


# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_saves(data, tmp_path, straight, number, status):
    def interrupt(gpt, output):
        for _ in range(2 if number == signal.SIGTERM else 1):  # `timeout` sends it twice
            os.kill(os.getpid(), number)

    folder = tmp_path / "text10"
    before = signal.getsignal(number)
    with in_step(3, interrupt):
        assert run(data, folder) == status
    assert signal.getsignal(number) is before
    assert load_checkpoint(folder / "text10.pt")["info"]["iter_num"] == 3
    assert run(data, folder, resume=True) == 0
    assert same_as(folder, straight) == []


def test_a_terminal_that_closes_stops_the_run_unless_nohup_started_it():
    for handler, noted in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == noted and signal.getsignal(signal.SIGHUP) == handler
        finally:
            signal.signal(signal.SIGHUP, before)


def spawn(program: str, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(["-c", program] if program else []), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_second_ctrl_c_exits_at_once_and_the_lock_holds_until_then(data, tmp_path):
    program = (
        "import sys, time, train\n"
        "from common import cli\n"
        "from tests.tiny import in_step\n"
        "def slow(gpt, output):\n"
        "    print('in the step', flush=True)\n"
        "    time.sleep(60)\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        "with in_step(6, slow):\n"
        "    cli.run_script(train.main)\n"
    )
    options = {**OPTIONS, "dataset": "text", "data_dir": data, "out_dir": tmp_path}
    del options["compile"]
    process = spawn(program, "--no-compile", *(word for key, value in options.items() for word in (f"--{key}", value)))
    for line in process.stdout:
        if "in the step" in line:
            break
    with pytest.raises(UserError, match=f"text10.pt is in use by another run .process {process.pid}"):
        run(data, tmp_path, resume=True)
    start = time.perf_counter()
    process.send_signal(signal.SIGINT)
    assert "stopping after this iteration" in process.stdout.readline() + process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert time.perf_counter() - start < 30, "the step would have taken 60 s"
    assert load_checkpoint(tmp_path / "text10.pt")["info"]["iter_num"] == 4
    process.stdout.close()
    assert run(data, tmp_path, resume=True) == 0, "the dead process holds no lock"


# Errors


def test_an_error_in_a_step_saves_the_state_before_it(data, tmp_path, straight, capsys):
    folder = tmp_path / "text10"
    with in_step(7, fail(ZeroDivisionError("a bug"))), pytest.raises(ZeroDivisionError, match="a bug"):
        run(data, folder)
    assert "saved iteration 6, the last complete one" in capsys.readouterr().out
    assert load_checkpoint(folder / "text10.pt")["info"]["iter_num"] == 6
    assert run(data, folder, resume=True) == 0
    assert same_as(folder, straight) == []


@pytest.mark.parametrize("where", ["evaluation", "sample", "save"])
@pytest.mark.parametrize("iter_num", [4, 10])
def test_an_error_between_step_and_save_loses_neither(data, tmp_path, monkeypatch, straight, where, iter_num):
    folder, settings = tmp_path / "text10", {}
    number = {4: 2, 10: 4}[iter_num]  # of the evaluation at that iteration
    with monkeypatch.context() as patch:
        if where == "sample":  # there is none at iteration 0
            settings["sample"] = failing_at(number - 1, lambda *arguments: None)
        elif where == "save":
            patch.setattr(torch, "save", failing_at(number, torch.save))
        else:
            settings["adjust"] = lambda training: fail_evaluation(training, number)
        with pytest.raises(RuntimeError, match="a bug"):
            run(data, folder, **settings)
    assert load_checkpoint(folder / "text10.pt")["info"]["iter_num"] == iter_num
    assert run(data, folder, resume=True) == 0
    assert same_as(folder, straight) == []


def fail_evaluation(training: train.Training, number: int) -> None:
    """Let the given evaluation fail on its second batch."""

    class Failing(list):
        evaluations = 0

        def __getitem__(self, index):
            Failing.evaluations += index == 1
            if Failing.evaluations == number:
                Failing.evaluations += 1
                raise RuntimeError("a bug")
            return super().__getitem__(index)

    training.val_batches["text"] = Failing(training.val_batches["text"])


def test_half_a_step_is_never_saved(data, tmp_path, straight, capsys):
    folder = tmp_path / "text10"

    def break_adamw(training):  # after Muon has changed its part of the weights
        adamw = training.optimizers[-1]
        calls = []
        # The first step, without gradients, allocates the states.
        adamw.register_step_pre_hook(lambda *arguments: calls.append(1) or (1 / 0 if len(calls) == 6 else None))

    with pytest.raises(ZeroDivisionError):
        run(data, folder, adjust=break_adamw)
    assert "is unchanged" in capsys.readouterr().out
    assert load_checkpoint(folder / "text10.pt")["info"]["iter_num"] == 4
    assert run(data, folder, resume=True) == 0
    assert same_as(folder, straight) == []


# Kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the crash test forks processes")
def test_ten_kills_change_nothing(tmp_path):
    tool = ROOT / "testing_tools" / "crash_test.py"
    process = spawn("", tool, "--kills", 10, "--max_iters", 20, "--seed", 5, "--json", tmp_path / "counts.json")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["kills"] == 10 and counts["identical"] and counts["unreadable"] == []
    assert counts["kills_inside_saves"] >= 2 and counts["resumes"] >= 2
    assert "10 kills" in output
