"""Training: it resumes bit by bit, stops without losing work, and explains what goes wrong."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import inspect
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from training.start import make_model

import model
import train
from common import checkpoint
from common.cli import UserError, given_options, parse_options
from common.device import set_determinism
from tests.tiny import OPTIONS, StopAfter, differences, load_checkpoint, losses, prepare, run
from training import measurements, memory, optimizers, progress, start
from training import run as run_module
from training.optimizers import init_optimizer_states, make_optimizers
from training.parallel import World

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp("data"))
    return prepare(folder, "chat")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the crash test has the real one
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quiet(monkeypatch):
    """No curves and no samples, which take longer than the training here."""
    monkeypatch.setattr(run_module, "draw_curves", lambda *arguments: False)
    monkeypatch.setattr(train, "print_sample", lambda *arguments: None)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The folder of a run of ten iterations that nothing disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("straight") / "text10"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "draw_curves", lambda *arguments: False)
        patch.setattr(train, "print_sample", lambda *arguments: None)
        assert run(data, folder) == 0
    torch.set_num_threads(threads)
    folder.with_suffix(".txt").touch()
    return folder


def stop_after(monkeypatch, steps: int) -> None:
    monkeypatch.setattr(train, "StopSignal", lambda: StopAfter(steps))


def fail_at(monkeypatch, step: int, error: BaseException):
    """Let the given step, counted from here, raise."""
    real, count = train.forward_backward, [0]

    def forward_backward(*arguments):
        count[0] += 1
        if count[0] == step:
            raise error
        return real(*arguments)

    monkeypatch.setattr(train, "forward_backward", forward_backward)


def same_as(folder: Path, straight: Path) -> list[str]:
    folder.with_suffix(".txt").touch()
    return differences(folder, straight)


# 1. Bit-exact resume


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "text", "dropout": 0.2, "block_size": 45, "batch_size": 3},
        {"dataset": "chat", "dropout": 0.2, "optimizer": "adamw", "gradient_accumulation_steps": 2, "keep": 2},
        {"dataset": "text", "dtype": "float16"},
    ],
    ids=["text-muon-epochs", "chat-adamw", "float16"],
)
def test_a_run_stopped_after_every_iteration_equals_an_uninterrupted_one(data, tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(run_module, "draw_curves", lambda *arguments: False)
    name = f"{options['dataset']}10"
    straight, stopped = tmp_path / "a" / name, tmp_path / "b" / name
    assert run(data, straight, **options) == 0
    straight.with_suffix(".txt").write_text(capsys.readouterr().out)
    stop_after(monkeypatch, 1)
    assert run(data, stopped, **options) == 130
    for _ in range(9):
        assert run(data, stopped, resume=True, dataset=options["dataset"]) == 130
    assert run(data, stopped, resume=True, dataset=options["dataset"]) == 0
    output = capsys.readouterr().out
    stopped.with_suffix(".txt").write_text(output)
    assert "is complete: iteration 10 of 10" in output
    assert differences(stopped, straight) == []
    epoch = load_checkpoint(straight / f"{name}.pt")["training"]["position"]["epoch"]
    assert epoch >= (2 if options.get("block_size") == 45 else 0)
    assert output.count("sample:") == 3
    assert ("% of their places are no padding" in output) == (options["dataset"] == "chat")
    assert [row[0] for row in losses(stopped / f"{name}.jsonl")] == list(range(11))


def test_the_random_states_of_all_generators_are_restored(data, tmp_path, monkeypatch, quiet):
    import random

    drawn = []
    real = train.forward_backward

    def draw(*arguments):
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return real(*arguments)

    monkeypatch.setattr(train, "forward_backward", draw)
    run(data, tmp_path / "a")
    expected, drawn[:] = list(drawn), []
    stop_after(monkeypatch, 3)
    run(data, tmp_path / "b")
    monkeypatch.setattr(train, "StopSignal", lambda: StopAfter(99))
    run(data, tmp_path / "b", resume=True)
    assert drawn == expected


def test_a_run_does_not_touch_the_loaded_file(data, tmp_path, monkeypatch, quiet):
    stop_after(monkeypatch, 5)
    run(data, tmp_path)
    before = (tmp_path / "text10.pt").read_bytes()
    os.link(tmp_path / "text10.pt", tmp_path / "kept.pt")
    run(data, tmp_path, resume=True)
    assert (tmp_path / "kept.pt").read_bytes() == before


def test_accumulating_four_micro_batches_equals_one_of_all_rows(data, tmp_path, quiet):
    run(data, tmp_path / "a", batch_size=8)
    run(data, tmp_path / "b", batch_size=2, gradient_accumulation_steps=4, eval_iters=8)
    first, second = (np.array([row[1] for row in losses(tmp_path / x / "text10.jsonl")[1:]]) for x in "ab")
    np.testing.assert_allclose(first, second, rtol=1e-4)
    assert load_checkpoint(tmp_path / "b" / "text10.pt")["info"]["tokens_seen"] == 10 * 8 * 16


# 2. Resume's meaning


@pytest.fixture
def half(data, tmp_path, monkeypatch, quiet):
    """The folder of a run stopped at iteration 5 of 10."""
    folder = tmp_path / "text10"
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", lambda: StopAfter(5))
        assert run(data, folder) == 130
    return folder


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"n_layer": 3}, ["--n_layer 3", "2"]),
        ({"dropout": 0.5}, ["--dropout 0.5", "0.0"]),
        ({"seed": 7}, ["--seed 7", "1337"]),
        ({"preset": "gpt2"}, ["--preset gpt2", "small"]),
        ({"optimizer": "adamw"}, ["--optimizer adamw", "muon"]),
        ({"batch_size": 4}, ["4 x 1", "2 sequences"]),
        ({"loss_on": "assistant"}, ["--loss_on assistant", "all"]),
    ],
)
def test_an_option_that_contradicts_the_checkpoint_is_refused_with_both_values(data, half, changes, names):
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    with pytest.raises(UserError) as refusal:
        run(data, half, resume=True, **changes)
    for name in (*names, "text10.pt"):
        assert name in str(refusal.value)
    assert {path.name: path.read_bytes() for path in half.iterdir()} == before


def test_another_data_set_is_refused(data, half, tmp_path):
    with pytest.raises(UserError, match=r"--dataset chat contradicts .*text10.pt, which was made with text"):
        run(data, half, resume=half / "text10.pt", dataset="chat")


def test_data_that_changed_in_between_is_refused(half, tmp_path):
    changed = prepare(tmp_path / "other", n_tokens=610)
    with pytest.raises(UserError, match=r"text has changed since .*sha256 [0-9a-f]{12} instead of [0-9a-f]{12}"):
        run(changed, half, resume=True)


def test_another_tokenizer_is_refused(data, half):
    path = half / "text10.pt"
    saved = load_checkpoint(path)
    saved["info"]["tokenizer"]["name"] = "cl100k"
    checkpoint.save_checkpoint(path, checkpoint.build_model(path, saved), saved["info"], saved["training"])
    with pytest.raises(UserError, match="uses the tokenizer cl100k and the data gpt2_chatml"):
        run(data, half, resume=True)


def test_what_may_change_is_taken_and_said(data, half, capsys):
    changes = {"learning_rate": 1e-3, "eval_interval": 3, "muon_weight_decay": 0.3, "grad_clip": 0.5, "keep": 1}
    assert run(data, half, resume=True, **changes) == 0
    output = capsys.readouterr().out
    for line in ("learning_rate 0.003 -> 0.001", "eval_interval 4 -> 3", "muon_weight_decay 0.01 -> 0.3"):
        assert f"resume: {line}" in output
    config = load_checkpoint(half / "text10.pt")["info"]["config"]
    assert {key: config[key] for key in changes} == changes
    assert config["min_lr"] == 1e-4, "it was a tenth of the rate and stays so"
    rates = {row[0]: row[3] for row in losses(half / "text10.jsonl")}
    assert (rates[5], rates[6]) == (3e-3, 1e-3)
    assert [row[0] for row in losses(half / "text10.jsonl") if row[2] is not None] == [0, 4, 6, 9, 10]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rare_tokens_do_not_drift(optimizer):
    """A gradient far below that of one occurrence must not move an embedding as far as a real one does."""
    gpt = model.GPT(model.GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8))
    config = train.resolve(train.TrainConfig(optimizer=optimizer, device="cpu", weight_decay=0.0), "cpu", False)
    one_occurrence = 1 / config.tokens_per_iter
    made = make_optimizers(gpt, config)
    names = {id(weight) for each in made for group in each.param_groups for weight in group["params"]}
    assert names == {id(weight) for weight in gpt.parameters()}
    before = gpt.wte.weight.detach().clone()
    gradient = torch.zeros_like(before)
    gradient[7], gradient[8] = one_occurrence, 1e-5 * one_occurrence  # the second only becomes less likely
    for _ in range(20):
        gpt.wte.weight.grad = gradient.clone()
        made[-1].step()
    moved = (gpt.wte.weight.detach() - before).abs().mean(1)
    assert moved[8] < moved[7] / 100 and moved[9] == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_states_made_before_the_first_step_are_those_of_torch(optimizer):
    config = train.resolve(train.TrainConfig(optimizer=optimizer, device="cpu"), "cpu", False)
    found = []
    for is_early in (False, True):
        torch.manual_seed(0)
        gpt = model.GPT(model.GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8))
        both = make_optimizers(gpt, config)
        if is_early:
            groups = [group for each in both for group in each.param_groups]
            weights, rates = copy.deepcopy(gpt.state_dict()), [group["lr"] for group in groups]
            init_optimizer_states(both)
            torch.testing.assert_close(gpt.state_dict(), weights, rtol=0, atol=0)
            assert [group["lr"] for group in groups] == rates and all(rates)
            assert all(weight.grad is None for weight in gpt.parameters())
            made = [state for each in both for state in each.state_dict()["state"].values()]
            assert not any(value.any() for state in made for value in state.values())
        for weight in gpt.parameters():
            weight.grad = torch.randn_like(weight)
        for each in both:
            each.step()
        found.append((gpt.state_dict(), [each.state_dict()["state"] for each in both]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)  # the same weights and states after a step


@pytest.mark.parametrize(
    ("optimizer", "decay", "expected"),
    [("adamw", "weight_decay", [0.3, 0.3, 0.0]), ("muon", "muon_weight_decay", [0.3, 0.0, 0.0])],
)
def test_the_optimizers_take_the_new_weight_decay(data, tmp_path, monkeypatch, quiet, optimizer, decay, expected):
    stop_after(monkeypatch, 5)
    run(data, tmp_path, optimizer=optimizer)
    seen = []
    real = optimizers.set_rates
    monkeypatch.setattr(train, "set_rates", lambda *arguments: seen.append(arguments[0]) or real(*arguments))
    run(data, tmp_path, resume=True, **{decay: 0.3})
    groups = [group for each in seen[0] for group in each.param_groups]
    assert [group["weight_decay"] for group in groups] == expected
    assert all(state["exp_avg"].any() for state in seen[0][-1].state.values())


def test_targets_that_text_cannot_have_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="--loss_on assistant: text is text, which has no assistant"):
        run(data, tmp_path, loss_on="assistant")
    assert not list(tmp_path.iterdir())


def test_a_weight_decay_that_decays_nothing_is_refused(data, half, tmp_path):
    for arguments in ({"out_dir": str(tmp_path)}, {"out_dir": str(half), "resume": ""}):
        given = {**OPTIONS, "data_dir": str(data), "weight_decay": 0.2, **arguments}
        with pytest.raises(UserError, match="--weight_decay is for --optimizer adamw; with muon use --muon_weight_"):
            train.train(train.TrainConfig(**given), given)


def test_another_split_into_micro_batches_goes_on_alike(data, half, straight):
    assert run(data, half, resume=True, batch_size=1, gradient_accumulation_steps=2) == 0
    ours, theirs = (losses(folder / "text10.jsonl") for folder in (half, straight))
    np.testing.assert_allclose([row[1] for row in ours[1:]], [row[1] for row in theirs[1:]], rtol=1e-5)
    values = [[row[2] for row in rows if row[2]] for rows in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=1e-5)  # the same validation rows, too


def test_a_complete_run_says_so(data, straight, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    assert run(data, straight, resume=True) == 0
    assert "is complete: iteration 10 of 10; go on with a larger --max_iters" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in straight.iterdir()} == before


def test_more_iterations_go_on_under_the_new_name(data, tmp_path, quiet, capsys):
    run(data, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(data, tmp_path, resume=tmp_path / "text10.pt", max_iters=13) == 0
    assert "resume: max_iters 10 -> 13" in capsys.readouterr().out
    assert {name: (tmp_path / name).read_bytes() for name in before} == before, "the finished run stays"
    old, new = (losses(tmp_path / f"text{n}.jsonl") for n in (10, 13))
    assert new[: len(old)] == old
    assert [row[0] for row in new] == list(range(14))
    best = load_checkpoint(tmp_path / "text13-best.pt")["info"]
    assert best["val_loss"] == min(row[2] for row in new if row[2] is not None)
    assert run(data, tmp_path, resume=True, max_iters=13) == 0
    assert "is complete: iteration 13" in capsys.readouterr().out


def test_fewer_iterations_than_made_are_complete(data, half, capsys):
    assert run(data, half, resume=half / "text10.pt", max_iters=3) == 0
    assert "is complete: iteration 5 of 3" in capsys.readouterr().out


def test_a_missing_checkpoint_names_those_that_are_there(data, half):
    with pytest.raises(UserError, match=r"text99.pt not found; there are .*text10.pt"):
        run(data, half, resume=True, max_iters=99)


def test_going_back_to_the_best_keeps_the_later_state(data, tmp_path, monkeypatch, quiet, capsys):
    stop_after(monkeypatch, 6)
    run(data, tmp_path)
    best = load_checkpoint(tmp_path / "text10-best.pt")["info"]["iter_num"]
    assert best < 6
    stop_after(monkeypatch, 1)
    assert run(data, tmp_path, resume=tmp_path / "text10-best.pt") == 130
    assert "kept as" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "text10-previous.pt")["info"]["iter_num"] == 6
    assert [row[0] for row in losses(tmp_path / "text10.jsonl")] == list(range(best + 2))
    assert [row[0] for row in losses(tmp_path / "text10-previous.jsonl")] == list(range(7))
    assert load_checkpoint(tmp_path / "text10-best.pt")["info"]["iter_num"] == best


def test_a_new_run_keeps_the_files_of_an_older_one(data, half, monkeypatch):
    older = {path.name: path.read_bytes() for path in half.iterdir() if path.suffix in (".pt", ".jsonl")}
    stop_after(monkeypatch, 2)
    for _ in range(2):
        run(data, half, seed=2)
    for name, content in older.items():
        assert (half / name.replace("text10", "text10-previous")).read_bytes() == content
    assert load_checkpoint(half / "text10-previous2.pt")["info"]["iter_num"] == 2
    monkeypatch.setattr(train, "StopSignal", lambda: StopAfter(99))
    assert run(data, half, resume=half / "text10-previous.pt") == 0
    assert [row[0] for row in losses(half / "text10.jsonl")] == list(range(11))


def test_a_new_run_keeps_the_kept_checkpoints_of_an_older_one(data, tmp_path, monkeypatch, quiet):
    run(data, tmp_path, keep=9, eval_interval=3)
    older = {path.name: path.read_bytes() for path in tmp_path.glob("text10-iter*.pt")}
    assert len(older) == 5
    run(data, tmp_path, seed=2, keep=1)
    for name, content in older.items():
        assert (tmp_path / name.replace("text10", "text10-previous")).read_bytes() == content
    assert [path.name for path in tmp_path.glob("text10-iter*.pt")] == ["text10-iter00000010.pt"]


def test_other_validation_rows_begin_the_best_loss_anew(data, half, capsys):
    path = half / "text10.pt"
    saved = load_checkpoint(path)
    saved["info"]["best_val_loss"] = 0.1  # as other rows might have it
    checkpoint.save_checkpoint(path, checkpoint.build_model(path, saved), saved["info"], saved["training"])
    assert run(data, half, resume=True, eval_iters=1) == 0
    assert "resume: the validation rows are others, so the best loss begins anew" in capsys.readouterr().out
    info = load_checkpoint(path)["info"]
    assert info["best_val_loss"] == load_checkpoint(half / "text10-best.pt")["info"]["val_loss"] > 0.1


def test_a_best_checkpoint_that_cannot_be_written_does_not_end_the_run(data, tmp_path, capsys):
    (tmp_path / "text10-best.pt").mkdir()
    assert run(data, tmp_path) == 0
    assert "done: " in (said := capsys.readouterr().out) and "no best one kept" in said


def test_a_terminal_that_closes_stops_the_run_unless_nohup_started_it():
    for handler, noted in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with run_module.StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == noted and signal.getsignal(signal.SIGHUP) == handler
        finally:
            signal.signal(signal.SIGHUP, before)


def test_a_step_that_cannot_fit_into_the_cpus_memory_is_refused_and_a_large_one_warned_of(
    data, tmp_path, monkeypatch, quiet, capsys
):
    shape = model.GPTConfig(**{name: OPTIONS[name] for name in ("n_layer", "n_head", "n_embd", "block_size")})
    most = memory.step_bytes(shape, 2)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: most // 3)
    with pytest.raises(UserError, match="out of memory with --batch_size 2; run again with --batch_size 1"):
        run(data, tmp_path)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: most - 1)
    assert run(data, tmp_path) == 0
    assert "warning: a step with --batch_size 2 may need" in capsys.readouterr().out


def test_weights_alone_cannot_be_resumed(data, tmp_path):
    gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    checkpoint.save_checkpoint(tmp_path / "text10.pt", gpt, {"iter_num": 3})
    with pytest.raises(UserError, match=r"holds weights alone, .*--init_from"):
        run(data, tmp_path, resume=True)


def test_init_from_takes_the_weights_and_the_shape_and_nothing_else(data, half, tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 0)
    source = str(half / "text10.pt")
    defaults = {
        key: value for key, value in OPTIONS.items() if key not in ("n_layer", "n_head", "n_embd", "block_size")
    }
    given = {**defaults, "dataset": "chat", "data_dir": str(data), "out_dir": str(tmp_path), "init_from": source}
    assert train.train(train.TrainConfig(**given), given) == 130
    ours, theirs = load_checkpoint(tmp_path / "chat10.pt"), load_checkpoint(half / "text10.pt")
    assert all(torch.equal(weight, theirs["model"][name]) for name, weight in ours["model"].items())
    assert ours["info"]["iter_num"] == ours["info"]["tokens_seen"] == 0
    states = [state for each in ours["training"]["optimizers"] for state in each["state"].values()]
    assert states and not any(value.any() for state in states for value in state.values())  # all as at the start
    for name, value in (("n_embd", 16), ("preset", "gpt2"), ("block_size", 2 * OPTIONS["block_size"])):
        with pytest.raises(UserError, match=f"--{name} {value} contradicts .*text10.pt"):
            train.train(train.TrainConfig(**given, **{name: value}), {**given, name: value})
    with pytest.raises(ValueError, match="exclude each other"):
        train.TrainConfig(resume="", init_from=source)


def test_init_from_with_a_shorter_block_takes_the_first_positions(data, half, tmp_path, monkeypatch):
    stop_after(monkeypatch, 0)
    half_block = OPTIONS["block_size"] // 2
    given = {**OPTIONS, "data_dir": str(data), "out_dir": str(tmp_path), "init_from": str(half / "text10.pt")}
    given["block_size"] = half_block
    assert train.train(train.TrainConfig(**given), given) == 130
    ours, theirs = load_checkpoint(tmp_path / "text10.pt"), load_checkpoint(half / "text10.pt")
    assert ours["info"]["model"]["block_size"] == half_block
    assert torch.equal(ours["model"]["wpe.weight"], theirs["model"]["wpe.weight"][:half_block])
    assert torch.equal(ours["model"]["wte.weight"], theirs["model"]["wte.weight"])


def test_a_checkpoint_that_another_run_went_on_with_meanwhile_is_refused(data, half, monkeypatch):
    real = train.load_resumable

    def load_slowly(path):
        saved = real(path)
        monkeypatch.setattr(train, "load_resumable", real)
        assert run(data, half, resume=True) == 0
        return saved

    monkeypatch.setattr(train, "load_resumable", load_slowly)
    with pytest.raises(UserError, match=r"text10.pt was changed by another run meanwhile"):
        run(data, half, resume=True)
    assert load_checkpoint(half / "text10.pt")["info"]["iter_num"] == 10


# 3. Stopping


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_saves(data, tmp_path, monkeypatch, quiet, straight, number, status):
    real, count = train.forward_backward, [0]

    def interrupted(*arguments):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), number)
            if number == signal.SIGTERM:  # `timeout` sends it twice
                os.kill(os.getpid(), number)
        return real(*arguments)

    folder = tmp_path / "text10"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(train, "forward_backward", interrupted)
        assert run(data, folder) == status
    assert signal.getsignal(number) is before
    assert load_checkpoint(folder / "text10.pt")["info"]["iter_num"] == 3
    assert run(data, folder, resume=True) == 0
    assert same_as(folder, straight) == []


def spawn(program: str, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(["-c", program] if program else []), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_second_ctrl_c_leaves_at_once_and_the_lock_holds_until_then(data, tmp_path):
    program = (
        "import sys, time, train\nfrom common import cli\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        "real, count = train.forward_backward, [0]\n"
        "def slow(*arguments):\n"
        "    count[0] += 1\n"
        "    if count[0] == 6:\n"
        "        print('in the step', flush=True)\n"
        "        time.sleep(60)\n"
        "    return real(*arguments)\n"
        "train.forward_backward = slow\n"
        "cli.run_script(train.main)\n"
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
    assert time.perf_counter() - start < 30, "the step in hand would have taken 60 s"
    assert load_checkpoint(tmp_path / "text10.pt")["info"]["iter_num"] == 4
    process.stdout.close()
    assert run(data, tmp_path, resume=True) == 0, "the dead process holds no lock"


def test_an_error_in_a_step_saves_the_state_before_it(data, tmp_path, monkeypatch, quiet, straight, capsys):
    folder = tmp_path / "text10"
    with monkeypatch.context() as patch:
        fail_at(patch, 7, ZeroDivisionError("a bug"))
        with pytest.raises(ZeroDivisionError, match="a bug"):
            run(data, folder)
    assert "saved iteration 6, the last complete one" in capsys.readouterr().out
    assert load_checkpoint(folder / "text10.pt")["info"]["iter_num"] == 6
    assert run(data, folder, resume=True) == 0
    assert same_as(folder, straight) == []


@pytest.mark.parametrize("where", ["evaluate", "print_sample", "finish_evaluation", "save_checkpoint"])
@pytest.mark.parametrize("iter_num", [4, 10])
def test_an_error_between_step_and_save_loses_neither(data, tmp_path, monkeypatch, quiet, straight, where, iter_num):
    folder = tmp_path / "text10"
    place = {"finish_evaluation": run_module.Run, "save_checkpoint": run_module}.get(where, train)
    real, calls = getattr(place, where), [0]
    fatal = {"print_sample": {4: 1, 10: 3}}.get(where, {4: 2, 10: 4})[iter_num]  # no sample at iteration 0

    def failing(*arguments):
        calls[0] += 1
        if calls[0] == fatal:
            raise RuntimeError("a bug")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, where, failing)
        with pytest.raises(RuntimeError, match="a bug"):
            run(data, folder)
    assert load_checkpoint(folder / "text10.pt")["info"]["iter_num"] == iter_num
    assert run(data, folder, resume=True) == 0
    assert same_as(folder, straight) == []


def test_half_a_step_is_never_saved(data, tmp_path, monkeypatch, quiet, straight, capsys):
    folder = tmp_path / "text10"
    real, calls = torch.optim.AdamW.step, [0]

    def failing(self, *arguments):
        calls[0] += 1
        if calls[0] == 6:  # after Muon has changed its part of the weights
            raise RuntimeError("a bug")
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", failing)
        with pytest.raises(RuntimeError, match="a bug"):
            run(data, folder)
    assert "stays as it was" in capsys.readouterr().out
    assert load_checkpoint(folder / "text10.pt")["info"]["iter_num"] == 4
    assert run(data, folder, resume=True) == 0
    assert same_as(folder, straight) == []


# 4. Atomic


def test_a_full_disk_at_a_periodic_save_lets_training_go_on(data, tmp_path, monkeypatch, quiet, straight, capsys):
    folder = tmp_path / "text10"
    resource = pytest.importorskip("resource", reason="POSIX limits")
    real, calls = run_module.save_checkpoint, [0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(path, *arguments):
        calls[0] += 1
        if calls[0] != 2:
            return real(path, *arguments)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            real(path, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    monkeypatch.setattr(run_module, "save_checkpoint", on_a_full_disk)
    assert run(data, folder) == 0
    output = capsys.readouterr().out
    assert re.search(r"warning: .*text10-best.pt not written: File too large; .*training goes on", output)
    assert calls[0] == 4
    assert same_as(folder, straight) == []


def test_no_room_for_the_best_file_keeps_the_older_best(data, tmp_path, monkeypatch, quiet):
    real = run_module.save_checkpoint

    def on_a_full_disk(path, gpt, info, *more):
        if info["iter_num"] == 10:
            raise UserError("the disk is full")
        real(path, gpt, info, *more)

    monkeypatch.setattr(run_module, "save_checkpoint", on_a_full_disk)
    with pytest.raises(UserError, match="the disk is full"):  # at the end there is nothing to go on with
        run(data, tmp_path)
    saved, best = (load_checkpoint(tmp_path / name)["info"] for name in ("text10.pt", "text10-best.pt"))
    assert saved["iter_num"] == best["iter_num"] == 8
    assert saved["best_val_loss"] == best["val_loss"]


def test_metrics_wait_for_room_on_a_full_disk(data, tmp_path, monkeypatch, quiet, straight, capsys):
    from training.metrics import MetricsLog

    real, calls = MetricsLog._flush, [0]

    def full(self):
        calls[0] += 1
        if 2 <= calls[0] <= 4:
            raise OSError(errno.ENOSPC, "no space")
        real(self)

    monkeypatch.setattr(MetricsLog, "_flush", full)
    folder = tmp_path / "text10"
    assert run(data, folder) == 0
    assert "jsonl not written: the disk is full" in capsys.readouterr().out
    assert same_as(folder, straight) == []


def test_curves_that_cannot_be_written_do_not_end_the_run(data, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise UserError("text10.png not written: the disk is full")

    monkeypatch.setattr(train, "print_sample", lambda *arguments: None)
    monkeypatch.setattr(run_module, "draw_curves", full)
    assert run(data, tmp_path) == 0
    assert "warning: text10.png not written" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["file in its place", "read-only"])
def test_a_folder_that_cannot_be_written_is_one_sentence_before_any_step(data, tmp_path, monkeypatch, quiet, fault):
    folder = tmp_path / "models"
    if fault == "read-only":
        if os.geteuid() == 0:
            real = io.open

            def refusing(path, mode="r", *arguments, **settings):
                if str(path).startswith(str(folder)) and mode != "r":
                    raise OSError(errno.EROFS, "Read-only file system", str(path))
                return real(path, mode, *arguments, **settings)

            monkeypatch.setattr("builtins.open", refusing)
        folder.mkdir(mode=0o555)
    else:
        folder.write_text("a file")
    fail_at(monkeypatch, 1, AssertionError("no step before the folder is known to be good"))
    with pytest.raises(UserError, match=r"models.* not written: .*; choose a folder that can be written"):
        run(data, folder)


def test_room_on_the_disk_is_checked_at_the_start(data, tmp_path, monkeypatch, quiet):
    from collections import namedtuple

    monkeypatch.setattr("shutil.disk_usage", lambda folder: namedtuple("usage", "free")(10**6))
    fail_at(monkeypatch, 1, AssertionError("no step before the room is known"))
    with pytest.raises(UserError, match=r"the run text10 needs 0.02 GiB in .* and 0.00 GiB is free"):
        run(data, tmp_path)


def test_stale_temporaries_of_dead_runs_are_removed(data, tmp_path, quiet):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = ["text10.pt", "text10-best.pt", "text10-iter00000004.pt", "text10.jsonl", "text10.png"]
    for name in stale:
        (tmp_path / f"{name}.{dead.pid}.tmp").write_bytes(b"half")
    others = [f"text10.pt.{os.getppid()}.tmp", f"text100.pt.{dead.pid}.tmp", "text10.notes.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"not ours")
    run(data, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == sorted(others)


def test_the_best_and_the_last_checkpoints_are_kept(data, tmp_path, quiet):
    run(data, tmp_path, keep=2, eval_interval=2)
    kept = sorted(path.name for path in tmp_path.glob("*-iter*.pt"))
    assert kept == ["text10-iter00000008.pt", "text10-iter00000010.pt"]
    values = {row[0]: row[2] for row in losses(tmp_path / "text10.jsonl") if row[2] is not None}
    best = load_checkpoint(tmp_path / "text10-best.pt")["info"]
    assert best["val_loss"] == best["best_val_loss"] == min(values.values()) == values[best["iter_num"]]
    assert load_checkpoint(tmp_path / kept[0])["info"]["iter_num"] == 8
    run(data, tmp_path, keep=2, eval_interval=5)  # a new run of that name: the older copies are not its own
    assert [path.name for path in sorted(tmp_path.glob("*-iter*.pt"))] == [
        "text10-iter00000005.pt",
        "text10-iter00000010.pt",
        "text10-previous-iter00000008.pt",
        "text10-previous-iter00000010.pt",
    ]


# 5. Kills


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


# 7. Bad data, through training (test_batches.py has each case)


def test_bad_data_is_one_sentence_before_the_folder_is_made(data, tmp_path, quiet):
    for changes, sentence in (
        ({"dataset": "nowhere"}, r"nowhere-train.bin not found; run: python prepare_with_extended_tokenizer.py"),
        ({"block_size": 200}, r"text-val.bin holds 150 tokens and block_size 200 needs 201; use a smaller"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(data, tmp_path / "models", **changes)
    assert not (tmp_path / "models").exists()


# 8. Faults in training


def measure_at(monkeypatch, step: int, *numbers: float) -> None:
    """Let the given step, counted from here, find this loss and gradient norm."""
    real, calls = train.forward_backward, [0]

    def broken(*arguments):
        calls[0] += 1
        found = real(*arguments)
        return torch.tensor(numbers) if calls[0] == step else found

    monkeypatch.setattr(train, "forward_backward", broken)


def read_where_needed(monkeypatch) -> list[int]:
    """Read what the steps measured no more often than on CUDA; returns the steps at which that happened, to come."""
    real, read = measurements.Measurements.read, []

    def read_noted(pending):
        read.append(pending.pending[-1][0])
        return real(pending)

    monkeypatch.setattr(train, "needed_at_once", lambda config: False)
    monkeypatch.setattr(measurements.Measurements, "read", read_noted)
    return read


@pytest.mark.parametrize("every_step", [True, False], ids=["each-step", "where-needed"])
@pytest.mark.parametrize("result", [(float("nan"), 1.0), (2.0, float("inf"))], ids=["loss", "gradient"])
def test_a_number_that_is_none_stops_and_leaves_the_last_checkpoint(
    data, tmp_path, monkeypatch, quiet, result, every_step
):
    measure_at(monkeypatch, 7, *result)
    if not every_step:
        read_where_needed(monkeypatch)
    with pytest.raises(UserError) as stop:
        run(data, tmp_path, log_interval=1 if every_step else 3)
    sentence = str(stop.value)
    last = losses(tmp_path / "text10.jsonl")[-1]
    assert last[0] == 6 and f"last finite loss {last[1]:.4f}" in sentence
    assert ("the loss is nan" if result[0] != 2.0 else "the gradient norm is inf") in sentence
    assert re.search(r"in iteration 7 at learning rate \d\.\d\de-0\d", sentence)
    assert f"last good state, iteration 4, with: python train.py --resume {tmp_path / 'text10.pt'}" in sentence
    assert "--learning_rate 0.0015 --muon_learning_rate 0.01" in sentence
    saved = load_checkpoint(tmp_path / "text10.pt")
    assert saved["info"]["iter_num"] == 4
    assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_the_device_is_waited_for_where_a_line_an_evaluation_or_a_save_needs_it(
    data, tmp_path, monkeypatch, quiet, straight
):
    read = read_where_needed(monkeypatch)
    folder = tmp_path / "text10"
    stop_after(monkeypatch, 7)
    assert run(data, folder, log_interval=5) == 130
    monkeypatch.setattr(train, "StopSignal", lambda: StopAfter(99))
    assert run(data, folder, resume=True, log_interval=1) == 0
    assert read == [1, 4, 5, 7, 8, 9, 10]
    assert same_as(folder, straight) == ["text10.jsonl"], "which has fewer lines"


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    """On the meta device, whose numbers cannot be looked at: but for the rows nothing is sent there in a step."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sent = []
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **settings: contextlib.nullcontext())  # knows no meta
    monkeypatch.setattr(model, "compute_dtype", lambda tensor: tensor.dtype)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
            if len({tensor.device for tensor in tensors}) > 1:
                sent.append((function.overloadpacket, tensors[0].shape))
            return result

    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "dropout": 0.1}
    config = train.TrainConfig(**shape, batch_size=1, gradient_accumulation_steps=2, dtype="float32")
    config = dataclasses.replace(train.resolve(config, "cpu", False), device="meta", document_mask=True)
    gpt = make_model(config, None).to("meta").train()
    both = make_optimizers(gpt, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    rows = np.arange(2 * 16).reshape(2, 16)
    with Watch():
        numbers = train.forward_backward(gpt, config, rows, rows, both, scaler)
        both[0].step()  # AdamW's fused step, which CUDA has, is torch's
    assert numbers.shape == (2,)
    ids, targets, documents = [(torch.ops.aten._to_copy, (1, 16))] * 3
    assert sent == [ids, targets, documents] * 2


@pytest.mark.parametrize("ends", ["stopped", "interrupted"])
def test_what_a_run_that_ends_has_not_looked_at_is_not_saved_unseen(data, tmp_path, monkeypatch, quiet, ends):
    read_where_needed(monkeypatch)
    measure_at(monkeypatch, 6, float("nan"), 1.0)
    if ends == "stopped":
        stop_after(monkeypatch, 7)
    else:
        fail_at(monkeypatch, 8, KeyboardInterrupt())
    with pytest.raises(UserError, match="the loss is nan in iteration 6"):
        run(data, tmp_path, log_interval=20, eval_interval=5)
    assert load_checkpoint(tmp_path / "text10.pt")["info"]["iter_num"] == 5


def test_a_rate_that_destroys_the_model_leaves_the_last_good_checkpoint(data, tmp_path, monkeypatch, quiet):
    with pytest.raises(UserError, match=r"is (nan|inf) in iteration \d+ at learning rate"):
        run(data, tmp_path, learning_rate=1e30, muon_learning_rate=1e30, optimizer="adamw", warmup_iters=1)
    saved = load_checkpoint(tmp_path / "text10.pt")
    assert all(weight.isfinite().all() for weight in saved["model"].values())
    assert np.isfinite(saved["info"]["val_loss"])


def test_the_skips_of_float16_are_counted_and_shown(data, tmp_path, monkeypatch, quiet, capsys):
    real, calls = train.forward_backward, [0]
    weights = []

    def overflowing(gpt, config, ids, targets, *more):
        calls[0] += 1
        if calls[0] in (3, 4):
            gpt.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))
            weights.append([weight.detach().clone() for weight in gpt.parameters()])
        elif calls[0] == 5:
            weights.append([weight.detach().clone() for weight in gpt.parameters()])
        found = real(gpt, config, ids, targets, *more)
        gpt.ln_f.weight._backward_hooks = None
        return found

    monkeypatch.setattr(train, "forward_backward", overflowing)
    assert run(data, tmp_path, dtype="float16") == 0
    for before, after in itertools.pairwise(weights):
        assert all(map(torch.equal, before, after)), "no optimizer steps where one of them would be skipped"
    saved = load_checkpoint(tmp_path / "text10.pt")
    assert saved["info"]["skipped_steps"] == 2
    assert saved["training"]["scaler"]["scale"] == 65536 / 4
    assert "2 skipped" in capsys.readouterr().out
    text = (tmp_path / "text10.jsonl").read_text()
    assert "Infinity" not in text and '"grad_norm": null' in text


