"""fast/gelu.py: the kernel in C computes what F.gelu and F.linear compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fast import compile_training
from fast import gelu as module
from fast.gelu import gelu_linear, is_available, supports
from tests.tiny_gpt import assert_same, gradients, plain_and_fast, random_ids, seeded

needs_kernel = pytest.mark.skipif(not is_available(), reason="no C compiler, or a processor without AVX2")
each_dtype = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])


@needs_kernel
@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 700])
@pytest.mark.parametrize("has_bias", [True, False])
def test_output_and_gradients_equal_those_of_torch(dtype, tolerance, rows, has_bias):
    """Inputs from about -15 to 15 reach far into both ends of GELU; 700 rows are more than a thread takes at a time."""
    numbers = [torch.randn(shape, generator=seeded(rows)) for shape in ((2, rows, 16), (24, 16), (24,), (2, rows, 24))]
    x, weight, bias, wanted = (tensor.to(dtype) for tensor in (5 * numbers[0], *numbers[1:]))
    given = [x, weight, bias] if has_bias else [x, weight]

    def results(function, *tensors: torch.Tensor) -> list[torch.Tensor]:
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        y = function(*tensors) if has_bias else function(*tensors, None)
        return [y, *torch.autograd.grad(y, tensors, wanted.to(y.dtype))]

    expected = results(
        lambda x, weight, bias: F.linear(F.gelu(x, approximate="tanh"), weight, bias), *(one.double() for one in given)
    )
    for one, other in zip(results(gelu_linear, *given), expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= tolerance * other.norm()


@needs_kernel
def test_gelu_and_its_gradient_are_exact_at_both_ends_and_keep_what_is_not_a_number():
    x = torch.cat([torch.linspace(-40, 40, 4095), torch.tensor([torch.nan])])
    y, gradient = module.gelu_backward(torch.ones_like(x), x)
    expected = x.double().requires_grad_()
    expected_y = F.gelu(expected, approximate="tanh")
    expected_gradient = torch.autograd.grad(expected_y, expected, torch.ones_like(expected))[0]
    assert torch.equal(y[:-1], module.gelu(x)[:-1])
    torch.testing.assert_close(y.double(), expected_y, atol=1e-6, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(gradient[:-1].double(), expected_gradient[:-1], atol=1e-6, rtol=1e-6)
    assert gradient[-1].isnan()


@needs_kernel
def test_the_same_bits_with_any_number_of_threads_and_any_layout():
    x, y_grad = (torch.randn(48, 1000, generator=seeded(seed)) for seed in (1, 2))
    threads, found = torch.get_num_threads(), []
    for count, layout in ((1, x), (2, x), (3, x.T.contiguous().T)):
        torch.set_num_threads(count)
        found.append(module.gelu_backward(y_grad, layout))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_kernel
def test_the_operators_pass_the_checks_of_torch():
    x = torch.randn(3, 16, generator=seeded(1))
    torch.library.opcheck(module.gelu, (x,))
    torch.library.opcheck(module.gelu_backward, (torch.ones_like(x), x))


@needs_kernel
def test_a_frozen_layer_gets_no_gradient():
    x = torch.randn(4, 16, generator=seeded(1)).requires_grad_()
    gelu_linear(x, torch.ones(8, 16), torch.zeros(8)).sum().backward()
    assert x.grad is not None
    gelu_linear(x, torch.ones(8, 16), bias := torch.zeros(8).requires_grad_()).sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 4.0)), "a bias may train without its weight"


def test_what_the_kernel_lacks_is_refused():
    others = (torch.zeros(17), torch.zeros(16, dtype=torch.float16), torch.zeros(16, device="meta"))
    assert not any(map(supports, others))
    with pytest.raises(NotImplementedError, match="17 numbers"):
        module.gelu(torch.zeros(17))


@needs_kernel
@pytest.mark.parametrize("way", ["eager", "compiled", "without a compiler"])
def test_a_step_has_the_loss_and_gradients_of_the_plain_model(way, request):
    if way == "without a compiler":
        request.getfixturevalue("no_compiler")
        assert not is_available()
    plain, fast = plain_and_fast()
    ids = random_ids(3, 16)
    expected = plain(ids, ids)[1]
    if way == "compiled":
        torch._dynamo.reset()
        compile_training(fast, lambda: fast(ids, ids)[1].backward(), backend="aot_eager_decomp_partition")
    with torch.profiler.profile() as profile:
        found = fast(ids, ids)[1]
    assert ("jojo::gelu" in {event.key for event in profile.key_averages()}) == (way != "without a compiler")
    torch.testing.assert_close(found, expected)
    assert_same(gradients(fast, found), gradients(plain, expected))
