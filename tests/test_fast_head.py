"""fast/head_kernel.py: the kernel computes the loss and gradients of F.cross_entropy as exactly as torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fast import head_kernel
from fast.head_kernel import losses_and_gradients, supports
from fast.tied_head import TiedHead
from model import IGNORED
from tests.tiny_gpt import seeded

has_kernel = supports(torch.zeros(32, 32), torch.bfloat16)
needs_kernel = pytest.mark.skipif(not has_kernel, reason="no C compiler, or a processor without AMX")


def operands(n_rows: int, n_ids: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a weight, targets, and the rows that count; a third of them predict their target well."""
    generator = seeded(n_rows)
    hidden, weight = (torch.randn(size, width, generator=generator) for size in (n_rows, n_ids))
    targets = torch.randint(n_ids, (n_rows,), generator=generator)
    hidden[::3] = weight[targets[::3]]
    targets[1::7] = IGNORED
    return hidden, weight * 0.3, targets, torch.arange(n_rows)[targets != IGNORED]


def torch_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses and the gradients, by the products of torch: chunks of rows turn the kernel off."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    head = TiedHead(weight, targets[None], torch.bfloat16, chunk_rows=64)
    loss = head.loss(hidden[None], torch.ones(()))
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@needs_kernel
@pytest.mark.parametrize(("n_rows", "n_ids", "width"), [(400, 96, 64), (37, 256, 32), (1, 32, 96), (128, 64, 128)])
def test_loss_and_gradients_are_as_exact_as_those_of_torch(n_rows, n_ids, width):
    """The oracle is F.cross_entropy in float64. 400 rows are several chunks, and 37 are no multiple of a tile."""
    hidden, weight, targets, rows = operands(n_rows, n_ids, width)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    losses = F.cross_entropy(exact[0] @ exact[1].T, targets, ignore_index=IGNORED, reduction="none")
    expected = losses.detach()[rows], *torch.autograd.grad(losses.sum(), exact)
    found = losses_and_gradients(hidden, weight, targets, rows)
    loss, *grads = torch_head(hidden, weight, targets)
    error, torch_error = (abs(tensor.double() - expected[0].sum()) for tensor in (found[0].double().sum(), loss))
    assert error <= max(1.2 * torch_error, 1e-3 * expected[0].sum())
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0.02, atol=0.02)
    for one, right, other in zip(found[1:], expected[1:], grads, strict=True):
        error, torch_error = ((tensor.double() - right).norm() for tensor in (one, other))
        assert error <= 1.2 * torch_error + 1e-6 * right.norm()
    ignored = targets == IGNORED
    assert not found[1][ignored].any()


@needs_kernel
def test_the_loss_of_a_certain_prediction_is_exact():
    """The target's probability is 1 - 3e-6, which bfloat16 and a subtraction from 1 would both lose."""
    weight = torch.zeros(64, 32)
    weight[5, 0] = 1
    hidden = torch.zeros(1, 32)
    hidden[0, 0] = 17  # a bfloat16 number, as the logits 17 and 0 are
    losses, hidden_grad, weight_grad = losses_and_gradients(hidden, weight, torch.tensor([5]), torch.tensor([0]))
    exact = torch.tensor([63.0], dtype=torch.float64).mul(torch.tensor(-17.0, dtype=torch.float64).exp()).log1p()
    torch.testing.assert_close(losses.double(), exact, rtol=1e-4, atol=0)
    assert hidden_grad[0, 0] < 0 and weight_grad[5, 0] < 0 and (weight_grad[:5, 0] > 0).all()


@needs_kernel
def test_huge_logits_stay_finite_and_what_is_not_a_number_is_not_lost():
    hidden, weight, targets, rows = operands(40, 64, 32)
    losses, hidden_grad, weight_grad = losses_and_gradients(1e4 * hidden, weight, targets, rows)
    assert losses.isfinite().all() and hidden_grad.isfinite().all() and weight_grad.isfinite().all()
    hidden[2, 7] = torch.nan
    losses, hidden_grad, weight_grad = losses_and_gradients(hidden, weight, targets, rows)
    assert losses.isnan().nonzero().flatten().tolist() == [rows.tolist().index(2)]
    assert hidden_grad[2].isnan().all() and weight_grad.isnan().any()