def test_a_gradient_that_is_never_finite_ends_even_with_float16(data, tmp_path, monkeypatch, quiet):
    real = train.forward_backward

    def broken(gpt, *arguments):
        gpt.ln_f.weight.register_hook(lambda gradient: gradient * float("nan"))
        return real(gpt, *arguments)

    monkeypatch.setattr(train, "forward_backward", broken)
    with pytest.raises(UserError, match="the gradient norm is nan in iteration"):
        run(data, tmp_path, dtype="float16", max_iters=40)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_names_a_setting_of_half_the_size(data, tmp_path, monkeypatch, quiet, error):
    fail_at(monkeypatch, 3, error)
    path = tmp_path / "text10.pt"
    with pytest.raises(UserError) as stop:
        run(data, tmp_path, batch_size=6)
    assert str(stop.value) == (
        f"out of memory with --batch_size 6; run again with --resume {path} --batch_size 3 "
        "--gradient_accumulation_steps 2, the same tokens an iteration in less memory"
    )
    assert load_checkpoint(path)["info"]["iter_num"] == 2
    assert run(data, tmp_path, resume=path, batch_size=3, gradient_accumulation_steps=2) == 0


@pytest.mark.parametrize(
    ("batch_size", "steps", "smaller"), [(16, 1, (8, 2)), (9, 2, (3, 6)), (7, 1, (1, 7)), (1, 8, None)]
)
def test_the_smaller_micro_batch_keeps_the_sequences(batch_size, steps, smaller):
    assert memory.smaller_micro_batch(batch_size, steps) == smaller


