"""What a run computes, logs and prints between its start and its end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re

import numpy as np
import pytest
import torch

import train
from common.cli import UserError
from common.device import set_determinism
from common.speedups import load_speedups
from model import GPT, GPTConfig
from tests.fake_job import fake_job
from tests.test_train_config import config_of
from tests.tiny import OPTIONS, load_checkpoint, losses, options_of_run, run
from training.initialization import make_model, model_config
from training.metrics import draw_curves
from training.objectives import NextToken
from training.optimizers import make_optimizers
from training.progress import Sampler
from training.step import clip_gradients, forward_backward

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")


def test_accumulating_four_micro_batches_equals_one_of_all_rows(data, tmp_path):
    run(data, tmp_path / "a", batch_size=8)
    run(data, tmp_path / "b", batch_size=2, gradient_accumulation_steps=4, eval_iters=8)
    first, second = (np.array([row[1] for row in losses(tmp_path / x / "text10.jsonl")[1:]]) for x in "ab")
    np.testing.assert_allclose(first, second, rtol=1e-4)
    assert load_checkpoint(tmp_path / "b" / "text10.pt")["info"]["tokens_seen"] == 10 * 8 * 16


def test_the_plain_code_alone_trains_alike(data, tmp_path, straight):
    assert run(data, tmp_path, plain=True) == 0
    plain, fast = (np.array([row[1] for row in losses(folder / "text10.jsonl")[1:]]) for folder in (tmp_path, straight))
    np.testing.assert_allclose(plain, fast, rtol=1e-4)
    assert run(data, tmp_path, resume=tmp_path / "text10.pt", max_iters=11, plain=True) == 0


def test_metrics_and_curves_of_a_run(data, tmp_path):
    run(data, tmp_path, draw=draw_curves, log_interval=3, max_iters=7, eval_interval=3)
    records = [json.loads(line) for line in (tmp_path / "text7.jsonl").read_text().splitlines()]
    assert [record["iter_num"] for record in records] == [0, 1, 3, 6, 7]
    assert records[2].keys() == {
        *("iter_num", "loss", "learning_rate", "grad_norm", "tokens_per_s", "val_loss", "tokens_seen", "elapsed_s")
    }
    assert [record["tokens_seen"] for record in records] == [0, 32, 96, 192, 224]
    assert [record["iter_num"] for record in records if "val_loss" in record] == [0, 3, 6, 7]
    assert all(record["val_loss"] > 0 for record in records if "val_loss" in record)
    assert (tmp_path / "text7.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    """On the meta device, whose numbers cannot be read: in a step nothing but the rows is sent there."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sent = []
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **settings: contextlib.nullcontext())  # knows no meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
            if len({tensor.device for tensor in tensors}) > 1:
                sent.append((function.overloadpacket, tensors[0].shape))
            return result

    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "dropout": 0.1}
    config = config_of(**shape, batch_size=1, gradient_accumulation_steps=2, dtype="float32", document_mask=True)
    config = dataclasses.replace(config, device="meta")
    gpt = make_model(model_config({**shape, "n_vocab": config.n_vocab})).to("meta").train()
    load_speedups(plain=False).speed_up_training(gpt)
    both = make_optimizers(gpt, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    rows = np.arange(2 * 16).reshape(2, 16)
    with Watch():
        loss = forward_backward(gpt, config, NextToken(config), [rows, rows], scaler)[0]
        grad_norm = clip_gradients(gpt, both, scaler, config.grad_clip)
        both[0].step()  # AdamW's fused step, which CUDA has, is torch's
    assert loss.shape == grad_norm.shape == ()
    ids, targets, documents, positions = [(torch.ops.aten._to_copy, (1, 16))] * 4
    assert sent == [ids, targets, documents, positions] * 2


# Compiling


def test_a_compiler_that_fails_is_a_warning(data, tmp_path, monkeypatch, straight, capsys):
    def no_compiler(*arguments, **settings):
        def call(*inputs):
            raise RuntimeError("no C++ compiler\nat all")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    folder = tmp_path / "text10"
    assert run(data, folder, compile=True) == 0
    assert "warning: torch.compile failed (no C++ compiler);" in capsys.readouterr().out
    assert losses(folder / "text10.jsonl") == losses(straight / "text10.jsonl")


def test_the_model_is_compiled_before_it_is_wrapped(data, tmp_path):
    """DistributedDataParallel cannot continue after a backward pass that failed."""

    class Fast:
        """Stands for the folder fast/."""

        def compile_training(self, model, trial_step, any_failed, scope):
            seen.append((type(model), scope))
            state = torch.get_rng_state()
            trial_step()
            assert torch.equal(torch.get_rng_state(), state), "the trial leaves no trace"
            assert all(weight.grad is None for weight in model.parameters())
            assert any_failed(True) and not any_failed(False)

    seen = []
    with fake_job(size=2):
        options, given = options_of_run(data, tmp_path, compile=True, dropout=0.1)
        planned = train.plan(options, given, load_speedups(plain=False))
        training = train.build(planned, None)
        wrapped = train.compile_and_wrap(training, Fast())
        training.batches.close()
    assert seen == [(GPT, "block")] and isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)


# Samples


def test_a_missing_tokenizer_is_looked_for_once():
    tries = []

    def missing():
        tries.append(1)
        raise UserError("no vocabulary")

    sample = Sampler(missing)
    for number in range(3):
        sample(None, None, False, number)
    assert tries == [1]


def test_the_sample_leaves_the_generators_alone(capsys):
    gpt, sample = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)).train(), Sampler()
    config = config_of(**OPTIONS)
    before = torch.get_rng_state()
    for chat in (False, False, True, True):
        sample(gpt, config, chat, 5)
    texts = re.findall("  sample: (.*)", capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[2] == texts[3] and gpt.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_is_drawn_without_determinism(data, tmp_path):
    """torch has no deterministic cumsum on CUDA and would refuse."""
    modes = []

    class Tokenizer:
        def decode(self, ids):
            modes.append(torch.are_deterministic_algorithms_enabled())
            return ""

    try:
        assert run(data, tmp_path, sample=Sampler(Tokenizer), deterministic=True) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        set_determinism(False)
    assert modes == [False] * 3
