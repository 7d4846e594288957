"""Training on few data: splits shorter than a row."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from common.cli import UserError
from data.dataset import open_dataset
from evaluate import EvaluateOptions, measure
from model import GPT, GPTConfig
from tests.tiny import load_checkpoint, prepare, run

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
        sentence = f"note: {name}-val.bin contains {size} tokens, less than a row of 64; the rest of the row is padding"
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