def test_one_sequence_that_does_not_fit_needs_a_smaller_model():
    config = train.TrainConfig(batch_size=1, gradient_accumulation_steps=4)
    assert "use a smaller --block_size" in str(memory.out_of_memory_error(config))


def test_a_compiler_that_fails_is_a_warning(data, tmp_path, monkeypatch, quiet, straight, capsys):
    def no_compiler(*arguments, **settings):
        def call(*inputs):
            raise RuntimeError("no C++ compiler\nat all")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    folder = tmp_path / "text10"
    assert run(data, folder, compile=True) == 0
    assert "warning: torch.compile failed (no C++ compiler); going on without it" in capsys.readouterr().out
    assert losses(folder / "text10.jsonl") == losses(straight / "text10.jsonl")


def test_a_compiler_that_fails_in_another_process_is_given_up_in_this_one_too(monkeypatch, capsys):
    gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    config = train.resolve(train.TrainConfig(**OPTIONS, gradient_accumulation_steps=2), "cpu", False)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(World, "largest", lambda world, number: 1)
    rows = np.zeros((1, 16), dtype=np.int64)
    train.compile_or_eager(gpt, config, rows, rows, World(size=2))
    assert "torch.compile failed (in another process); going on without it" in capsys.readouterr().out
    assert gpt.h[0].compiled is None and gpt.wte.weight.grad is None


