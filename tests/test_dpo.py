"""DPO: log probabilities, losses and gradients against a brute-force reference, and whole runs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.cli import UserError
from common.speedups import load_speedups
from data.dataset import open_dataset
from data.layouts.preferences import preferences
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare
from evaluate import EvaluateOptions, measure
from model import IGNORED
from setup_tokenizer import GPT2
from tests.test_train_config import config_of
from tests.tiny import differences, load_checkpoint, pair_records, prepare_pairs, run
from tests.tiny_gpt import tiny_gpt
from training.metrics import read_metrics
from training.pair_rows import PairRows
from training.preferences import DPO, dpo_losses
from training.step import forward_backward

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")

RUN_OPTIONS = {"dataset": "pairs", "objective": "dpo", "batch_size": 4, "block_size": 64, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A folder with the prepared data sets "pairs" and "talks", and a model's checkpoint, talks4.pt."""
    folder = tmp_path_factory.mktemp("pairs")
    talks = [pair[:-1] for pair in prepare_pairs(folder, n_pairs=30)]
    options = PrepareOptions(output_dir=str(folder), workers=1)
    prepare(Dataset("talks", "chat", "made", "MIT"), options, Corpus(talks[:30], talks[30:]))
    assert run(folder, folder, dataset="talks", block_size=64, max_iters=4, n_embd=16) == 0
    return folder


def start(pairs: Path, out_dir: Path, **changes) -> int:
    """A new run of DPO from the model."""
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd"))
    return run(pairs, out_dir, **{**shape, **RUN_OPTIONS, "init_from": str(pairs / "talks4.pt"), **changes})


# --- the oracle: one answer at a time, without padding, in float64 ---


def brute_force_log_prob(gpt, messages: list[dict]) -> torch.Tensor:
    """The log probability of a conversation's last message and the <|im_end|> after it."""
    prompt = GPT2.encode_chat(messages[:-1], add_generation_prompt=True)
    answer = [*GPT2.encode_text(messages[-1]["content"]), GPT2.im_end]
    ids = torch.tensor([*prompt, *answer])
    hidden = gpt.hidden(ids[None, :-1])
    log_probs = F.log_softmax(hidden @ gpt.wte.weight[: gpt.config.n_vocab].T, dim=-1)[0]  # in the weights' precision
    return log_probs[range(len(ids) - 1), ids[1:]][-len(answer) :].sum()


def brute_force_loss(gpt, reference, found: list[list[dict]], beta: float, smoothing: float, sft_weight: float):
    """The mean loss by TRL's formula: DPOTrainer.dpo_loss with loss_type "sigmoid" (trl 0.9 to 0.24)."""
    total = 0.0
    for pair in found:
        answers = ([*pair[:-2], pair[-2]], [*pair[:-2], pair[-1]])
        chosen, rejected = (brute_force_log_prob(gpt, messages) for messages in answers)
        ref_chosen, ref_rejected = (brute_force_log_prob(reference, messages).detach() for messages in answers)
        logits = (chosen - rejected) - (ref_chosen - ref_rejected)
        loss = -F.logsigmoid(beta * logits) * (1 - smoothing) - F.logsigmoid(-beta * logits) * smoothing
        n_answer = len(GPT2.encode_text(pair[-2]["content"])) + 1
        total = total + loss - sft_weight * chosen / n_answer
    return total / len(found)


