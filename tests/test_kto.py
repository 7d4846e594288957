"""KTO: losses and gradients against a brute-force reference, the rows of labelled answers, and whole runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cli import UserError
from common.speedups import load_speedups
from data.dataset import open_dataset
from data.layouts.preferences import labelled_answers
from data.pipeline import Corpus, Dataset, PrepareOptions
from data.pipeline import prepare as prepare_files
from evaluate import EvaluateOptions, measure
from model import IGNORED
from setup_tokenizer import GPT2
from tests.test_dpo import brute_force_log_prob, models, require_close_gradients
from tests.test_train_config import config_of
from tests.tiny import differences, label_records, load_checkpoint, prepare, prepare_labels, prepare_pairs, run
from training.kto import KTO, kto_losses, reference_point
from training.label_rows import LabelRows
from training.metrics import read_metrics
from training.options import TrainOptions
from training.step import forward_backward

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")

RUN_OPTIONS = {"dataset": "labels", "objective": "kto", "batch_size": 8, "block_size": 64, "learning_rate": 3e-3}
N_TRAIN = 30
# Of the labels of training, 10 are good and 20 bad: with these weights both kinds weigh the same, and 1 on average.
GOOD_WEIGHT, BAD_WEIGHT = 1.5, 0.75


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    """A folder with the prepared data sets "labels", "pairs" and "text", and a model's checkpoint, text4.pt."""
    folder = prepare(tmp_path_factory.mktemp("labels"), n_tokens=2000)
    prepare_labels(folder, N_TRAIN)
    prepare_pairs(folder, n_pairs=4, n_val=2)
    assert run(folder, folder, block_size=64, max_iters=4, n_embd=16) == 0
    return folder


def start(labels: Path, out_dir: Path, **changes) -> int:
    """A new run of KTO from the model."""
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd"))
    return run(labels, out_dir, **{**shape, **RUN_OPTIONS, "init_from": str(labels / "text4.pt"), **changes})


def rows_of(labels: Path, block_size: int = 64) -> LabelRows:
    return LabelRows(open_dataset(labels, "labels")[0]["train"], block_size, 1)


def conversation(number: int, answer_of: int) -> list[dict]:
    """The prompt of one label of training with the answer of a label, perhaps another one."""
    records = label_records(N_TRAIN + 10)
    answer = {"role": "assistant", "content": records[answer_of]["completion"]}
    return [*records[number]["prompt"], answer]


@pytest.fixture(scope="module")
def others(labels) -> list[int]:
    """Whose answer each label's second row has, found by comparing it with every answer."""
    rows, found = rows_of(labels), []
    records = label_records(N_TRAIN)
    answers = [[*GPT2.encode_text(record["completion"]), GPT2.im_end] for record in records]
    for number, record in enumerate(records):
        row = rows.pair(number)[0][1].tolist()
        prompt = GPT2.encode_chat(record["prompt"], add_generation_prompt=True)
        assert row[: len(prompt)] == prompt
        said = [token for token in row[len(prompt) :] if token != GPT2.endoftext]
        found.append(next(other for other, answer in enumerate(answers) if said in (answer, answer[:-1])))
    return found


# --- the oracle: one answer at a time, without padding, in float64 ---


def brute_force_loss(gpt, reference, numbers: list[int], others: list[int], beta: float) -> torch.Tensor:
    """The mean loss of one micro-batch by the paper, section 4.1, as TRL's KTOTrainer has it (commit of 2026)."""

    def log_ratio(messages):
        return brute_force_log_prob(gpt, messages) - brute_force_log_prob(reference, messages).detach()

    shifts = [log_ratio(conversation(number, others[number])).item() for number in numbers]
    point = max(0.0, sum(shifts) / len(shifts))
    total = torch.zeros((), dtype=torch.float64)
    for number in numbers:
        reward = beta * log_ratio(conversation(number, number))
        if number % 3 == 0:
            total = total + GOOD_WEIGHT * (1 - torch.sigmoid(reward - beta * point))
        else:
            total = total + BAD_WEIGHT * (1 - torch.sigmoid(beta * point - reward))
    return total / len(numbers)