def test_the_model_is_compiled_before_it_is_wrapped(data, tmp_path, monkeypatch, quiet):
    """DistributedDataParallel cannot go on after a backward pass that failed."""
    order = []
    real = World.wrap
    monkeypatch.setattr(train, "compile_or_eager", lambda *arguments: order.append("compiled"))
    monkeypatch.setattr(World, "wrap", lambda *arguments: order.append("wrapped") or real(*arguments))
    assert run(data, tmp_path, compile=True) == 0
    assert order == ["compiled", "wrapped"]


def test_memory_is_kept_for_the_optimizers_and_the_averaging(monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "empty_like", lambda weight: taken.append(weight))
    gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    config = train.TrainConfig(device="meta", batch_size=1, gradient_accumulation_steps=2, block_size=16)
    n_weights = len(list(gpt.parameters()))
    for world, copies in ((World(), 2), (World(size=2), 3)):
        monkeypatch.setattr(World, "smallest", lambda world, number: number)
        memory.fit_batch_size(gpt, config, lambda *arguments: None, world)
        assert len(taken) == copies * n_weights
        taken.clear()


def test_memory_that_ran_out_is_no_lost_process(data, tmp_path, monkeypatch, quiet):
    """NCCL's error says both."""
    monkeypatch.setattr(World, "lost_process_error", lambda *arguments: UserError("lost another process"))
    fail_at(monkeypatch, 3, RuntimeError("NCCL Error 1: unhandled cuda error, Cuda failure 2 'out of memory'"))
    with pytest.raises(UserError, match="out of memory with --batch_size 2; run again"):
        run(data, tmp_path)


