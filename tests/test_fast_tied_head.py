"""fast/tied_head.py: the loss and the gradients of F.cross_entropy, in little memory."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fast.tied_head import TiedHead, fused_losses_and_gradient_, losses_and_gradient_
from model import IGNORED
from tests.tiny_gpt import assert_same, gradients, random_ids, seeded, tiny_gpt


@pytest.fixture(scope="module")
def gpt():
    return tiny_gpt().train()


def head_loss(hidden, weight, targets, n_targets, dtype=torch.float32):
    return TiedHead(weight, targets, dtype).loss(hidden, torch.tensor(float(n_targets)))


@pytest.mark.parametrize("losses", [losses_and_gradient_, fused_losses_and_gradient_])
@pytest.mark.parametrize("chunk_rows", [4, 1024])
@pytest.mark.parametrize("ignored", [0.0, 0.6])
def test_loss_and_gradients_are_those_of_the_plain_model(gpt, chunk_rows, ignored, losses):
    ids, targets = random_ids(4, 16), random_ids(4, 16).flip(0)
    targets[torch.rand(4, 16, generator=seeded(3)) < ignored] = IGNORED
    head = TiedHead(gpt.wte.weight, targets, torch.float32, chunk_rows=chunk_rows, losses_and_gradient=losses)
    loss = head.loss(gpt.transform(head.embed(ids)), (targets != IGNORED).sum())
    expected = gpt(ids, targets)[1]
    torch.testing.assert_close(loss, expected)
    assert_same(gradients(gpt, loss), gradients(gpt, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [3, 16, 64])
def test_rows_without_a_target_have_weight_0_on_cuda(chunk_rows, dtype):
    """There counting rows would wait for the device, so chunks are slices. The gradient has the weight's layout."""

    class NotOnCpu(TiedHead):
        def __init__(self, weight, targets, dtype, chunk_rows):
            super().__init__(weight.to("meta"), targets.to("meta"), dtype, chunk_rows=chunk_rows)
            self.weight, self.targets = weight, targets.flatten()
            self.counts = self.targets != IGNORED
            self.low_weight, self.logits = weight.detach().to(dtype).T, torch.empty(self.logits.shape, dtype=dtype)

    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    idx, targets = torch.randint(30, (4, 5)), torch.randint(30, (4, 5))
    targets[1:3] = targets[0, 2] = IGNORED
    found = []
    for kind in (TiedHead, NotOnCpu):
        head = kind(weight, targets, dtype, chunk_rows=chunk_rows)
        assert head.on_cpu == (kind is TiedHead)
        loss = head.loss(hidden + head.embed(idx), torch.tensor(9.0))
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
        assert found[-1][2].is_contiguous()
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 0.03}
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, **tolerance)
    assert not found[1][1][1:3].any()


def test_the_loss_in_low_precision_is_close():
    generator = seeded()
    hidden = torch.randn(20, 8, generator=generator).requires_grad_()
    weight = torch.randn(30, 8, generator=generator).requires_grad_()
    targets = torch.randint(0, 30, (20,), generator=generator)
    exact = F.cross_entropy(hidden @ weight.T, targets)
    loss = head_loss(hidden, weight, targets, 20, torch.bfloat16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0)
    ours, theirs = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("function", [losses_and_gradient_, fused_losses_and_gradient_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_of_a_chunk_keep_small_numbers(dtype, function):
    """A token that is nearly certain, one that is nearly impossible, one in between."""
    check_losses_and_gradient([[9.0, 0, 0], [9.0, 0, 0], [0.5, 0, -0.5]], [0, 1, 0], dtype, function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_losses_are_exact_for_any_logits_and_when_compiled(dtype):
    """Also where the target's power underflows, which in the other function counts as the smallest number."""
    logits = (20 * torch.randn(7, 300, generator=seeded())).tolist()
    logits[0][5] = -150.0
    targets = [5, *range(6)]
    check_losses_and_gradient(logits, targets, dtype, fused_losses_and_gradient_)
    torch._dynamo.reset()
    check_losses_and_gradient(logits, targets, dtype, torch.compile(fused_losses_and_gradient_))


def check_losses_and_gradient(numbers, ids, dtype, function):
    logits, targets = torch.tensor(numbers).to(dtype), torch.tensor(ids)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    found = function(logits, targets)
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(found.double(), expected.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=tolerance, atol=1e-30)


@contextlib.contextmanager
def count_products():
    """The names of the matrix products that run in the block."""
    names = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), settings=None):
            if ".mm" in str(function):
                names.append(str(function))
            return function(*arguments, **(settings or {}))

    with Mode():
        yield names


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight = torch.randn(20, 8), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (20,))
    with torch.no_grad(), count_products() as products:
        head_loss(hidden, weight, targets, 20)
    assert products == ["aten.mm.out"]


def test_the_head_needs_little_more_than_logits_in_low_precision_and_a_copy_of_its_weight(tmp_path, one_thread):
    """With its gradients, 4 + 4 MiB; the logits, or the weight's gradient, in float32 would be 8 each."""
    hidden, weight = torch.randn(128, 128, requires_grad=True), torch.randn(16384, 128, requires_grad=True)
    targets = torch.randint(0, 16384, (128,))
    recording = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with recording as profiler:
        loss = head_loss(hidden, weight, targets, 128, torch.bfloat16)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    now, most = 0, 0
    for event in events:
        now += event["args"]["Bytes"]
        most = max(most, now)
    assert 8 < most / 2**20 < 9
    assert loss.requires_grad


def test_huge_logits_give_a_finite_loss():
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.randn(10, 4, generator=seeded()).requires_grad_()
    targets = torch.tensor([0, 9])
    loss = head_loss(hidden, weight, targets, 2)
    exact = F.cross_entropy(hidden @ weight.T, targets)
    assert 40 < loss.item() < min(110, exact.item())  # see losses_and_gradient_
    ours, theirs = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected)