def require_close_gradients(gpt, expected: dict[str, torch.Tensor]) -> None:
    """Every weight's gradient in float32 differs by at most 1e-5 of its norm from the one in float64.

    Single elements near zero differ by more of themselves: they are sums of larger terms that were rounded. Measured:
    2.2e-6 of the norm for the worst weight.
    """
    for name, weight in gpt.named_parameters():
        assert (weight.grad.double() - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def models(dtype: torch.dtype = torch.float64):
    """A model and its reference, with GPT-2's vocabulary."""
    shape = {"block_size": 64, "vocab_size": 50304, "n_vocab": 50259, "n_embd": 16, "n_layer": 2}
    return tiny_gpt(1, **shape).to(dtype), tiny_gpt(2, **shape).to(dtype)


def objective_of(folder: Path, reference, **changes) -> tuple[DPO, dict]:
    """The objective with the pairs in a folder, after setting the reference log probabilities of training."""
    config = config_of(dataset="pairs", block_size=64, dtype="float32")
    config = dataclasses.replace(config, objective="dpo", **changes)
    rows = {split: PairRows(stream, 64, 1) for split, stream in open_dataset(folder, "pairs")[0].items()}
    for each in rows.values():
        each.length = 64
    values = [[brute_force_log_prob(reference, [*p[:-2], p[at]]).item() for at in (-2, -1)] for p in _prepared()]
    rows["train"].reference = np.array(values[:30], dtype=np.float32)
    return DPO(config, rows), rows


def _prepared() -> list[list[dict]]:
    return list(preferences(pair_records(40)))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("changes", [{}, {"beta": 0.5, "label_smoothing": 0.1, "sft_weight": 0.3}])
def test_loss_and_gradients_equal_those_of_single_answers_without_padding(pairs, plain, changes):
    gpt, reference = models()
    settings = {"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, **changes}
    objective, rows = objective_of(pairs, reference, **settings, batch_size=4, gradient_accumulation_steps=3)
    expected = brute_force_loss(gpt, reference, _prepared()[:6], *settings.values())
    expected.backward()
    gradients = {name: weight.grad.clone() for name, weight in gpt.named_parameters()}

    gpt = models(torch.float32)[0].train()
    if not plain:
        load_speedups(plain=False).speed_up_training(gpt)
    columns = zip(*((*rows["train"].pair(number), rows["train"].reference[number]) for number in range(6)), strict=True)
    batch = [np.stack(column) for column in columns]
    found = forward_backward(gpt, objective.config, objective, batch)
    assert abs(float(found[0]) - expected.item()) < 1e-5
    require_close_gradients(gpt, gradients)


def test_at_the_reference_the_loss_is_log_2_and_the_gradient_points_from_rejected_to_chosen():
    log_probs = torch.tensor([[-3.0, -5.0], [-7.0, -2.0]], requires_grad=True)
    losses, margins = dpo_losses(log_probs, log_probs.detach(), beta=0.2)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2) and margins.tolist() == [0.0, 0.0]
    losses.sum().backward()
    assert log_probs.grad.flatten().tolist() == pytest.approx([-0.1, 0.1, -0.1, 0.1])  # beta / 2


# --- rows ---


def test_only_the_two_answers_are_targets_and_nothing_else_is_in_a_row(pairs):
    rows = PairRows(open_dataset(pairs, "pairs")[0]["train"], 64, 1)
    assert len(rows) == 30 and rows.n_too_long == 0
    for number, pair in enumerate(_prepared()[:30]):
        ids, targets = rows.pair(number)
        for row, answer in enumerate(pair[-2:]):
            conversation = GPT2.encode_chat([*pair[:-2], answer])[:-2]  # without <|im_end|> and the line end
            assert ids[row, : len(conversation)].tolist() == conversation
            assert set(ids[row, len(conversation) :].tolist()) <= {GPT2.endoftext, GPT2.im_end}
            said = targets[row][targets[row] != IGNORED].tolist()
            assert said == [*GPT2.encode_text(answer["content"]), GPT2.im_end]


def test_pairs_that_do_not_fit_are_left_out_and_counted(pairs):
    stream = open_dataset(pairs, "pairs")[0]["train"]
    lengths = [
        max(len(GPT2.encode_chat([*pair[:-2], answer])) - 2 for answer in pair[-2:]) for pair in _prepared()[:30]
    ]
    block_size = sorted(lengths)[14]
    rows = PairRows(stream, block_size, 1)
    assert (len(rows), rows.n_too_long) == (sum(n <= block_size for n in lengths), sum(n > block_size for n in lengths))
    assert f"{rows.n_too_long} pairs are too long and left out" in rows.describe()
    for number in range(len(rows)):
        ids, targets = rows.pair(number)
        assert ids.shape == targets.shape == (2, rows.length) and rows.length <= block_size
    with pytest.raises(UserError, match=r"none of the 30 pairs of .* fits into 8 tokens"):
        PairRows(stream, 8, 1)


def test_each_epoch_has_every_pair_once_in_another_order(pairs):
    rows = PairRows(open_dataset(pairs, "pairs")[0]["train"], 64, 1)
    rows.reference = np.arange(60, dtype=np.float32).reshape(30, 2)
    orders = []
    for epoch in range(3):
        orders.append([int(rows.row(index)[2][0]) // 2 for index in range(rows.start_epoch(epoch))])
        assert sorted(orders[-1]) == list(range(30))
    assert len({str(order) for order in orders}) == 3


def test_evaluate_refuses_pairs_in_a_sentence(pairs):
    options = EvaluateOptions(checkpoints=(str(pairs / "talks4.pt"),), dataset=("pairs",), data_dir=str(pairs))
    with pytest.raises(UserError, match=r"pairs contains preference pairs, which have no loss per token"):
        measure(options)


# --- whole runs ---


def test_a_run_learns_the_preference_logs_it_and_makes_a_chat_model(pairs, tmp_path, capsys):
    assert start(pairs, tmp_path, max_iters=30, eval_interval=30, eval_iters=5, learning_rate=1e-2) == 0
    output = capsys.readouterr().out
    assert "validation loss 0.6931, reward margin 0, accuracy 0, drift 0" in output
    assert "python gen.py" in output and output.rstrip().endswith("--chat")
    log = read_metrics(tmp_path / "pairs30.jsonl")
    assert log[0]["val_loss"] == pytest.approx(math.log(2))
    last = log[-1]
    assert last["val_loss"] < 0.6 and last["val_accuracy"] > 0.8 and last["val_reward_margin"] > 0.2
    assert last["val_drift"] > 0 and {"reward_margin", "accuracy", "drift"} <= last.keys()
    info = load_checkpoint(tmp_path / "pairs30.pt")["info"]
    assert info["format"] == "chat" and info["tokens_seen"] == 30 * 4 * 64


def test_a_run_stopped_after_every_iteration_equals_an_uninterrupted_one(pairs, tmp_path):
    straight, stopped = tmp_path / "a" / "pairs10", tmp_path / "b" / "pairs10"
    more = {"dropout": 0.2, "gradient_accumulation_steps": 2, "sft_weight": 0.1}
    assert start(pairs, straight, **more) == 0
    assert start(pairs, stopped, stop_after=1, **more) == 130
    for _ in range(9):
        assert run(pairs, stopped, resume=True, dataset="pairs", stop_after=1) == 130
    assert run(pairs, stopped, resume=True, dataset="pairs") == 0
    for folder in (straight, stopped):
        folder.with_suffix(".txt").touch()
    # A resumed run does not name what it started from.
    assert differences(stopped, straight) == ["pairs10-best.pt: info.config", "pairs10.pt: info.config"]
    ours, theirs = (load_checkpoint(folder / "pairs10.pt")["info"]["config"] for folder in (stopped, straight))
    assert {key for key in ours if ours[key] != theirs[key]} <= {"resume", "out_dir", "init_from"}


def test_reference_log_probabilities_are_computed_once_and_belong_to_model_and_data(pairs, tmp_path, capsys):
    assert start(pairs, tmp_path, stop_after=2) == 130
    assert "reference: computing the log probabilities of 80 answers" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.npz")
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    gpt = models(torch.float32)[0]  # any model of the class
    saved = load_checkpoint(pairs / "talks4.pt")
    gpt = type(gpt)(dataclasses.replace(gpt.config, **{k: saved["info"]["model"][k] for k in ("n_head", "n_embd")}))
    gpt.load_state_dict(saved["model"])
    for split, found in (("train", _prepared()[:30]), ("val", _prepared()[30:])):
        expected = [[brute_force_log_prob(gpt, [*p[:-2], p[at]]).item() for at in (-2, -1)] for p in found]
        np.testing.assert_allclose(kept[split], expected, atol=1e-4)
    assert run(pairs, tmp_path, resume=True, dataset="pairs", stop_after=1) == 130
    assert "reference: log probabilities from" in capsys.readouterr().out
    # Another beta takes the same file; another model, or a file of another model, does not.
    assert start(pairs, tmp_path, max_iters=2, beta=0.3) == 0
    assert "reference: log probabilities from" in capsys.readouterr().out
    assert start(pairs, tmp_path, max_iters=3, init_from=str(tmp_path / "pairs2.pt")) == 0
    assert "reference: computing" in capsys.readouterr().out
    (other,) = set(tmp_path.glob("*.npz")) - {path}
    path.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"without it .*pairs10.pt cannot be resumed"):
        run(pairs, tmp_path, resume=True, dataset="pairs", max_iters=10)


def test_an_adapter_learns_with_its_base_as_the_reference_and_resumes(pairs, tmp_path, capsys):
    full, straight, stopped = (tmp_path / name / "pairs10" for name in ("full", "a", "b"))
    adapter = {"lora_rank": 2, "n_embd": None, "n_layer": None, "n_head": None}
    assert start(pairs, full, max_iters=1) == 0
    assert start(pairs, straight, **adapter) == start(pairs, stopped, stop_after=3, **adapter) - 130 == 0
    (path,), (theirs,) = straight.glob("*.npz"), full.glob("*.npz")
    with np.load(path) as ours, np.load(theirs) as expected:
        for split in ("train", "val"):
            np.testing.assert_allclose(ours[split], expected[split], atol=1e-5)
    assert run(pairs, stopped, resume=True, dataset="pairs") == 0
    for folder in (straight, stopped):
        folder.with_suffix(".txt").touch()
    assert differences(stopped, straight) == ["pairs10-best.pt: info.config", "pairs10.pt: info.config"]
    assert (
        load_checkpoint(straight / "pairs10.pt")["model"].keys() != load_checkpoint(full / "pairs1.pt")["model"].keys()
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": "talks"}, "--objective dpo needs one data set of preference pairs, and talks is something else"),
        ({"dataset": "pairs=0.5,talks=0.5"}, "--objective dpo needs one data set of preference pairs"),
        ({"objective": "next_token"}, "pairs contains preference pairs, which have no next-token loss"),
        ({"objective": "next_token", "dataset": "pairs=1,talks=1"}, "dpo --init_from CHECKPOINT, without a mixture"),
        ({"objective": "next_token", "dataset": "talks", "beta": 0.2}, "--beta is for --objective dpo"),
        ({"init_from": None, "n_embd": 8, "n_head": 2, "n_layer": 1}, "name it with --init_from CHECKPOINT"),
        ({"loss_on": "all"}, "--loss_on has no effect"),
        ({"document_mask": True}, "--document_mask has no effect"),
        ({"batch_size": 3}, "needs both answers of a pair in one micro-batch, and a process has 3 sequences"),
        ({"batch_size": "auto"}, "--batch_size auto cannot try"),
    ],
)
def test_what_does_not_fit_is_a_sentence(pairs, tmp_path, changes, sentence):
    with pytest.raises(UserError) as refusal:
        start(pairs, tmp_path, **changes)
    assert sentence in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_cannot_change_beta(pairs, tmp_path):
    assert start(pairs, tmp_path, stop_after=1) == 130
    with pytest.raises(UserError, match=r"--beta 0.2 contradicts .*pairs10.pt, which was made with 0.1"):
        run(pairs, tmp_path, resume=True, dataset="pairs", beta=0.2)