def test_a_missing_tokenizer_is_looked_for_once(monkeypatch):
    tries = []

    def missing():
        tries.append(1)
        raise UserError("no vocabulary")

    monkeypatch.setattr("setup_tokenizer.get_extended_tokenizer", missing)
    progress.tokenizer_if_there.cache_clear()
    try:
        assert [progress.sample_text(None, None, False, number) for number in range(3)] == [None] * 3
    finally:
        progress.tokenizer_if_there.cache_clear()
    assert tries == [1]


def test_the_largest_micro_batch_that_fits_is_found_by_trying(data, monkeypatch):
    tried = []

    def step(gpt, config, ids, targets):
        tried.append(config.batch_size)
        assert ids.shape == (config.batch_size, config.block_size)
        if config.batch_size > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    config = train.TrainConfig(device="meta", batch_size=16, gradient_accumulation_steps=3, block_size=16)
    assert memory.fit_batch_size(gpt, config, step) == (4, 12)
    assert tried == [48, 24, 16, 12, 8, 6, 4]


@pytest.mark.parametrize(
    ("given", "fits", "expected"),
    [
        ({}, 64, (16, 8)),  # the default, where it fits
        ({}, 5, (4, 32)),
        ({"batch_size": 12}, 5, (12, 8)),  # a number is the user's
        ({"batch_size": "auto"}, 64, (64, 2)),
    ],
)
def test_a_first_run_on_a_small_card_finds_its_micro_batch(monkeypatch, capsys, given, fits, expected):
    """By default on CUDA; the random numbers are those of a run without tries."""

    def step(gpt, config, ids, targets):
        torch.rand(3)
        if config.batch_size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    config = train.resolve(train.TrainConfig(**given, block_size=16, dtype="float32"), "cuda:0", chat=False)
    monkeypatch.setattr(train, "forward_backward", step)
    monkeypatch.setattr(train, "random_states", lambda device: torch.get_rng_state())
    monkeypatch.setattr(train, "set_random_states", lambda state, device: torch.set_rng_state(state))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device, **more: real(*sizes, **more))
    before = torch.get_rng_state()
    fitted = train.fit_micro_batch(gpt, config, given, World())
    assert (fitted.batch_size, fitted.gradient_accumulation_steps) == expected
    assert torch.equal(torch.get_rng_state(), before)
    said = capsys.readouterr().out
    assert ("the default of 16 does not fit): 4 x 32 sequences, 2,048 tokens" in said) == (expected == (4, 32))
    assert train.fit_micro_batch(gpt, dataclasses.replace(config, device="cpu"), {}, World()).batch_size != 4