@needs_kernel
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_computes_the_same(threads):
    given = operands(300, 64, 32)
    expected, before = losses_and_gradients(*given), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, again = losses_and_gradients(*given), losses_and_gradients(*given)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(found[2], again[2])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-5)


@needs_kernel
def test_only_what_is_wanted_is_computed():
    given = operands(20, 64, 32)
    losses, hidden_grad, weight_grad = losses_and_gradients(*given)
    alone = losses_and_gradients(*given, wants_hidden=False, wants_weight=False)
    frozen = losses_and_gradients(*given, wants_weight=False)
    assert torch.equal(alone[0], losses) and alone[1:] == (None, None)
    assert torch.equal(frozen[1], hidden_grad) and frozen[2] is None and weight_grad is not None


@needs_kernel
@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_head_of_a_step_uses_the_kernel(is_frozen, monkeypatch):
    hidden, weight, targets, rows = operands(50, 64, 32)
    calls = []
    monkeypatch.setattr(
        head_kernel, "losses_and_gradients", lambda *given: calls.append(given[4:]) or losses_and_gradients(*given)
    )
    losses, *expected = losses_and_gradients(hidden, weight, targets, rows)
    hidden.requires_grad_(), weight.requires_grad_(not is_frozen)
    loss = TiedHead(weight, targets[None], torch.bfloat16).loss(hidden[None], torch.tensor(10.0))
    (3 * loss).backward()
    assert calls == [(True, not is_frozen)] and torch.equal(loss.detach(), losses.sum() / 10)
    torch.testing.assert_close(hidden.grad, 0.3 * expected[0])
    assert weight.grad is None if is_frozen else torch.allclose(weight.grad, 0.3 * expected[1])
    with torch.no_grad():
        TiedHead(weight, targets[None], torch.bfloat16).loss(hidden[None], torch.tensor(10.0))
    assert calls[1] == (False, False)


@needs_kernel
def test_no_target_at_all_gives_a_loss_of_0():
    hidden, weight, targets, _ = operands(20, 64, 32)
    losses, hidden_grad, weight_grad = losses_and_gradients(hidden, weight, targets, torch.arange(0))
    assert losses.shape == (0,) and not hidden_grad.any() and not weight_grad.any()
    weight.requires_grad_()
    loss = TiedHead(weight, torch.full((1, 20), IGNORED), torch.bfloat16).loss(hidden[None], torch.tensor(1.0))
    loss.backward()
    assert loss == 0 and not weight.grad.any()


@needs_kernel
@pytest.mark.parametrize("target", [-1, 64])
def test_a_target_that_is_not_an_id_is_refused(target):
    hidden, weight, targets, rows = operands(20, 64, 32)
    targets[rows[3]] = target
    with pytest.raises(IndexError, match="not among the 64 ids"):
        losses_and_gradients(hidden, weight, targets, rows)


@needs_kernel
def test_targets_may_be_of_another_type():
    hidden, weight, targets, rows = operands(20, 64, 32)
    expected, found = (losses_and_gradients(hidden, weight, each, rows)[0] for each in (targets, targets.int()))
    assert torch.equal(found, expected)


def test_other_heads_are_left_to_torch():
    assert supports(torch.zeros(64, 32), torch.bfloat16) == has_kernel
    assert not supports(torch.zeros(64, 32), torch.float32)
    for weight in (torch.zeros(65, 32), torch.zeros(64, 33), torch.zeros(64, 32, dtype=torch.bfloat16)):
        assert not supports(weight, torch.bfloat16)
    assert not supports(torch.zeros(50304, 768, device="meta"), torch.bfloat16)
    assert not supports(torch.zeros(8192, 256), torch.bfloat16), "larger than the cache"