@pytest.mark.parametrize(("plain", "beta"), [(True, 0.1), (False, 0.7)])
def test_loss_and_gradients_equal_those_of_single_answers_without_padding(labels, others, plain, beta):
    rows = rows_of(labels)
    gpt, reference = models()
    expected = torch.stack([brute_force_loss(gpt, reference, part, others, beta) for part in ([0, 1, 2], [3, 4, 5])])
    expected.mean().backward()
    gradients = {name: weight.grad.clone() for name, weight in gpt.named_parameters()}

    rows.length = 64
    for number in range(6):
        messages = conversation(number, number), conversation(number, others[number])
        rows.reference[number] = [brute_force_log_prob(reference, each).item() for each in messages]
    config = config_of(dataset="labels", block_size=64, dtype="float32")
    config = dataclasses.replace(config, objective="kto", beta=beta, batch_size=6, gradient_accumulation_steps=2)
    gpt = models(torch.float32)[0].train()
    if not plain:
        load_speedups(plain=False).speed_up_training(gpt)
    items = [(*rows.pair(number), rows.reference[number], rows.labels[number]) for number in range(6)]
    batch = [np.stack(column) for column in zip(*items, strict=True)]
    found = forward_backward(gpt, config, KTO(config, {"train": rows}), batch)
    assert abs(float(found[0]) - expected.mean().item()) < 1e-5
    require_close_gradients(gpt, gradients)


def test_at_the_reference_every_loss_is_a_half_and_no_gradient_flows_through_the_reference_point():
    log_ratios = torch.zeros(2, requires_grad=True)
    point = reference_point(torch.zeros(2), torch.ones(2, dtype=torch.bool))
    losses = kto_losses(log_ratios, torch.tensor([1.0, -1.0]), point, beta=0.2)
    assert losses.tolist() == [0.5, 0.5]
    losses.sum().backward()
    assert log_ratios.grad.tolist() == pytest.approx([-0.05, 0.05])  # beta / 4: good answers up, bad ones down


def test_the_reference_point_is_a_mean_of_real_rows_and_never_negative():
    is_real = torch.tensor([True, True, False])
    assert reference_point(torch.tensor([3.0, 1.0, 99.0]), is_real) == 2.0
    assert reference_point(torch.tensor([-3.0, 1.0, 99.0]), is_real) == 0.0
    assert reference_point(torch.tensor([3.0]), torch.tensor([False])) == 0.0


# --- rows ---


def test_a_label_has_a_row_with_its_answer_and_one_with_that_of_another_prompt(labels, others):
    rows = rows_of(labels)
    assert len(rows) == N_TRAIN and "30 labelled answers" in rows.describe()
    assert rows.describe().endswith("10 good and 20 bad")
    for number in range(N_TRAIN):
        ids, targets = rows.pair(number)
        own = GPT2.encode_chat(conversation(number, number))[:-2]
        assert ids[0, : len(own)].tolist() == own
        said = targets[0][targets[0] != IGNORED].tolist()
        assert said == [*GPT2.encode_text(conversation(number, number)[-1]["content"]), GPT2.im_end]
    assert sorted(others) == list(range(N_TRAIN)) and all(other != at for at, other in enumerate(others))
    assert rows.labels.tolist() == [-BAD_WEIGHT if number % 3 else GOOD_WEIGHT for number in range(N_TRAIN)]


def test_answers_that_do_not_fit_are_left_out_and_other_answers_are_cut(labels):
    lengths = [len(GPT2.encode_chat(conversation(number, number))) - 2 for number in range(N_TRAIN)]
    block_size = sorted(lengths)[20]
    rows = rows_of(labels, block_size)
    kept = [number for number in range(N_TRAIN) if lengths[number] <= block_size]
    assert (len(rows), rows.n_too_long) == (len(kept), N_TRAIN - len(kept))
    n_cut = 0
    for at, number in enumerate(kept):
        ids, targets = rows.pair(at)
        assert ids.shape == targets.shape == (2, block_size)
        assert (targets[0] != IGNORED).sum() == len(GPT2.encode_text(conversation(0, number)[-1]["content"])) + 1
        said = targets[1] != IGNORED
        n_cut += not (targets[1][said] == GPT2.im_end).any()
        before = np.flatnonzero(said[:-1])
        assert (targets[1][before] == ids[1][before + 1]).all()
    assert n_cut > 0
    with pytest.raises(UserError, match=r"none of the 30 labelled answers of .* fits into 8 tokens"):
        rows_of(labels, 8)