def test_a_try_that_fails_has_let_go_of_its_memory_before_the_devices_cache_is_emptied(monkeypatch):
    kept, left = [], []
    real = torch.empty_like

    def take(weight):
        kept.append(weakref.ref(tensor := real(weight)))
        return tensor

    def step(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty_like", take)
    monkeypatch.setattr(memory.gc, "collect", lambda: left.append(sum(reference() is not None for reference in kept)))
    gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    config = train.TrainConfig(device="meta", batch_size=1, gradient_accumulation_steps=1, block_size=16)
    memory.fit_batch_size(gpt, config, step)
    assert kept and left == [0]


def test_on_a_cpu_the_micro_batch_follows_from_the_memory_available(data, tmp_path, monkeypatch, quiet, capsys):
    shape = model.GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=16)
    monkeypatch.setattr(
        memory, "available_memory_bytes", lambda: int(memory.step_bytes(shape, 2) / memory.HEADROOM) + 1
    )
    assert run(data, tmp_path / "a", batch_size="auto", gradient_accumulation_steps=1) == 0
    assert "batch size (auto): 2 x 8 sequences, 256 tokens an iteration" in capsys.readouterr().out
    config = load_checkpoint(tmp_path / "a" / "text10.pt")["info"]["config"]
    assert (config["batch_size"], config["gradient_accumulation_steps"], config["val_rows"]) == (2, 8, 32)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: None)
    assert run(data, tmp_path / "a", resume=tmp_path / "a" / "text10.pt", batch_size="auto", max_iters=11) == 0
    assert "does not say how much memory is free" in capsys.readouterr().out
    assert memory.available_memory_bytes() is None
    monkeypatch.undo()
    if sys.platform == "linux":
        assert 0 < memory.available_memory_bytes() < 2**50


