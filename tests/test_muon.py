"""Muon for many matrices at a time: torch's own is the oracle, and singular values are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from training import muon
from training.muon import Muon, orthogonalised_, same_shapes

SHAPES = [(24, 8), (8, 8), (8, 32), (24, 8), (32, 8), (8, 8), (24, 8)]


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def take_steps(optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """Steps with gradients and a rate that depend on the step's number alone."""
    for number in numbers:
        generator = torch.Generator().manual_seed(1000 + number)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (number + 1)
            for weight in group["params"]:
                weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("together", [1, 2, 16])
@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"momentum": 0.5, "weight_decay": 0.3, "ns_steps": 3}])
def test_it_takes_the_steps_of_torchs_muon(monkeypatch, together, settings):
    monkeypatch.setattr(muon, "TOGETHER", together)
    ours, theirs = matrices(), matrices()
    before = copy.deepcopy(theirs)
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for optimizer in optimizers:
        take_steps(optimizer, range(5))
    for weight, expected, start in zip(ours, theirs, before, strict=True):
        moved = (expected - start).norm()
        assert (weight - expected).norm() < 0.01 * moved, "products in bfloat16 round otherwise in another order"
        assert moved > 0.1
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert all(torch.equal(states[0][n]["momentum_buffer"], states[1][n]["momentum_buffer"]) for n in range(len(ours)))


def test_steps_in_float32_are_those_of_bfloat16_rounded_less():
    """For processors that emulate bfloat16. The exact step comes from the same iteration in float64."""
    steps = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weights = matrices()
        before = copy.deepcopy(weights)
        take_steps(Muon(weights, dtype), range(3))
        steps[dtype] = torch.cat([(weight - start).flatten() for weight, start in zip(weights, before, strict=True)])
    exact = steps[torch.float64]
    assert (steps[torch.float32] - exact).norm() < 1e-5 * exact.norm()
    assert 1e-4 * exact.norm() < (steps[torch.bfloat16] - exact).norm() < 0.02 * exact.norm()


def test_it_goes_on_with_the_state_of_torchs_muon_and_torchs_with_its():
    weights = matrices(), matrices()
    optimizers = torch.optim.Muon(weights[0]), Muon(weights[1])
    for optimizer in optimizers:
        take_steps(optimizer, range(3))
    first, second = (copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers)
    optimizers[0].load_state_dict(second)
    optimizers[1].load_state_dict(first)
    for optimizer in optimizers:
        take_steps(optimizer, range(3, 5))
    for weight, other in zip(*weights, strict=True):
        torch.testing.assert_close(weight, other, atol=1e-3, rtol=1e-3)


def test_a_weight_without_a_gradient_stays():
    weights = matrices()
    before = copy.deepcopy(weights)
    optimizer = Muon(weights)
    for weight in weights[1:]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weights[0], before[0]) and not any(map(torch.equal, weights[1:], before[1:]))


@pytest.mark.parametrize("shape", [(3, 40, 16), (2, 16, 40), (1, 16, 16)])
def test_the_singular_values_become_nearly_one_and_the_directions_stay(shape):
    found = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(found, full_matrices=False)
    made = orthogonalised_(found.bfloat16(), (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    values = left.mT @ made @ right.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.4 and diagonal.max() < 1.4
    assert (values - torch.diag_embed(diagonal)).abs().max() < 0.05


def test_only_matrices_of_one_shape_go_together(monkeypatch):
    monkeypatch.setattr(muon, "TOGETHER", 2)
    parts = [[tuple(weight.shape) for weight in weights] for weights in same_shapes(matrices())]
    assert parts == [[(24, 8)] * 2, [(24, 8)], [(8, 8)] * 2, [(8, 32)], [(32, 8)]]
