"""Mixtures: each part has its share of the rows and its own epochs; a run resumes exactly and tells all its data."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cli import UserError
from data.dataset import open_dataset, trained_on
from tests.test_train_config import config_of
from tests.tiny import OPTIONS, differences, failing_at, load_checkpoint, losses, prepare, run
from training.batches import Batches
from training.datasets import make_rows, open_data
from training.metrics import draw_curves, read_metrics
from training.mixture import MixedRows, mixture_name, parse_mixture
from training.options import TrainOptions
from training.progress import Sampler
from training.rows import ChatRows, TextRows

MIXED = "text=0.6,chat=0.4"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(prepare(tmp_path_factory.mktemp("data")), "chat")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def half(data, tmp_path):
    """The folder of a mixed run stopped at iteration 5 of 10."""
    assert run(data, tmp_path / "half", stop_after=5, dataset=MIXED) == 130
    return tmp_path / "half"


# What --dataset means


@pytest.mark.parametrize(
    ("dataset", "shares"),
    [
        ("story", {"story": "1"}),
        ("chat=1", {"chat": "1"}),
        ("chat=.25", {"chat": "1"}),
        ("story=0.7,chat=0.3", {"story": "7/10", "chat": "3/10"}),
        ("story=7,chat=3", {"story": "7/10", "chat": "3/10"}),
        ("c=1,a=1,b=1.0", {"c": "1/3", "a": "1/3", "b": "1/3"}),
    ],
)
def test_weights_become_shares_that_are_one_together(dataset, shares):
    assert parse_mixture(dataset) == {name: Fraction(share) for name, share in shares.items()}
    assert list(parse_mixture(dataset)) == list(shares), "in the order in which they were written"
    assert mixture_name(dataset) == "+".join(shares)


@pytest.mark.parametrize("weight", ["0", "0.0", "-1", "nan", "inf", "1e3", "", "x", "1/2", "٣"])
@pytest.mark.parametrize("dataset", ["story={}", "story={},chat=1", "chat=1,story={}"])
def test_a_weight_that_is_no_positive_number_is_refused(dataset, weight):
    with pytest.raises(ValueError, match=r"the weight of story must be a number above 0 .*, not ") as error:
        TrainOptions(dataset=dataset.format(weight))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        ("story=1,story=2", "story occurs twice"),
        ("story,chat", r"a name such as story, or story=0.7,chat=0.3, not 'story,chat'"),
        ("story=1,chat", "a name such as story, or"),
        ("story=1,", "a name such as story, or"),
        ("", "a name such as story, or"),
        ("../story=1,chat=2", "a name such as story, or"),
        ("story=0.123456789,chat=1", "too many digits; round them"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_sentence(dataset, sentence):
    with pytest.raises(ValueError, match=f"dataset.* {sentence}"):
        TrainOptions(dataset=dataset)


def test_a_part_without_its_data_names_the_command(data, tmp_path):
    with pytest.raises(UserError, match=r"story-train.bin not found; run: python data/prepare-story.py"):
        run(data, tmp_path / "models", dataset="text=0.5,story=0.5")
    assert not (tmp_path / "models").exists()


# Rows


class Counted:
    """Stands in for a part: epochs of 5, 6, 5, 6 ... rows, each told by name, epoch and number."""

    def __init__(self, name: int):
        self.name = name

    def start_epoch(self, epoch: int) -> int:
        self.epoch = epoch
        return 5 + epoch % 2

    def row(self, index: int):
        return np.array([self.name, self.epoch, index]), np.zeros(3, dtype=np.int64)


def rounds(mixed: MixedRows, n: int) -> list[list[tuple]]:
    return [[tuple(mixed.row(index)[0].tolist()) for index in range(mixed.start_epoch(number))] for number in range(n)]


def test_each_round_holds_the_shares_and_each_part_its_own_epochs():
    shares = [Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)]
    mixed = MixedRows([Counted(name) for name in range(3)], shares, 1)
    made = rounds(mixed, 40)
    assert rounds(mixed, 3) == made[:3], "also when it begins again"
    for rows in made:
        assert Counter(name for name, _, _ in rows) == {0: 5, 1: 3, 2: 2}
    for name in range(3):
        own = [row[1:] for row in itertools.chain(*made) if row[0] == name]
        expected = ((epoch, index) for epoch in itertools.count() for index in range(5 + epoch % 2))
        assert own == list(itertools.islice(expected, len(own))), "none left out, none twice, in the part's order"


def test_the_order_follows_from_the_seed_and_the_round():
    def order(seed, n=30):
        mixed = MixedRows([Counted(0), Counted(1)], [Fraction(3, 5), Fraction(2, 5)], seed)
        return [[name for name, _, _ in rows] for rows in rounds(mixed, n)]

    assert order(1) == order(1) != order(2)
    first = Counter(rows[0] for rows in order(1, 500))
    assert 250 < first[0] < 350, "three in five rounds begin with the larger part"
    assert len(set(map(tuple, order(1, 500)))) == 10, "every order of three and two occurs"


def test_a_mixture_goes_on_from_any_position(data):
    def batches(n, position=None):
        parts = [TextRows(open_dataset(data, "text")[0]["train"], 16, 3)]
        parts.append(ChatRows(open_dataset(data, "chat")[0]["train"], 16, 3))
        made = Batches(MixedRows(parts, [Fraction(3, 5), Fraction(2, 5)], 3), 4, position)
        try:
            return [(*made.next(), dict(made.position)) for _ in range(n)]
        finally:
            made.close()

    straight = batches(60)
    assert len(open_dataset(data, "chat")[0]["train"]) / 17 < 60 * 4 * 2 / 5, "past the chat part's first epoch"
    for k in range(59):
        ids, targets, position = batches(1, straight[k][2])[0]
        assert (ids == straight[k + 1][0]).all() and (targets == straight[k + 1][1]).all()
        assert position == straight[k + 1][2]


@pytest.mark.parametrize("loss_on", [None, "all"])
def test_loss_on_is_about_the_conversations_alone(data, loss_on):
    opened = open_data(MIXED, str(data))
    parts = opened.parts
    config = config_of(opened.facts, dataset=MIXED, block_size=16, loss_on=loss_on)
    rows, val_batches = make_rows(opened, config)
    assert list(val_batches) == ["text", "chat"]
    text, chat = (parts[name][0]["train"] for name in parts)
    expected = [TextRows(text, 16, config.seed), ChatRows(chat, 16, config.seed, loss_on or "assistant")]
    n_rows, taken = [part.start_epoch(0) for part in expected], [0, 0]
    while taken[0] < n_rows[0] and taken[1] < n_rows[1]:  # each row is the next of one of the parts
        for index in range(rows.start_epoch(sum(taken) // 5)):
            ids, targets = rows.row(index)
            heads = [
                part.row(done) if done < n else None for part, done, n in zip(expected, taken, n_rows, strict=True)
            ]
            if None in heads:
                break
            is_own = [(ids == head[0]).all() and (targets == head[1]).all() for head in heads]
            assert is_own.count(True) == 1
            taken[is_own.index(True)] += 1
    assert min(taken) > 20


# Runs

# Losses of iterations 1 to 10 with tests.tiny's options and one thread: of text before there were mixtures (commit
# 11d1597), of chat since rows without a target are left out (the same run at the commit that introduced this).
GOLDEN = {
    "text": [25.3160, 23.0526, 24.1127, 24.8147, 23.2302, 23.9597, 22.7448, 23.4029, 22.1171, 23.5001],
    "chat": [26.3300, 26.4413, 22.6219, 24.8822, 22.8678, 27.0563, 23.0199, 17.6563, 27.2911, 24.5915],
}


@pytest.mark.parametrize("name", ["text", "chat"])
def test_one_data_set_trains_as_it_did_and_so_does_a_mixture_of_it_alone(data, tmp_path, monkeypatch, name):
    tokens_per_iter = config_of(**OPTIONS).tokens_per_iter
    monkeypatch.setattr("training.optimizers.EMBEDDING_EPS", 1e-8 * tokens_per_iter)  # as it was then
    monkeypatch.setattr("training.muon.n_parts", lambda weight: 1)  # as in torch, then
    run(data, tmp_path / "a", dataset=name, document_mask=False, schedule="cosine")  # and this, then too
    run(data, tmp_path / "b", dataset=f"{name}=1", document_mask=False, schedule="cosine")
    records = losses(tmp_path / "a" / f"{name}10.jsonl")
    np.testing.assert_allclose([record[1] for record in records[1:]], GOLDEN[name], rtol=1e-3)
    saved = [load_checkpoint(tmp_path / folder / f"{name}10.pt") for folder in "ab"]
    saved[1]["info"]["config"]["dataset"] = name
    for run_ in saved:
        run_["info"]["elapsed_s"] = run_["info"]["config"]["out_dir"] = None
        run_["info"].pop("digests", None)
    assert saved[0]["info"] == saved[1]["info"]
    assert all(torch.equal(weight, saved[1]["model"][key]) for key, weight in saved[0]["model"].items())
    assert losses(tmp_path / "b" / f"{name}10.jsonl") == records
    assert not any("/" in key for record in read_metrics(tmp_path / "a" / f"{name}10.jsonl") for key in record)


def test_a_mixed_run_stopped_after_every_iteration_equals_an_uninterrupted_one(data, tmp_path, capsys):
    straight, stopped = tmp_path / "a" / "text+chat10", tmp_path / "b" / "text+chat10"
    sample = Sampler()
    options = {"dataset": MIXED, "dropout": 0.2, "batch_size": 6, "keep": 1, "sample": sample}
    assert run(data, straight, **options) == 0
    straight.with_suffix(".txt").write_text(capsys.readouterr().out)
    assert run(data, stopped, stop_after=1, **options) == 130
    for _ in range(9):
        assert run(data, stopped, resume=True, stop_after=1, dataset=MIXED, sample=sample) == 130
    assert run(data, stopped, resume=True, dataset=MIXED, sample=sample) == 0
    stopped.with_suffix(".txt").write_text(capsys.readouterr().out)
    assert differences(stopped, straight) == []
    assert load_checkpoint(straight / "text+chat10.pt")["training"]["position"] == {"epoch": 11, "row": 5}
    assert [record[0] for record in losses(stopped / "text+chat10.jsonl")] == list(range(11))


def test_a_resume_takes_the_mixture_over_and_refuses_another(data, half, capsys):
    path = half / "text+chat10.pt"
    for dataset in ("text=0.5,chat=0.5", "chat=0.4,text=0.6,more=1", "text"):
        with pytest.raises(UserError, match=rf"--dataset {dataset} contradicts .*, which was made with {MIXED}; leave"):
            run(data, half, resume=path, dataset=dataset)
    with pytest.raises(UserError, match=r"text10.pt not found; there are .*text\+chat10.pt"):
        run(data, half, resume=True, dataset="text")
    before = load_checkpoint(path)["info"]["val_losses"]
    assert run(data, half, resume=path, stop_after=1) == 130
    info = load_checkpoint(path)["info"]
    assert info["iter_num"] == 6 and info["val_losses"] == before and list(before) == ["text", "chat"]
    assert run(data, half, resume=path, dataset="text=6,chat=4", max_iters=12) == 0, "the same shares"
    assert "resume: dataset" not in capsys.readouterr().out
    info = load_checkpoint(half / "text+chat12.pt")["info"]
    assert (info["dataset"], info["config"]["dataset"], info["iter_num"]) == ("text+chat", MIXED, 12)
    assert [record[0] for record in losses(half / "text+chat12.jsonl")] == list(range(13))


@pytest.mark.parametrize("changed", ["text", "chat"])
def test_a_part_that_changed_in_between_is_refused(data, half, tmp_path, changed):
    other = prepare(prepare(tmp_path / "other"), "chat")
    prepare(other, changed, n_tokens=610)
    with pytest.raises(UserError, match=rf"the data set {changed} has changed since .*text\+chat10.pt was made"):
        run(other, half, resume=half / "text+chat10.pt")


def test_each_parts_validation_loss_is_reported_and_the_mean_counts(data, tmp_path, capsys):
    for folder, dataset in (("text", "text"), ("chat", "chat"), ("mixed", MIXED)):
        assert run(data, tmp_path / folder, dataset=dataset, document_mask=False, sample=Sampler()) == 0
    output = capsys.readouterr().out
    alone = {name: losses(tmp_path / name / f"{name}10.jsonl")[0][2] for name in ("text", "chat")}
    records = read_metrics(tmp_path / "mixed" / "text+chat10.jsonl")
    evaluated = [record for record in records if "val_loss" in record]
    assert [record["iter_num"] for record in evaluated] == [0, 4, 8, 10]
    before = evaluated[0]  # the same new model on the same rows
    assert {name: before[f"val_loss/{name}"] for name in alone} == alone
    for record in evaluated:
        text, chat = record["val_loss/text"], record["val_loss/chat"]
        assert record["val_loss"] == pytest.approx(0.6 * text + 0.4 * chat)
        mean = f"weighted mean of text {text:.4f}, chat {chat:.4f}"
        assert any(
            line.startswith(f"iter {record['iter_num']}: validation loss {record['val_loss']:.4f}") and mean in line
            for line in output.splitlines()
        )
    assert not any("val_loss/text" in record for record in records if "val_loss" not in record)
    best = min(evaluated, key=lambda record: record["val_loss"])
    info = load_checkpoint(tmp_path / "mixed" / "text+chat10-best.pt")["info"]
    assert info["best_val_loss"] == info["val_loss"] == best["val_loss"] and info["iter_num"] == best["iter_num"]
    assert info["val_losses"] == {"text": best["val_loss/text"], "chat": best["val_loss/chat"]}
    assert output.split("weighted mean")[-1].count("sample:") == 2, "a text and an answer"


def test_an_error_after_an_evaluation_keeps_the_losses_that_belong_together(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", failing_at(2, torch.save))
    with pytest.raises(RuntimeError, match="a bug"):
        run(data, tmp_path, dataset=MIXED)
    info = load_checkpoint(tmp_path / "text+chat10.pt")["info"]
    first = read_metrics(tmp_path / "text+chat10.jsonl")[0]
    assert info["iter_num"] == 4 and info["val_loss"] == first["val_loss"], "that of iteration 4 is made again"
    assert info["val_losses"] == {name: first[f"val_loss/{name}"] for name in ("text", "chat")}


def test_the_curves_of_each_part_are_drawn(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    labels = []
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *arguments, **settings: labels.extend(
            text.get_text() for text in self.axes[0].get_legend().get_texts()
        ),
    )
    records = [{"iter_num": n, "loss": 3.0, "val_loss": 2.0, "val_loss/a": 1.0, "val_loss/b": 2.5} for n in (0, 1)]
    assert draw_curves(tmp_path / "a.png", records, "a+b1")
    assert labels == ["training", "validation", "validation, a", "validation, b"]


# What is known of the data


def state(folder: Path, name: str, **facts) -> None:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_source_and_licence_of_the_data_are_said_and_kept(tmp_path, capsys):
    data = prepare(prepare(tmp_path / "data"), "chat")
    chat = {"source": "people talking", "licence": "CC BY-NC-SA 4.0", "non_commercial": True}
    state(data, "text", source="a book", licence="MIT", non_commercial=False)
    state(data, "chat", **chat)
    run(data, tmp_path / "a", dataset="chat", max_iters=1)
    lines = capsys.readouterr().out.splitlines()
    assert "source: people talking" in lines and "licence: CC BY-NC-SA 4.0 (non-commercial)" in lines
    facts = json.loads((data / "chat.json").read_text())
    assert load_checkpoint(tmp_path / "a" / "chat1.pt")["info"]["data"] == facts, "all that the .json says"

    run(data, tmp_path / "b", dataset="text=3,chat=1", max_iters=1)
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "source: a book",
        "licence: MIT",
        "source: people talking",
        "licence: CC BY-NC-SA 4.0 (non-commercial)",
    ):
        assert line in lines
    assert any(line.startswith("data: text (text), 75 % of the rows, train 600 tokens") for line in lines)
    info = load_checkpoint(tmp_path / "b" / "text+chat1.pt")["info"]
    assert info["format"] == "chat" and info["data"]["format"] == "chat", "it can chat"
    assert info["data"]["parts"][1] == {**facts, "weight": 0.25}
    assert list(trained_on(info)) == ["text", "chat"] and trained_on(info)["text"]["licence"] == "MIT"
    assert trained_on({"dataset": "story"}) == {"story": {}}
