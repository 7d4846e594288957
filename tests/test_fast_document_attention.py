"""fast/document_attention.py: attention within documents, against torch's attention under the dense mask."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from common.device import has_cpp_compiler
from fast.document_attention import are_contiguous, attend, batches_of_documents, document_attention
from fast.training import compile_training, speed_up_training
from model import GPT, IGNORED
from tests.tiny_gpt import CONFIG, plain_and_fast, seeded

LENGTHS = {
    "many": [[1, 2, 40, 3, 33, 31, 32, 58], [200], [1] * 200, [64, 65, 71]],
    "one token": [[1], [1]],
    "shorter than a step": [[3, 4], [7]],
}


def documents_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])


def dense(documents: torch.Tensor) -> torch.Tensor:
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_those_under_the_dense_mask(lengths, dtype):
    documents = documents_of(lengths)
    B, T = documents.shape
    # As in the model, queries, keys and values are views of one tensor.
    qkv = (3 * torch.randn(B, T, 3, 2, 8, generator=seeded(1))).to(dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    weights = torch.randn(B, 2, T, 8, generator=seeded(2))
    parts = qkv.permute(2, 0, 3, 1, 4)
    found, logsumexp = document_attention(*parts, documents), attend(*parts, documents)[1]
    (found * weights).sum().backward()
    q, k, v = exact.permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense(documents))
    (expected * weights).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    assert found.dtype == dtype
    largest = exact.grad.abs().max()
    assert (qkv.grad.double() - exact.grad).abs().max() <= tolerance * largest
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~dense(documents), -math.inf)
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), atol=10 * tolerance, rtol=tolerance)


def test_keys_and_values_of_other_documents_do_not_matter_at_all():
    documents = documents_of([[5, 30, 5]])
    q, k, v = (torch.randn(1, 2, 40, 8, generator=seeded(n)) for n in range(3))
    expected = document_attention(q, k, v, documents)
    k[:, :, 5:35], v[:, :, 5:35] = 1e4, -1e4
    found = document_attention(q, k, v, documents)
    outside = torch.cat([torch.arange(5), torch.arange(35, 40)])
    assert torch.equal(found[:, :, outside], expected[:, :, outside])


def test_every_token_is_real_exactly_once():
    documents = documents_of(LENGTHS["many"])
    batches = batches_of_documents(documents)
    tokens = torch.cat([index[is_real] for index, is_real in batches])
    assert sorted(tokens.tolist()) == list(range(documents.numel()))
    for index, is_real in batches:
        for row, real in zip(index, is_real, strict=True):
            assert len(documents.flatten()[row[real]].unique()) == 1 and real.tolist() == sorted(real.tolist())[::-1]


def test_a_mask_that_documents_in_pieces_need_stays_dense():
    """`GPT.forward` accepts any numbers; only those that never decrease can be cut out as pieces of a row."""
    assert are_contiguous(torch.tensor([[0, 0, 1, 2], [5, 5, 5, 5]]))
    scattered = torch.tensor([[0, 1, 0, 1] * 4])
    assert not are_contiguous(scattered)
    plain, fast = plain_and_fast()
    idx = torch.randint(0, CONFIG.n_vocab, scattered.shape, generator=seeded(1))
    expected, found = (model(idx, idx, documents=scattered)[1] for model in (plain, fast))
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not has_cpp_compiler(), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_have_the_plain_gradients_and_are_not_compiled_again_for_other_lengths():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    plain, fast = plain_and_fast()
    idx = torch.randint(0, CONFIG.n_vocab, (2, 16), generator=seeded(1))
    targets = idx.masked_fill(idx % 3 == 0, IGNORED)

    def gradients(model: GPT, lengths: list[list[int]]) -> list[torch.Tensor]:
        model.zero_grad()
        _, loss = model(idx, targets, documents=documents_of(lengths))
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in model.parameters())]

    compile_training(fast, lambda: gradients(fast, [[16], [16]]), backend=counter)
    n_compiled = counter.frame_count
    for lengths in ([[16], [16]], [[1] * 16, [8, 8]], [[3, 12, 1], [15, 1]]):
        for found, expected in zip(gradients(fast, lengths), gradients(plain, lengths), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == n_compiled


def test_with_dropout_the_mask_is_dense():
    model = GPT(CONFIG)
    speed_up_training(model)
    documents = documents_of([[10, 6]])
    assert model.document_mask(documents) is documents
    model.config = type(CONFIG)(**{**vars(CONFIG), "dropout": 0.1})
    assert model.document_mask(documents).dtype == torch.float32
    assert model.eval().document_mask(documents) is documents, "an evaluation drops nothing"