# 10. Metrics


def test_metrics_and_curves_of_a_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "print_sample", lambda *arguments: None)
    run(data, tmp_path, log_interval=3, max_iters=7, eval_interval=3)
    records = [json.loads(line) for line in (tmp_path / "text7.jsonl").read_text().splitlines()]
    assert [record["iter_num"] for record in records] == [0, 1, 3, 6, 7]
    assert records[2].keys() == {
        *("iter_num", "loss", "learning_rate", "grad_norm", "tokens_per_s", "val_loss", "tokens_seen", "elapsed_s")
    }
    assert [record["tokens_seen"] for record in records] == [0, 32, 96, 192, 224]
    assert [record["iter_num"] for record in records if "val_loss" in record] == [0, 3, 6, 7]
    assert all(record["val_loss"] > 0 for record in records if "val_loss" in record)
    assert (tmp_path / "text7.png").read_bytes().startswith(b"\x89PNG")


# The options


def test_every_option_is_read_somewhere():
    fields = {field.name for field in dataclasses.fields(train.TrainConfig)}
    source = "".join(inspect.getsource(module) for module in (train, run_module, memory, optimizers, progress, start))
    body = source.replace(inspect.getsource(train.TrainConfig), "")
    unread = {name for name in fields if not re.search(rf"\bconfig\.{name}\b", body)}
    assert unread <= {"n_layer", "n_head", "n_embd", "block_size", "dropout"}  # read by name in make_model
    assert all(f'"{name}"' in inspect.getsource(make_model) for name in unread)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_iters", "0"], "max_iters must be at least 1, not 0"),
        (["--batch_size", "0"], "batch_size must be at least 1, not 0"),
        (["--batch_size", "many"], "--batch_size must be a number or auto, not 'many'"),
        (["--dropout", "1"], "dropout must be at least 0 and below 1, not 1.0"),
        (["--learning_rate", "nan"], "learning_rate must be at least 0, not nan"),
        (["--muon_learning_rate", "-1"], "muon_learning_rate must be at least 0"),
        (["--seed", str(2**63)], "seed must be below 2**63"),
        (["--init_from", ""], "init_from must name a checkpoint, not be empty"),
        (["--dataset", "../story"], "dataset must be a name such as story"),
        (["--max_iter", "5"], "unrecognized arguments"),
    ],
)
def test_a_wrong_option_is_a_usage_error(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(train.TrainConfig, "", words)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_given_options_hold_what_was_given():
    words = ["--resume", "--batch_size", "auto", "--no-compile"]
    assert given_options(train.TrainConfig, words) == {"resume": "", "batch_size": "auto", "compile": False}
    assert parse_options(train.TrainConfig, "", words).batch_size == "auto"


def test_the_defaults_are_the_readmes():
    config = train.TrainConfig()
    assert (config.dataset, config.max_iters, config.seed, config.name) == ("story", 5000, 1337, "story5000")


def test_the_schedule_warms_up_and_falls_to_the_lowest_rate():
    settings = {"max_iters": 100, "warmup_iters": 10, "learning_rate": 1e-3, "min_lr": 1e-4, "schedule": "cosine"}
    config = train.TrainConfig(**settings)
    shares = [train.schedule(iter_num, config) for iter_num in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == shares[10] == 1
    assert all(a > b for a, b in itertools.pairwise(shares[10:]))
    assert shares[55] == pytest.approx(0.1 + 0.9 / 2) and shares[100] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("chat", "given", "schedule"), [(False, {}, "wsd"), (True, {}, "cosine"), (True, {"schedule": "wsd"}, "wsd")]
)
def test_text_and_chat_have_schedules_of_their_own(chat, given, schedule):
    assert train.resolve(train.TrainConfig(**given), "cpu", chat).schedule == schedule


def test_wsd_stays_at_the_peak_until_a_fifth_is_left():
    settings = {"max_iters": 100, "warmup_iters": 10, "learning_rate": 1e-3, "min_lr": 1e-4, "schedule": "wsd"}
    config = train.TrainConfig(**settings)
    shares = [train.schedule(iter_num, config) for iter_num in range(101)]
    assert shares[4] == pytest.approx(0.5) and set(shares[9:81]) == {1}
    assert all(a > b for a, b in itertools.pairwise(shares[80:]))
    assert shares[85] == pytest.approx(1 - 0.9 / 2) and shares[100] == pytest.approx(0.1)


def test_the_sample_leaves_the_generators_alone(data, tmp_path, monkeypatch):
    gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)).train()
    config = train.resolve(train.TrainConfig(**OPTIONS), "cpu", chat=False)
    before = torch.get_rng_state()
    texts = [progress.sample_text(gpt, config, chat, 5) for chat in (False, True) for _ in range(2)]
    assert texts[0] == texts[1] and texts[2] == texts[3] and gpt.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_is_drawn_where_nothing_has_to_repeat_itself(data, tmp_path, monkeypatch):
    """torch refuses a running sum on CUDA under --deterministic."""
    modes = []
    monkeypatch.setattr(run_module, "draw_curves", lambda *arguments: False)
    monkeypatch.setattr(
        progress, "sample_text", lambda *arguments: modes.append(torch.are_deterministic_algorithms_enabled())
    )
    try:
        assert run(data, tmp_path, deterministic=True) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        set_determinism(False)
    assert modes == [False] * 3
