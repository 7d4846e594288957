"""fast/muon_kernel.py: the kernel makes the updates that training/muon.py makes."""

from __future__ import annotations

import copy

import pytest
import torch

from fast import muon_kernel, speed_up_optimizers
from fast.muon_kernel import orthogonalised_, supports
from tests.tiny_gpt import seeded
from training.muon import Muon
from training.muon import orthogonalised_ as plain

COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
has_kernel = supports(torch.zeros(1, 32, 32, dtype=torch.bfloat16))
needs_kernel = pytest.mark.skipif(not has_kernel, reason="no C compiler, or a processor without AMX")


@needs_kernel
@pytest.mark.parametrize("shape", [(4, 64, 192), (3, 192, 64), (1, 32, 32), (5, 96, 96)])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e4])
def test_the_result_is_as_exact_as_that_of_torch(shape, scale):
    """The oracle is the same iteration in float64."""
    found = (torch.randn(shape, generator=seeded(1)) * scale).bfloat16()
    expected = plain(found.double(), COEFFICIENTS, STEPS, EPS)
    error, torch_error = (
        (way(found.clone(), COEFFICIENTS, STEPS, EPS).double() - expected).norm() / expected.norm()
        for way in (orthogonalised_, plain)
    )
    assert error < 1.2 * torch_error < 0.1


@needs_kernel
def test_the_singular_values_of_a_gradient_of_few_tokens_become_nearly_one():
    """Such a gradient has a low rank: here 3, with singular values from 1 to 100."""
    left, right = (torch.linalg.qr(torch.randn(size, 3, generator=seeded(size)))[0] for size in (64, 192))
    found = (left * torch.tensor([1.0, 10, 100])) @ right.T
    values = left.T @ orthogonalised_(found[None].bfloat16(), COEFFICIENTS, STEPS, EPS)[0].float() @ right
    assert values.diagonal().min() > 0.4 and values.diagonal().max() < 1.4
    assert (values - torch.diag(values.diagonal())).abs().max() < 0.1


@needs_kernel
def test_zeros_stay_zeros():
    made = orthogonalised_(torch.zeros(2, 32, 64, dtype=torch.bfloat16), COEFFICIENTS, STEPS, EPS)
    assert torch.equal(made, torch.zeros_like(made))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_same_bits_with_any_number_of_threads_and_any_layout(threads):
    found = torch.randn(3, 64, 96, generator=seeded(1)).bfloat16()
    expected, before = orthogonalised_(found.clone(), COEFFICIENTS, STEPS, EPS), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = orthogonalised_(found.mT.contiguous().mT, COEFFICIENTS, STEPS, EPS)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made, expected)


def test_what_the_kernel_lacks_is_refused_and_left_to_torch():
    others = [torch.zeros(1, 32, 32), torch.zeros(1, 32, 33, dtype=torch.bfloat16)]
    others += [
        torch.zeros(1, 32, 32, dtype=torch.bfloat16, device="meta"),
        torch.zeros(1, 544, 544, dtype=torch.bfloat16),
    ]
    assert not any(map(supports, others))
    with pytest.raises(NotImplementedError, match=r"\(32, 33\)"):
        orthogonalised_(others[1], COEFFICIENTS, STEPS, EPS)


@needs_kernel
@pytest.mark.parametrize("nesterov", [True, False])
def test_an_optimizer_steps_as_without_the_kernel(nesterov, monkeypatch):
    """Three shapes that the kernel takes (the first one as three matrices), one that it does not, and a transpose."""
    generator, shapes = seeded(1), [(96, 32), (64, 32), (32, 32), (8, 24)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    weights.append(torch.nn.Parameter(torch.randn(32, 32, generator=generator).T))
    settings = {"nesterov": nesterov, "weight_decay": 0.3, "lr": 0.05, "dtype": torch.bfloat16}
    pair = [Muon(copy.deepcopy(weights), **settings) for _ in range(2)]
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    speed_up_optimizers([pair[1], adamw])
    called: list[torch.Size] = []

    def counted(matrices, *settings):
        called.append(matrices.shape)
        return orthogonalised_(matrices, *settings)

    monkeypatch.setattr(muon_kernel, "orthogonalised_", counted)
    for _ in range(3):
        for number, weight in enumerate(weights):
            grad = torch.randn(weight.shape, generator=generator)
            for optimizer in pair:
                optimizer.param_groups[0]["params"][number].grad = grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert set(called) == {(3, 32, 32), (1, 64, 32), (2, 32, 32)} and len(called) == 9
    for one, other in zip(*(optimizer.param_groups[0]["params"] for optimizer in pair), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(pair[0].momentum(one), pair[1].momentum(other))
    states = [optimizer.state_dict()["state"] for optimizer in pair]
    assert all(
        one.keys() == other.keys() == {"momentum_buffer"} for one, other in zip(*map(dict.values, states), strict=True)
    )
    pair[0].load_state_dict(pair[1].state_dict())
    for one, other in zip(*(optimizer.param_groups[0]["params"] for optimizer in pair), strict=True):
        assert torch.equal(pair[0].momentum(one), pair[1].momentum(other))


@needs_kernel
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_passes_over_memory_are_those_of_muon(nesterov):
    """Momentum, direction and update are computed by the kernels, not by the methods that they replace."""
    weight = torch.nn.Parameter(torch.randn(64, 32, generator=seeded(1)))
    weight.grad = torch.randn(64, 32, generator=seeded(2))
    pair = [Muon([copy.deepcopy(weight)], nesterov=nesterov, weight_decay=0.3, lr=0.05) for _ in range(2)]
    speed_up_optimizers(pair[1:])
    made = []
    for optimizer in pair:
        (group,) = optimizer.param_groups
        (own,) = group["params"]
        own.grad, update = weight.grad.clone(), torch.empty(1, 64, 32, dtype=torch.bfloat16)
        optimizer.momentum(own).copy_(torch.randn(64, 32, generator=seeded(3)))
        with torch.no_grad(), torch.profiler.profile() as profile:
            optimizer.write_direction(update[0], own, group)
            optimizer.apply([own], update, group)
        made.append(
            (
                optimizer.momentum(own),
                update,
                own,
                {"aten::lerp_", "aten::mul_"} & {each.key for each in profile.key_averages()},
            )
        )
    for one, other in zip(*(each[:3] for each in made), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-5)
    assert made[0][3] and not made[1][3]


@needs_kernel
def test_a_variant_of_muon_keeps_its_own_steps():
    class Halved(Muon):
        def orthogonalised(self, matrices, group):
            return super().orthogonalised(matrices, group) / 2

    optimizer = Halved([torch.nn.Parameter(torch.zeros(32, 32))])
    speed_up_optimizers([optimizer])
    assert type(optimizer) is Halved
