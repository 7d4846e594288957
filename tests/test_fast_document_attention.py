"""fast/document_attention.py: the kernel in C computes what attention with a mask computes."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from fast import compile_training
from fast import document_attention as module
from fast.document_attention import document_attention, first_keys, supports
from model import Attention
from tests.tiny_gpt import assert_same, gradients, plain_and_fast, seeded

SIZE = 32  # of a head; supported with AVX2, with AVX512 and with AMX
needs_kernel = pytest.mark.skipif(
    not supports(SIZE, torch.float32), reason="no C compiler, or a processor without AVX2"
)
needs_tiles = pytest.mark.skipif(not supports(SIZE, torch.bfloat16), reason="no C compiler, or a processor without AMX")
each_kernel = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=needs_kernel), pytest.param(torch.bfloat16, marks=needs_tiles)]
)


def documents(B: int, T: int, mean: int, seed: int = 0) -> torch.Tensor:
    """Documents of `mean` tokens on average; the numbers of a row do not repeat."""
    return (torch.rand(B, T, generator=seeded(seed)) < 1 / mean).cumsum(1)


def visible(numbers: torch.Tensor) -> torch.Tensor:
    T = numbers.shape[1]
    return ((numbers[:, :, None] == numbers[:, None]) & torch.ones(T, T, dtype=torch.bool).tril())[:, None]


def by_torch(qkv: torch.Tensor, mask: torch.Tensor, n_head: int) -> torch.Tensor:
    B, T, three_c = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, three_c // 3)


def output_and_gradient(function, qkv: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = qkv.detach().requires_grad_()
    y = function(qkv)
    return y.detach(), torch.autograd.grad(y, qkv, wanted)[0]


def test_the_example():
    assert not doctest.testmod(module).failed


def assert_about_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """The difference has at most `tolerance` times the norm of `expected`, and no element is far off."""
    found, expected = found.double(), expected.double()
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-6
    torch.testing.assert_close(found, expected, atol=10 * tolerance, rtol=10 * tolerance)


@each_kernel
@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize(
    ("length", "mean"), [(1, 1), (7, 2), (23, 10**9), (25, 10**9), (32, 10**9), (33, 10**9), (130, 40), (300, 10**9)]
)
def test_output_and_gradient_equal_those_of_torch_with_the_mask(dtype, length, mean, size):
    """Documents of one token, of a block of queries and one more or less, and longer than several blocks.

    In bfloat16 the errors are about as large as torch's own.
    """
    numbers = documents(3, length, mean)
    qkv, wanted = (torch.randn(3, length, n * 2 * size, generator=seeded(n)).to(dtype) for n in (3, 1))
    mask, keys = visible(numbers), first_keys(numbers)
    y, gradient = output_and_gradient(lambda one: document_attention(one, keys, 2), qkv, wanted)
    expected_y, expected = output_and_gradient(lambda one: by_torch(one, mask, 2), qkv.double(), wanted.double())
    assert y.dtype == gradient.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    assert_about_equal(y, expected_y, tolerance)
    assert_about_equal(gradient, expected, tolerance)


@each_kernel
@pytest.mark.parametrize("scale", [1e-20, 30.0, 1e4])
def test_tiny_and_huge_scores_are_exact_and_never_nan(dtype, scale):
    numbers = documents(2, 70, 20)
    qkv = torch.randn(2, 70, 3 * SIZE, generator=seeded(1))
    qkv[..., : 2 * SIZE] *= scale
    qkv, wanted = qkv.to(dtype), torch.randn(2, 70, SIZE, generator=seeded(2)).to(dtype)
    mask, keys = visible(numbers), first_keys(numbers)
    y, gradient = output_and_gradient(lambda one: document_attention(one, keys, 1), qkv, wanted)
    assert y.isfinite().all() and gradient.isfinite().all()
    if scale < 1e3:  # beyond, rounding the scores decides which of two large ones wins
        expected_y, expected = output_and_gradient(lambda one: by_torch(one, mask, 1), qkv.double(), wanted.double())
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        assert_about_equal(y, expected_y, tolerance)
        assert_about_equal(gradient, expected, tolerance)


@each_kernel
def test_a_document_does_not_see_the_others_even_if_they_are_not_numbers(dtype):
    numbers = torch.tensor([[0] * 30 + [1] * 30 + [2] * 30])
    qkv, wanted = torch.randn(1, 90, 3 * SIZE, generator=seeded(1)).to(dtype), torch.ones(1, 90, SIZE, dtype=dtype)
    keys = first_keys(numbers)
    alone = output_and_gradient(lambda one: document_attention(one, keys[:, :30], 1), qkv[:, 30:60], wanted[:, :30])
    qkv[:, :30], qkv[:, 60:] = torch.nan, torch.inf
    among = output_and_gradient(lambda one: document_attention(one, keys, 1), qkv, wanted)
    for found, expected in zip(among, alone, strict=True):
        assert torch.equal(found[:, 30:60], expected)


@each_kernel
def test_the_same_bits_with_any_number_of_threads_and_any_layout_of_the_input(dtype):
    keys, qkv = first_keys(documents(3, 100, 30)), torch.randn(3, 100, 6 * SIZE, generator=seeded(1)).to(dtype)
    wanted, threads, found = torch.ones(3, 100, 2 * SIZE, dtype=dtype), torch.get_num_threads(), []
    for count, layout in ((1, qkv), (2, qkv), (3, qkv.transpose(0, 1).contiguous().transpose(0, 1))):
        torch.set_num_threads(count)
        found.append(output_and_gradient(lambda one: document_attention(one, keys, 2), layout, wanted))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@each_kernel
def test_the_operators_pass_the_checks_of_torch(dtype):
    qkv = torch.randn(2, 9, 3 * SIZE, generator=seeded(1)).to(dtype)
    keys = first_keys(documents(2, 9, 4))
    dropout = (0.5, 1) if dtype == torch.bfloat16 else (0.0, 0)
    torch.library.opcheck(module.forward, (qkv, keys, 1, *dropout))
    y, logsumexp = module.forward(qkv, keys, 1, *dropout)
    torch.library.opcheck(module.backward, (y, qkv, keys, y, logsumexp, *dropout))


def test_other_precisions_and_head_sizes_are_refused():
    assert not supports(SIZE, torch.float16) and not supports(SIZE, torch.float64)
    with pytest.raises(NotImplementedError, match="heads of 17"):
        document_attention(torch.zeros(1, 9, 3 * 17), first_keys(torch.zeros(1, 9)), 1)
    with pytest.raises(NotImplementedError, match="with dropout"):
        document_attention(torch.zeros(1, 9, 3 * SIZE), first_keys(torch.zeros(1, 9)), 1, dropout=0.1)


LONG = {"n_embd": 2 * SIZE, "block_size": 512}  # two rows of it have FEW_TOKENS


def long_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (2, 512) and the numbers of their documents."""
    return torch.randint(0, 90, (2, 512), generator=seeded(1)), documents(2, 512, 100)


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The arguments of every call of plain attention."""
    found, attend = [], Attention.attend

    def recorded(self, *arguments):
        found.append(arguments)
        return attend(self, *arguments)

    monkeypatch.setattr(Attention, "attend", recorded)
    return found


@needs_kernel
@pytest.mark.parametrize("way", ["documents", "text", "compiled"])
def test_a_step_has_the_loss_and_gradients_of_the_plain_model(way, calls):
    """In text, every row is one document."""
    plain, fast = plain_and_fast(**LONG)
    ids, numbers = long_rows()
    given = {"documents": None if way == "text" else numbers}
    expected = plain(ids, ids, **given)[1]
    if way == "compiled":
        torch._dynamo.reset()
        compile_training(fast, lambda: fast(ids, ids, **given)[1].backward(), backend="aot_eager_decomp_partition")
    calls.clear()
    found = fast(ids, ids, **given)[1]
    assert not calls
    torch.testing.assert_close(found, expected)
    assert_same(gradients(fast, found), gradients(plain, expected), atol=1e-5)


@needs_tiles
def test_a_step_in_bfloat16_has_about_the_loss_and_gradients_of_the_plain_model_in_float32(calls):
    plain, fast = plain_and_fast(**LONG)
    ids, numbers = long_rows()
    expected = plain(ids, ids, documents=numbers)[1]
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = fast(ids, ids, documents=numbers)[1]
    assert not calls
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    found_gradients = gradients(fast, found)
    for name, gradient in gradients(plain, expected).items():
        assert (found_gradients[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-6, name


@needs_kernel
def test_torch_is_used_in_other_precisions_with_dropout_and_for_few_tokens(calls):
    ids, numbers = long_rows()
    fast, dropping = plain_and_fast(**LONG)[1], plain_and_fast(**LONG, dropout=0.1)[1]
    with torch.autocast("cpu", torch.float16):
        fast(ids, ids, documents=numbers)
    assert len(calls) == 2, "of both blocks"
    dropping(ids, ids, documents=numbers)
    assert len(calls) == 4
    dropping.eval()(ids, ids, documents=numbers)
    assert len(calls) == 4, "an evaluation drops nothing"
    fast(ids[:1], ids[:1], documents=numbers[:1])
    assert len(calls) == 6


def test_without_a_compiler_torch_computes_the_same(no_compiler):
    assert not supports(SIZE, torch.float32)
    plain, fast = plain_and_fast(**LONG)
    ids, numbers = long_rows()
    torch.testing.assert_close(fast(ids, ids, documents=numbers)[1], plain(ids, ids, documents=numbers)[1])


@needs_kernel
@pytest.mark.parametrize("size", [1, 8, 20, 33])
def test_head_sizes_that_do_not_fill_the_registers_are_refused(size):
    assert not supports(size, torch.float32) and not supports(size, torch.bfloat16)
