"""testing_tools/compare_optimizers.py: its variants do what they say, and its runs are train.py's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from model import GPT, GPTConfig
from training.initialization import make_model
from training.options import TrainOptions

sys.path.append(str(Path(train.__file__).parent / "testing_tools"))
import compare_optimizers
from compare_optimizers import average_of, cut
from optimizer_variants import (
    VARIANTS,
    CautiousMuon,
    HyperballMuon,
    Muon,
    NorMuon,
    PolarMuon,
    WholeMuon,
    best_quintic,
    growing,
    polar_coefficients,
    published_embeddings,
    wide_matrices,
    zero_projections,
)
from random_data import write_dataset

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}


@pytest.mark.parametrize(("low", "high"), [(0.02, 1.0), (0.2, 1.8), (0.6, 1.4)])
def test_no_other_quintic_has_a_smaller_largest_error(low, high):
    """The largest error is convex in the coefficients, so a minimum among near ones is the minimum."""
    x = np.linspace(low, high, 4001)

    def largest_error(coefficients):
        a, b, c = coefficients
        return np.abs(1 - (a * x + b * x**3 + c * x**5)).max()

    best = np.array(best_quintic(low, high))
    rng = np.random.default_rng(0)
    others = [largest_error(best * (1 + 1e-3 * rng.standard_normal(3))) for _ in range(500)]
    assert largest_error(best) < min(others)
    assert largest_error(best) < largest_error([15 / 8, -10 / 8, 3 / 8])


def test_polar_iterations_bring_singular_values_nearer_to_one_than_muons():
    values = torch.logspace(-2.4, 0, 30, dtype=torch.float64)
    u, _, v = torch.linalg.svd(torch.randn(30, 50, dtype=torch.float64), full_matrices=False)
    matrix = (u * values) @ v
    distances = []
    for kind in (PolarMuon, torch.optim.Muon):
        optimizer = kind([torch.nn.Parameter(torch.ones(2, 2))])
        group = optimizer.param_groups[0]
        orthogonalised = Muon.orthogonalised if kind is torch.optim.Muon else kind.orthogonalised
        for one in (matrix, matrix.T):
            found = torch.linalg.svdvals(orthogonalised(optimizer, one[None] / matrix.norm(), group)[0])
            distances.append(float((found - 1).abs().max()))
    assert max(distances[:2]) < 0.2 < min(distances[2:])
    assert len(polar_coefficients(3)) == 3


def test_cautious_decay_is_that_of_weights_that_the_update_makes_smaller():
    start = torch.tensor([[2.0, -2.0], [3.0, 4.0]])
    weight = torch.nn.Parameter(start.clone())
    optimizer = CautiousMuon([weight], lr=0.1, weight_decay=0.5)
    update = torch.tensor([[[0.5, 0.5], [-0.5, 0.0]]])
    with torch.no_grad():
        optimizer.apply([weight], update, optimizer.param_groups[0])
    decayed = torch.tensor([[True, False], [False, False]])
    torch.testing.assert_close(weight.detach(), start * (1 - 0.05 * decayed) - 0.1 * update[0])


def test_normuon_gives_rows_of_unequal_size_the_same_share_and_keeps_the_norm():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = NorMuon([weight], lr=0.1, weight_decay=0.5)
    # The rows' running means of squares: first 0.05 of 12.5 and 0.125, then 0.95 of that and 0.05 of 12.5 and 50.
    second = 5 / (0.0475 * 12.5 + 0.05 * 12.5) ** 0.5 / (10 / (0.0475 * 0.125 + 0.05 * 50) ** 0.5)
    for rows, expected in (([[3.0, 4.0], [0.3, 0.4]], [1.0, 1.0]), ([[3.0, 4.0], [6.0, 8.0]], [second, 1.0])):
        update, before = torch.tensor([rows]), weight.detach().clone() * 0.95
        norm = update.norm()
        with torch.no_grad():
            optimizer.apply([weight], update, optimizer.param_groups[0])
        change = (before - weight.detach()) / 0.1
        assert float(change.norm()) == pytest.approx(float(norm))
        sizes = change.norm(dim=1) / change.norm(dim=1)[1]
        assert sizes.tolist() == pytest.approx(expected, rel=1e-4)


def test_whole_muon_takes_the_steps_of_torch_for_c_attn():
    steps = []
    for kind in (WholeMuon, torch.optim.Muon, Muon):
        weight = torch.nn.Parameter(torch.zeros(96, 32))
        weight.grad = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
        dtype = {} if kind is torch.optim.Muon else {"dtype": torch.bfloat16}
        kind([weight], lr=0.1, **dtype).step()
        steps.append(weight.detach())
    whole, expected, split = steps
    assert (whole - expected).norm() < 0.01 * expected.norm() < 0.1 * (split - expected).norm()


def test_the_hyperball_optimizer_keeps_the_norm_and_turns_by_the_rate():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    optimizer = HyperballMuon([weight], lr=0.1, weight_decay=0.0)
    with torch.no_grad():
        optimizer.apply([weight], torch.tensor([[[0.0, 2.0], [0.0, 0.0]]]), optimizer.param_groups[0])
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, -0.5], [0.0, 4.0]]) * 5 / 25.25**0.5)


def test_averaged_weights_lag_by_the_share_of_the_run():
    model = new_model()
    assert average_of(model, VARIANTS["muon"], 300) is None
    average = average_of(model, VARIANTS["averaged"], 400)  # a twentieth of 400 iterations: one in 20 of what is new
    average.update_parameters(model)
    expected = model.ln_f.weight.clone()
    for value in (2.0, 5.0):
        model.ln_f.weight.fill_(value)
        average.update_parameters(model)
        expected = 0.95 * expected + 0.05 * value
    torch.testing.assert_close(average.module.ln_f.weight, expected)


def new_model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    config = GPTConfig(n_vocab=512, vocab_size=512, n_layer=2, n_head=2, n_embd=64, block_size=128)
    return make_model(config).requires_grad_(False)


def test_zero_projections_make_blocks_that_add_nothing_at_first():
    model = new_model()
    zero_projections(model)
    ids = torch.arange(6)[None]
    embedded = model.wte(ids) + model.wpe(torch.arange(6))
    torch.testing.assert_close(model.hidden(ids), model.ln_f(embedded))


def test_the_other_initial_weights_have_the_spread_that_they_are_named_for():
    model = new_model()
    plain = new_model()
    wide_matrices(model)
    assert float(model.h[0].attn.c_attn.weight.std()) == pytest.approx(64**-0.5, rel=0.05)
    assert float(model.h[1].mlp.c_fc.weight.std()) == pytest.approx(64**-0.5, rel=0.05)
    assert model.h[0].attn.c_proj.weight.equal(plain.h[0].attn.c_proj.weight)
    assert float(plain.wte.weight.std()) == pytest.approx(0.02 * 768 / 64, rel=0.05)
    published_embeddings(model)
    assert float(model.wte.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.wpe.weight.std()) == pytest.approx(0.02, rel=0.05)


def test_a_growing_share_is_whole_after_half_of_the_tokens():
    assert [growing(done) for done in (0.0, 0.25, 0.5, 0.9)] == [0.25, 0.625, 1.0, 1.0]


def test_batches_are_cut_by_rows_or_by_tokens():
    batch = [np.arange(32).reshape(4, 8), np.arange(32).reshape(4, 8) + 1]
    ids, targets = cut(batch, VARIANTS["growing batch"], 0.25)
    assert ids.tolist() == batch[0][:2].tolist() and targets.tolist() == batch[1][:2].tolist()
    assert [column.shape for column in cut(batch, VARIANTS["growing rows"], 0.0)] == [(4, 2)] * 2
    assert [column.shape for column in cut(batch, VARIANTS["muon"], 0.0)] == [(4, 8)] * 2


def test_its_runs_are_train_pys_and_the_table_says_what_they_reached(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path, "random", "text", n_tokens=3000, seed=1)
    names = ("adamw", "muon", "growing rows", "falling decay")
    shape = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    words = [*shape, "--dataset", "random", "--data_dir", str(tmp_path), "--device", "cpu", "--batch_size", "4"]
    words += [
        "--max_iters",
        "4",
        "--eval_iters",
        "2",
        "--seeds",
        "3",
        "4",
        "--variants",
        "adamw",
        "muon",
        "growing rows",
        "falling decay",
    ]
    monkeypatch.setattr(sys, "argv", ["compare_optimizers.py", *words, "--json", str(tmp_path / "losses.json")])
    compare_optimizers.main()
    table = capsys.readouterr().out.splitlines()[-4:]
    found = {one["variant"]: one["losses"] for one in json.loads((tmp_path / "losses.json").read_text())["losses"]}
    assert [line.split("  ")[0] for line in table] == list(names)
    assert f"{min(found['muon']):8.3f}{max(found['muon']):8.3f}" in table[1]
    for optimizer in ("adamw", "muon"):
        given = {**SHAPE, "dataset": "random", "data_dir": str(tmp_path), "out_dir": str(tmp_path), "device": "cpu"}
        given |= {"batch_size": 4, "max_iters": 4, "eval_iters": 2, "seed": 3, "optimizer": optimizer, "compile": False}
        train.train(TrainOptions(**given), given)
        lines = [json.loads(line) for line in (tmp_path / "random4.jsonl").read_text().splitlines()]
        losses = [line["val_loss"] for line in lines if line.get("val_loss") is not None]
        assert losses[-1] == pytest.approx(found[optimizer][0], abs=1e-6)
    assert len({tuple(found[name]) for name in names}) == 4
