"""Numbers that are not finite, float16's overflows, and too little memory: what is saved and what the user is told."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from common.cli import UserError
from tests.fake_job import fake_job
from tests.tiny import fail, in_step, load_checkpoint, losses, run, same_as

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")


def nan_loss(gpt, output):
    """The step's loss becomes NaN."""
    return None, output[1] * float("nan")


def gradient(value: float):
    """An action: the step's gradient norm becomes `value`."""

    def action(gpt, output):
        handle = gpt.ln_f.weight.register_hook(lambda grad: handle.remove() or torch.full_like(grad, value))

    return action


def read_rarely(training) -> None:
    """Read what the steps measured no more often than on CUDA."""
    training.measurements.every_step = False


@pytest.mark.parametrize("adjust", [lambda training: None, read_rarely], ids=["each-step", "when-needed"])
@pytest.mark.parametrize(
    ("broken", "what"), [(nan_loss, "the loss is nan"), (gradient(float("inf")), "the gradient norm is inf")]
)
def test_a_number_that_is_not_finite_stops_and_leaves_the_last_checkpoint(data, tmp_path, broken, what, adjust):
    with in_step(7, broken), pytest.raises(UserError) as stop:
        run(data, tmp_path, adjust=adjust, log_interval=3 if adjust is read_rarely else 1)
    sentence = str(stop.value)
    last = losses(tmp_path / "text10.jsonl")[-1]
    assert last[0] == 6 and f"last finite loss {last[1]:.4f}" in sentence
    assert what in sentence
    assert re.search(r"in iteration 7 at learning rate \d\.\d\de-0\d", sentence)
    assert f"last good state, iteration 4, with: python train.py --resume {tmp_path / 'text10.pt'}" in sentence
    assert "--learning_rate 0.0015 --muon_learning_rate 0.01" in sentence
    saved = load_checkpoint(tmp_path / "text10.pt")
    assert saved["info"]["iter_num"] == 4
    assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_the_device_is_waited_for_when_a_line_an_evaluation_or_a_save_needs_it(data, tmp_path, straight):
    read = []

    def note_reads(training):
        read_rarely(training)
        measurements = training.measurements
        real = measurements.read
        measurements.read = lambda: read.append(measurements.pending[-1][0]) or real()

    folder = tmp_path / "text10"
    assert run(data, folder, stop_after=7, adjust=note_reads, log_interval=5) == 130
    assert run(data, folder, resume=True, adjust=note_reads, log_interval=1) == 0
    assert read == [1, 4, 5, 7, 8, 9, 10]
    assert same_as(folder, straight) == ["text10.jsonl"], "which has fewer lines"


@pytest.mark.parametrize("ends", ["stopped", "interrupted"])
def test_a_run_that_ends_saves_nothing_it_has_not_read(data, tmp_path, ends):
    stop_after, interrupted = (7, None) if ends == "stopped" else (None, fail(KeyboardInterrupt()))
    with (
        in_step(6, nan_loss),
        in_step(8 if interrupted else 99, interrupted),
        pytest.raises(UserError, match="the loss is nan in iteration 6"),
    ):
        run(data, tmp_path, stop_after=stop_after, adjust=read_rarely, log_interval=20, eval_interval=5)
    assert load_checkpoint(tmp_path / "text10.pt")["info"]["iter_num"] == 5


def test_a_rate_that_destroys_the_model_leaves_the_last_good_checkpoint(data, tmp_path):
    with pytest.raises(UserError, match=r"is (nan|inf) in iteration \d+ at learning rate"):
        run(data, tmp_path, learning_rate=1e30, muon_learning_rate=1e30, optimizer="adamw", warmup_iters=1)
    saved = load_checkpoint(tmp_path / "text10.pt")
    assert all(weight.isfinite().all() for weight in saved["model"].values())
    assert np.isfinite(saved["info"]["val_loss"])


# float16


def test_the_skips_of_float16_are_counted_and_shown(data, tmp_path, capsys):
    weights = []

    def note(gpt, output):
        weights.append([weight.detach().clone() for weight in gpt.parameters()])

    overflow = gradient(float("inf"))
    with in_step(3, overflow), in_step(4, overflow), in_step(3, note), in_step(4, note), in_step(5, note):
        assert run(data, tmp_path, dtype="float16") == 0
    assert len(weights) == 3
    for before, after in itertools.pairwise(weights):
        assert all(map(torch.equal, before, after)), "no optimizer steps if one of them would be skipped"
    saved = load_checkpoint(tmp_path / "text10.pt")
    assert saved["info"]["skipped_steps"] == 2
    assert saved["training"]["scaler"]["scale"] == 65536 / 4
    assert "2 skipped" in capsys.readouterr().out
    text = (tmp_path / "text10.jsonl").read_text()
    assert "Infinity" not in text and '"grad_norm": null' in text


def test_a_gradient_that_is_never_finite_ends_even_with_float16(data, tmp_path):
    with in_step(None, gradient(float("nan"))), pytest.raises(UserError, match="the gradient norm is nan in iteration"):
        run(data, tmp_path, dtype="float16", max_iters=40)


# Memory


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_names_a_setting_of_half_the_size(data, tmp_path, error):
    path = tmp_path / "text10.pt"
    with in_step(3, fail(error)), pytest.raises(UserError) as stop:
        run(data, tmp_path, batch_size=6)
    assert str(stop.value) == (
        f"out of memory with --batch_size 6; run again with --resume {path} --batch_size 3 "
        "--gradient_accumulation_steps 2, which needs less memory for the same tokens per iteration"
    )
    assert load_checkpoint(path)["info"]["iter_num"] == 2
    assert run(data, tmp_path, resume=path, batch_size=3, gradient_accumulation_steps=2) == 0


def test_memory_that_ran_out_is_not_a_lost_process(data, tmp_path):
    """NCCL's error says both."""
    error = RuntimeError("NCCL Error 1: unhandled cuda error, Cuda failure 2 'out of memory'")
    found = pytest.raises(UserError, match="out of memory with --batch_size 1; use a smaller")
    # Muon would receive the other process's updates, which a fake job leaves uninitialized.
    with fake_job(rank=0, size=2), in_step(1, fail(error)), found:
        run(data, tmp_path, optimizer="adamw")