def test_labels_of_one_kind_have_the_weight_1(tmp_path):
    good = list(labelled_answers(record for record in label_records(40) if record["label"]))
    options = PrepareOptions(output_dir=str(tmp_path), workers=1)
    prepare_files(Dataset("labels", "label", "made", "MIT"), options, Corpus(good[2:], good[:2]))
    assert set(rows_of(tmp_path).labels.tolist()) == {1.0}


# --- whole runs ---


def test_a_run_learns_from_labels_logs_it_and_makes_a_chat_model(labels, tmp_path, capsys):
    assert start(labels, tmp_path, max_iters=30, eval_interval=30, eval_iters=5, learning_rate=1e-2) == 0
    output = capsys.readouterr().out
    assert "validation loss 0.5000, reward margin 0, accuracy 0, drift 0" in output
    assert "10 good and 20 bad" in output and output.rstrip().endswith("--chat")
    log = read_metrics(tmp_path / "labels30.jsonl")
    first, last = log[0], log[-1]
    assert first["val_loss"] == pytest.approx(0.5)
    # One thread, float32: 0.444, 0.7 and 0.47.
    assert last["val_loss"] < 0.47 and last["val_accuracy"] > 0.6 and last["val_reward_margin"] > 0.2
    assert last["val_drift"] > 0 and {"reward_margin", "accuracy", "drift"} <= last.keys()
    assert load_checkpoint(tmp_path / "labels30.pt")["info"]["format"] == "chat"


def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one(labels, tmp_path):
    straight, stopped = tmp_path / "a" / "labels6", tmp_path / "b" / "labels6"
    more = {"dropout": 0.2, "batch_size": 4, "gradient_accumulation_steps": 2, "max_iters": 6}
    assert start(labels, straight, **more) == 0
    assert start(labels, stopped, stop_after=2, **more) == 130
    resumed = {"resume": True, "dataset": "labels", "max_iters": 6}
    assert run(labels, stopped, stop_after=3, **resumed) == 130
    assert run(labels, stopped, **resumed) == 0
    for folder in (straight, stopped):
        folder.with_suffix(".txt").touch()
    # A resumed run does not name what it started from.
    assert differences(stopped, straight) == ["labels6-best.pt: info.config", "labels6.pt: info.config"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"dataset": "pairs"},
            "needs one data set of labelled answers, and pairs is something else; prepare one with: "
            "python data/prepare-preferences.py --labels",
        ),
        ({"objective": "dpo"}, "--objective dpo needs one data set of preference pairs, and labels is something else"),
        (
            {"objective": "next_token"},
            "labels contains labelled answers, which have no next-token loss; train with --objective kto",
        ),
        ({"sft_weight": 0.1}, "--sft_weight is for --objective dpo; leave it out"),
        ({"objective": "next_token", "dataset": "text", "beta": 0.2}, "--beta is for --objective dpo and kto"),
        ({"batch_size": 3}, "needs both rows of a labelled answer in one micro-batch, and a process has 3 sequences"),
    ],
)
def test_what_does_not_fit_is_a_sentence(labels, tmp_path, changes, sentence):
    with pytest.raises(UserError) as refusal:
        start(labels, tmp_path, **changes)
    assert sentence in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "--beta must be above 0"),
        ({"beta": -0.1}, "--beta must be above 0"),
        ({"label_smoothing": 0.5}, "--label_smoothing must be at least 0 and below 0.5"),
        ({"dataset": "story"}, "--objective kto needs preferences; name a data set of them with --dataset"),
        ({"objective": "ppo"}, "--objective must be next_token, dpo or kto"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**{**RUN_OPTIONS, "init_from": "models/none.pt", **options})


def test_evaluate_refuses_labels_in_a_sentence(labels):
    options = EvaluateOptions(checkpoints=(str(labels / "text4.pt"),), dataset=("labels",), data_dir=str(labels))
    with pytest.raises(UserError, match=r"labels contains labelled answers, which have no loss per token"):
        measure(options)
