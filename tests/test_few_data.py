"""Training on few data: splits shorter than a row, the default number of iterations, epochs, and fine-tuning."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import train
from common.cli import UserError
from common.speedups import load_speedups
from data.dataset import open_dataset
from data.epochs import Portion, fine_tuning_iters, fitting_iters, has_few_tokens
from evaluate import EvaluateOptions, measure
from model import GPT, GPTConfig
from tests.test_train_config import config_of, facts_of
from tests.tiny import load_checkpoint, options_of_run, prepare, run
from training.options import TrainOptions

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")

BLOCK_SIZE = 64


@pytest.fixture
def short(tmp_path) -> Path:
    """A folder with "text" and "chat", whose splits have 60 and 15, and 120 and 30 tokens."""
    return prepare(prepare(tmp_path / "data", n_tokens=60), "chat", n_tokens=120)


# Splits shorter than a row


@pytest.mark.parametrize("dataset", ["text", "chat", "text=0.5,chat=0.5"])
def test_splits_shorter_than_a_row_train_and_are_evaluated(short, tmp_path, capsys, dataset):
    assert run(short, tmp_path / "models", dataset=dataset, block_size=BLOCK_SIZE, loss_on=None) == 0
    printed = capsys.readouterr().out
    for name, size in (("text", 15), ("chat", 30)):
        sentence = f"note: {name}-val.bin contains {size} tokens, too few for a row of 64 and its last target; the rest"
        assert (sentence in printed) == (name in dataset)
    (path,) = (tmp_path / "models").glob("*10.pt")
    assert math.isfinite(load_checkpoint(path)["info"]["val_loss"])
    measured = measure(EvaluateOptions((str(path),), data_dir=str(short), device="cpu", dtype="float32"))
    for name, found in measured["datasets"].items():
        tokens = found["results"][0]["all"]["tokens"]
        assert 0 < tokens <= {"text": 15, "chat": 30}[name]


def test_the_padding_of_a_short_split_does_not_count(short, tmp_path):
    run(short, tmp_path / "models", block_size=BLOCK_SIZE)
    saved = load_checkpoint(tmp_path / "models" / "text10.pt")
    gpt = GPT(GPTConfig(**saved["info"]["model"]))
    gpt.load_state_dict(saved["model"])
    stream = open_dataset(short, "text")[0]["val"]
    ids = torch.from_numpy(stream.read(0, len(stream)))[None]
    _, loss = gpt.eval()(ids[:, :-1], ids[:, 1:])
    assert saved["info"]["val_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_split_of_one_token_is_refused(tmp_path):
    prepare(tmp_path / "data", n_tokens=4)
    with pytest.raises(UserError, match=r"text-val.bin contains a single token, so there is nothing to predict"):
        run(tmp_path / "data", tmp_path / "models")
    assert not (tmp_path / "models").exists()


# The number of iterations

MANY, DIARY, NOTES = Portion("many", 4_500_000), Portion("diary", 50_000), Portion("notes", 500_000)


def part(portion: Portion, share: float) -> Portion:
    return dataclasses.replace(portion, share=share)


@pytest.mark.parametrize(
    ("tokens", "iters"),
    [
        (2, 100),
        (1_500, 100),
        (51_200, 100),  # 8 epochs of 200 rows in iterations of 16 rows
        (400_000, 790),  # 8 * 1563 / 16 = 782, rounded up
        (999_999, 2000),
        (1_000_000, 5000),
        (540_000_000, 5000),
    ],
)
def test_the_default_number_of_iterations_fits_the_data(tokens, iters):
    config = config_of(facts_of("text", tokens))
    assert config.max_iters == iters and config.warmup_iters == iters // 20
    assert config_of(facts_of("text", tokens), max_iters=7).max_iters == 7
    assert (config.eval_interval, config.name) == (min(250, iters // 4), f"story{iters}")


def test_larger_batches_need_fewer_iterations():
    assert config_of(facts_of("text", 400_000), batch_size=32).max_iters == 400  # 391, rounded up
    assert config_of(facts_of("text", 400_000), gradient_accumulation_steps=2).max_iters == 400


def test_a_mixture_is_trained_until_each_part_has_been_read_often_enough():
    assert fitting_iters([part(MANY, 0.8), part(DIARY, 0.2)], 256, 16) == 5000
    assert fitting_iters([part(NOTES, 0.5), part(DIARY, 0.5)], 256, 16) == 2000  # 8 * 1954 / 8 = 1954, rounded up


def test_fine_tuning_needs_as_many_iterations_as_the_new_data():
    assert fine_tuning_iters([part(MANY, 0.8), part(DIARY, 0.2)], 256, 16) == 490
    assert fine_tuning_iters([DIARY], 256, 4) == 400  # 8 * 196 / 4 = 392, rounded up
    assert fine_tuning_iters([Portion("talks", 800)], 256, 4) == 300
    assert fine_tuning_iters([MANY], 256, 16) == 5000


def test_the_epochs_are_printed_with_the_iterations(short, tmp_path, capsys):
    run(short, tmp_path / "models", dataset="text=0.5,chat=0.5", max_iters=20, batch_size=4)
    printed = capsys.readouterr().out
    # Rows of 16 tokens: 60 tokens are 4 rows, 120 are 8; an iteration reads 2 rows of each.
    assert "iterations: 20, which are 10 epochs of text's 60 tokens, 5.0 epochs of chat's 120 tokens\n" in printed
    assert re.search(r"^iter  1/20 \(epoch 0\.5\+0\.2\) \[#\.{19}\] loss ", printed, re.MULTILINE)
    assert re.search(r"^iter 20/20 \(epoch 10\+5\.0\) \[#{20}\] loss ", printed, re.MULTILINE)


def test_a_run_without_max_iters_is_resumed_without(data, tmp_path, capsys):
    options, given = options_of_run(data, tmp_path, max_iters=None)
    del given["max_iters"]
    planned = train.plan(options, given, None)
    assert planned.config.max_iters == 160  # 8 epochs of 38 rows, 2 rows each: 152, rounded up
    assert "iterations: 160, which are 8.4 epochs of text's 600 tokens (the default" in capsys.readouterr().out
    assert run(data, tmp_path, stop_after=3, max_iters=None) == 130
    assert run(data, tmp_path, max_iters=2) == 0  # newer, and complete
    folders = {"data_dir": str(data), "out_dir": str(tmp_path), "dataset": "text", "resume": ""}
    resumed = train.plan(TrainOptions(**folders), folders, load_speedups(plain=True))
    assert resumed.config.max_iters == 160 and resumed.config.resume == str(tmp_path / "text160.pt")
    (tmp_path / "text160.pt").unlink()
    assert train.plan(TrainOptions(**folders), folders, None) is None
    assert f"{tmp_path / 'text2.pt'} is complete" in capsys.readouterr().out


def test_without_any_run_a_resume_names_the_default_one(data, tmp_path):
    folders = {"data_dir": str(data), "out_dir": str(tmp_path), "dataset": "text", "resume": ""}
    with pytest.raises(UserError, match=r"text5000.pt not found; make one with"):
        train.plan(TrainOptions(**folders), folders, None)


def test_a_resume_skips_unreadable_checkpoints_unless_there_are_no_others(data, half, tmp_path, capsys):
    (tmp_path / "text20.pt").write_bytes((half / "text10.pt").read_bytes()[:5000])
    folders = {"data_dir": str(data), "out_dir": str(tmp_path), "dataset": "text", "resume": ""}
    with pytest.raises(UserError, match=r"text20\.pt is not a readable checkpoint"):
        train.plan(TrainOptions(**folders), folders, None)
    assert capsys.readouterr().err == ""
    shutil.copy(half / "text10.pt", tmp_path)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "text30.pt")  # the newest
    resumed = train.plan(TrainOptions(**folders), folders, load_speedups(plain=True))
    assert resumed.config.resume == str(tmp_path / "text10.pt")
    first, second = sorted(capsys.readouterr().err.splitlines())
    assert first.startswith(f"skipped: {tmp_path / 'text20.pt'} is not a readable checkpoint")
    assert second.startswith(f"skipped: {tmp_path / 'text30.pt'} was written by other software")


# Fine-tuning


def test_init_from_changes_the_weights_slowly_and_says_how(data, half, tmp_path, capsys):
    source = str(half / "text10.pt")
    run(data, tmp_path, stop_after=0, dataset="chat", init_from=source, max_iters=40)
    saved = load_checkpoint(tmp_path / "chat40.pt")["info"]["config"]
    rates = {"learning_rate": 1e-3, "min_lr": 1e-4, "muon_learning_rate": 0.02 / 3, "warmup_iters": 4}
    assert {name: saved[name] for name in rates} == pytest.approx(rates)
    line = (
        f"fine-tuning {source}: learning_rate 0.001 to 0.0001, muon_learning_rate 0.00667, warmup_iters 4, batch_size 2"
    )
    assert line in capsys.readouterr().out
    given = {"learning_rate": 1e-3, "muon_learning_rate": 0.01, "warmup_iters": 2, "min_lr": 1e-3}
    run(data, tmp_path, stop_after=0, dataset="chat", init_from=source, max_iters=40, **given)
    saved = load_checkpoint(tmp_path / "chat40.pt")["info"]["config"]
    assert {name: saved[name] for name in given} == given


def test_fine_tuning_on_few_data_takes_many_small_steps(data, half, tmp_path):
    given = {"dataset": "chat", "data_dir": str(data), "init_from": str(half / "text10.pt"), "device": "cpu"}
    config = train.plan(TrainOptions(**given), given, None).config
    assert (config.max_iters, config.batch_size, config.val_rows) == (300, 4, 80)
    given["batch_size"] = 16
    assert train.plan(TrainOptions(**given), given, None).config.batch_size == 16
    assert has_few_tokens([MANY, DIARY]) and not has_few_tokens([MANY])


def test_a_resumed_fine_tuning_keeps_its_rates(data, half, tmp_path, capsys):
    source = str(half / "text10.pt")
    assert run(data, tmp_path, stop_after=5, dataset="chat", init_from=source, max_iters=8) == 130
    before = load_checkpoint(tmp_path / "chat8.pt")["info"]["config"]
    assert run(data, tmp_path, resume=tmp_path / "chat8.pt") == 0
    after = load_checkpoint(tmp_path / "chat8.pt")["info"]["config"]
    assert {**after, "resume": None, "init_from": source} == before
