"""Resuming: bit by bit the same run, with what may change and nothing else."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

import model
import train
from common import checkpoint
from common.cli import UserError
from tests.tiny import OPTIONS, differences, in_step, load_checkpoint, losses, prepare, run
from training.progress import Sampler

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")


# Bit by bit


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "text", "dropout": 0.2, "block_size": 45, "batch_size": 3},
        {"dataset": "chat", "dropout": 0.2, "optimizer": "adamw", "gradient_accumulation_steps": 2, "keep": 2},
        {"dataset": "text", "dtype": "float16"},
        # Enough tokens, and sizes, for the kernels of a CPU with AMX.
        {"dataset": "text", "dropout": 0.2, "dtype": "bfloat16", "n_embd": 64, "block_size": 64, "batch_size": 16},
    ],
    ids=["text-muon-epochs", "chat-adamw", "float16", "kernels"],
)
def test_a_run_stopped_after_every_iteration_equals_an_uninterrupted_one(data, tmp_path, capsys, options):
    name, sample = f"{options['dataset']}10", Sampler()
    straight, stopped = tmp_path / "a" / name, tmp_path / "b" / name
    assert run(data, straight, sample=sample, **options) == 0
    straight.with_suffix(".txt").write_text(capsys.readouterr().out)
    assert run(data, stopped, stop_after=1, sample=sample, **options) == 130
    for _ in range(9):
        resumed = {"resume": True, "dataset": options["dataset"], "sample": sample}
        assert run(data, stopped, stop_after=1, **resumed) == 130
    assert run(data, stopped, stop_after=1, **resumed) == 0
    output = capsys.readouterr().out
    stopped.with_suffix(".txt").write_text(output)
    assert "is complete: iteration 10 of 10" in output
    assert differences(stopped, straight) == []
    epoch = load_checkpoint(straight / f"{name}.pt")["training"]["position"]["epoch"]
    assert epoch >= (2 if options.get("block_size") == 45 else 0)
    assert output.count("sample:") == 3
    assert ("% of the tokens are not padding" in output) == (options["dataset"] == "chat")
    assert [row[0] for row in losses(stopped / f"{name}.jsonl")] == list(range(11))


def test_the_random_states_of_all_generators_are_restored(data, tmp_path):
    drawn = []

    def draw(gpt, output):
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))

    with in_step(None, draw):
        run(data, tmp_path / "a")
        expected, drawn[:] = list(drawn), []
        run(data, tmp_path / "b", stop_after=3)
        run(data, tmp_path / "b", resume=True)
    assert drawn == expected


def test_a_run_does_not_touch_the_loaded_file(data, tmp_path):
    run(data, tmp_path, stop_after=5)
    before = (tmp_path / "text10.pt").read_bytes()
    os.link(tmp_path / "text10.pt", tmp_path / "kept.pt")
    run(data, tmp_path, resume=True)
    assert (tmp_path / "kept.pt").read_bytes() == before


# What may change


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"n_layer": 3}, ["--n_layer 3", "2"]),
        ({"dropout": 0.5}, ["--dropout 0.5", "0.0"]),
        ({"seed": 7}, ["--seed 7", "1337"]),
        ({"preset": "gpt2"}, ["--preset gpt2", "small"]),
        ({"optimizer": "adamw"}, ["--optimizer adamw", "muon"]),
        ({"batch_size": 4}, ["--batch_size 4 x --gradient_accumulation_steps 1", "2 sequences"]),
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


def test_another_data_set_is_refused(data, half):
    with pytest.raises(UserError, match=r"--dataset chat contradicts .*text10.pt, which was made with text"):
        run(data, half, resume=half / "text10.pt", dataset="chat")


def test_data_that_changed_in_between_is_refused(half, tmp_path):
    changed = prepare(tmp_path / "other", n_tokens=610)
    with pytest.raises(UserError, match=r"text has changed since .*sha256 [0-9a-f]{12} instead of [0-9a-f]{12}"):
        run(changed, half, resume=True)


def change_info(path, **facts) -> None:
    """Write a checkpoint again with other facts."""
    saved = load_checkpoint(path)
    weights = checkpoint.build_model(path, saved)
    checkpoint.save_checkpoint(path, weights, saved["info"] | facts, saved["training"])


def test_another_tokenizer_is_refused(data, half):
    change_info(half / "text10.pt", tokenizer={"name": "cl100k", "n_vocab": 100000})
    with pytest.raises(UserError, match="lacks its tokenizer cl100k; use a checkpoint"):
        run(data, half, resume=True)


def test_options_that_may_change_do_and_are_printed(data, half, capsys):
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


@pytest.mark.parametrize(
    ("optimizer", "decays", "expected"),
    [
        ("adamw", {"weight_decay": 0.3}, [0.3, 0.3, 0.0]),
        ("adamw", {"weight_decay": 0.3, "embedding_weight_decay": 0.2}, [0.2, 0.3, 0.0]),
        ("adamw", {"embedding_weight_decay": 0.2}, [0.2, 0.1, 0.0]),
        ("muon", {"muon_weight_decay": 0.3}, [0.3, 0.0, 0.0]),
        ("muon", {"embedding_weight_decay": 0.2}, [0.01, 0.2, 0.0]),
    ],
)
def test_the_optimizers_take_the_new_weight_decay(data, tmp_path, optimizer, decays, expected):
    run(data, tmp_path, stop_after=5, optimizer=optimizer)
    seen = []
    run(data, tmp_path, resume=True, adjust=lambda training: seen.extend(training.optimizers), **decays)
    groups = [group for each in seen for group in each.param_groups]
    assert [group["weight_decay"] for group in groups] == expected
    assert all(state["exp_avg"].any() for state in seen[-1].state.values())


def test_another_split_into_micro_batches_continues_alike(data, half, straight):
    assert run(data, half, resume=True, batch_size=1, gradient_accumulation_steps=2) == 0
    ours, theirs = (losses(folder / "text10.jsonl") for folder in (half, straight))
    np.testing.assert_allclose([row[1] for row in ours[1:]], [row[1] for row in theirs[1:]], rtol=1e-5)
    values = [[row[2] for row in rows if row[2]] for rows in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=1e-5)  # the same validation rows, too


def test_other_validation_rows_start_the_best_loss_anew(data, half, capsys):
    path = half / "text10.pt"
    change_info(path, best_val_loss=0.1)  # as other rows might have it
    assert run(data, half, resume=True, eval_iters=1) == 0
    assert "resume: the validation rows have changed, so the best loss is reset" in capsys.readouterr().out
    info = load_checkpoint(path)["info"]
    assert info["best_val_loss"] == load_checkpoint(half / "text10-best.pt")["info"]["val_loss"] > 0.1


# Where a resume leads


def test_a_complete_run_says_so(data, straight, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    assert run(data, straight, resume=True) == 0
    assert "is complete: iteration 10 of 10; continue with a larger --max_iters" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in straight.iterdir()} == before


def test_more_iterations_continue_under_the_new_name(data, tmp_path, capsys):
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


def test_fewer_iterations_than_done_are_complete(data, half, capsys):
    assert run(data, half, resume=half / "text10.pt", max_iters=3) == 0
    assert "is complete: iteration 5 of 3" in capsys.readouterr().out


def test_a_missing_checkpoint_names_those_that_exist(data, half):
    with pytest.raises(UserError, match=r"text99.pt not found; .*text10.pt"):
        run(data, half, resume=True, max_iters=99)


def test_weights_alone_cannot_be_resumed(data, tmp_path):
    gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    checkpoint.save_checkpoint(tmp_path / "text10.pt", gpt, {"iter_num": 3})
    with pytest.raises(UserError, match=r"holds only weights .*--init_from"):
        run(data, tmp_path, resume=True)


def test_a_checkpoint_that_another_run_continued_in_the_meantime_is_refused(data, half):
    with pytest.raises(UserError, match=r"text10.pt was changed by another run in the meantime"):
        run(data, half, resume=True, adjust=lambda training: run(data, half, resume=True))
    assert load_checkpoint(half / "text10.pt")["info"]["iter_num"] == 10


# Starting from another run's weights


def test_init_from_takes_the_weights_and_the_shape_and_nothing_else(data, half, tmp_path):
    source = str(half / "text10.pt")
    no_shape = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))
    given = {"dataset": "chat", "init_from": source, **no_shape}
    assert run(data, tmp_path, stop_after=0, **given) == 130
    ours, theirs = load_checkpoint(tmp_path / "chat10.pt"), load_checkpoint(half / "text10.pt")
    assert all(torch.equal(weight, theirs["model"][name]) for name, weight in ours["model"].items())
    assert ours["info"]["iter_num"] == ours["info"]["tokens_seen"] == 0
    states = [state for each in ours["training"]["optimizers"] for state in each["state"].values()]
    assert states and not any(value.any() for state in states for value in state.values())  # all as at the start
    for name, value in (("n_embd", 16), ("preset", "gpt2"), ("block_size", 2 * OPTIONS["block_size"])):
        with pytest.raises(UserError, match=f"--{name} {value} contradicts .*text10.pt"):
            run(data, tmp_path, **{**given, name: value})
    with pytest.raises(ValueError, match="do not use both"):
        train.TrainOptions(resume="", init_from=source)


def test_init_from_with_a_shorter_block_takes_the_first_positions(data, half, tmp_path):
    half_block = OPTIONS["block_size"] // 2
    assert run(data, tmp_path, stop_after=0, init_from=str(half / "text10.pt"), block_size=half_block) == 130
    ours, theirs = load_checkpoint(tmp_path / "text10.pt"), load_checkpoint(half / "text10.pt")
    assert ours["info"]["model"]["block_size"] == half_block
    assert torch.equal(ours["model"]["wpe.weight"], theirs["model"]["wpe.weight"][:half_block])
    assert torch.equal(ours["model"]["wte.weight"], theirs["model"]["wte.weight"])
