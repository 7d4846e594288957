"""Muon for many matrices at a time: torch's own is the oracle, and singular values are."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from fast import speed_up_optimizers
from model import GPT, PRESETS
from tests.fake_job import fake_job
from training import muon
from training.muon import Muon, group_by_shape, n_multiplications, orthogonalised_, owners_of

SHAPES = [(40, 8), (8, 8), (8, 32), (40, 8), (32, 8), (8, 8), (40, 8)]
OF_C_ATTN = [(24, 8), (24, 8)]  # three matrices each, which torch's Muon does not know


def matrices(shapes: Sequence[tuple[int, int]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


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
    monkeypatch.setattr(muon, "MATRICES_AT_ONCE", together)
    ours, theirs = matrices(), matrices()
    before = copy.deepcopy(theirs)
    optimizers = Muon(ours, torch.bfloat16, **settings), torch.optim.Muon(theirs, **settings)
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
    optimizers = torch.optim.Muon(weights[0]), Muon(weights[1], torch.bfloat16)
    for optimizer in optimizers:
        take_steps(optimizer, range(3))
    first, second = (copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers)
    optimizers[0].load_state_dict(second)
    optimizers[1].load_state_dict(first)
    for optimizer in optimizers:
        take_steps(optimizer, range(3, 5))
    for weight, other in zip(*weights, strict=True):
        torch.testing.assert_close(weight, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("is_kernel", "dtype"), [(False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float16)]
)
def test_queries_keys_and_values_are_three_matrices(is_kernel, dtype):
    """The oracle is torch's Muon for three weights. The test above has other tall weights, which are one matrix.

    As one matrix, the keys would get nearly all of the update, and the others would be 0 in float16.
    """
    ours = [nn.Parameter(torch.randn(96, 32, generator=torch.Generator().manual_seed(1)))]
    theirs = [nn.Parameter(part.clone()) for part in ours[0].detach().chunk(3)]
    before, settings = ours[0].detach().clone(), {"lr": 0.02, "weight_decay": 0.3}
    optimizers = [Muon(ours, dtype, **settings), torch.optim.Muon(theirs, **settings)]
    if is_kernel:
        speed_up_optimizers(optimizers[:1])
    for number in range(3):
        grad = torch.randn(96, 32, generator=torch.Generator().manual_seed(number))
        grad[32:64] *= 1e6
        ours[0].grad = grad
        for weight, part in zip(theirs, grad.chunk(3), strict=True):
            weight.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    expected = torch.cat([weight.detach() for weight in theirs])
    assert (ours[0] - expected).norm() < 0.01 * (expected - before).norm()


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
    monkeypatch.setattr(muon, "MATRICES_AT_ONCE", 2)
    groups = group_by_shape(matrices(SHAPES + OF_C_ATTN))
    parts = [[tuple(weight.shape) for weight in weights] for weights in groups]
    assert parts == [[(40, 8)] * 2, [(40, 8)], [(8, 8)] * 2, [(8, 32)], [(32, 8)], [(24, 8)], [(24, 8)]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-8, 1, 1e6], ids=str)
def test_on_devices_without_bfloat16_it_takes_the_same_steps(dtype, scale):
    """Gradients of 1e-8 are zero in float16, and large ones infinite, unless they are scaled first."""
    ours, theirs = matrices(), matrices()
    before = copy.deepcopy(theirs)
    gradients = [scale * weight.data.roll(1, 0) for weight in before]
    step_with(Muon(ours, dtype, lr=0.1, eps=1e-12), gradients)
    step_with(torch.optim.Muon(theirs, lr=0.1, eps=1e-12), gradients)
    for weight, expected, start in zip(ours, theirs, before, strict=True):
        moved = (expected - start).norm()
        assert (weight - expected).norm() < 0.05 * moved and moved > 0.1


def step_with(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> None:
    for weight, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        weight.grad = gradient.clone()
    optimizer.step()


# Several processes

# One of two processes: steps that are shared, and the same steps without a job. Prints the groups that it multiplied.
WORKER = """
import sys, torch, torch.distributed as dist
from unittest import mock
from tests.test_muon import OF_C_ATTN, SHAPES, matrices, take_steps
from training import muon

rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
shared, alone, calls = matrices(SHAPES + OF_C_ATTN), matrices(SHAPES + OF_C_ATTN), []
optimizers = muon.Muon(shared), muon.Muon(alone)
real = muon.orthogonalised_
with mock.patch.object(muon, "orthogonalised_", lambda *words: calls.append(1) or real(*words)):
    take_steps(optimizers[0], range(3))
print(len(calls), end="")
with mock.patch("torch.distributed.is_initialized", lambda: False):
    take_steps(optimizers[1], range(3))
assert all(map(torch.equal, shared, alone)), "weights differ"
for weight, other in zip(shared, alone):
    assert torch.equal(*(o.state[w]["momentum_buffer"] for o, w in zip(optimizers, (weight, other)))), "momenta differ"
dist.destroy_process_group()
"""


def test_processes_share_the_matrices_and_the_weights_are_the_same_bit_for_bit(tmp_path):
    root = Path(muon.__file__).parent.parent
    commands = [[sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")] for rank in range(2)]
    processes = [subprocess.Popen(one, cwd=root, stdout=subprocess.PIPE, text=True) for one in commands]
    counts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    made = list(map(int, counts))
    n_groups = len(list(group_by_shape(matrices(SHAPES + OF_C_ATTN))))
    assert sum(made) == 3 * n_groups and min(made) > 0, "each group in one process"


def test_the_work_is_shared_evenly():
    with torch.device("meta"):
        gpt = GPT(PRESETS["gpt2"])
    weights = [weight for name, weight in gpt.named_parameters() if weight.dim() == 2 and name.startswith("h.")]
    groups = list(group_by_shape(weights))
    costs = [len(alike) * n_multiplications(alike[0]) for alike in groups]
    for size, share in ((1, 1), (2, 1.1), (4, 1.1), (8, 1.5)):
        with fake_job(size=size):
            owners = owners_of(groups)
        work = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
        assert math.fsum(work) == math.fsum(costs)
        assert max(work) <= share * sum(costs) / size
