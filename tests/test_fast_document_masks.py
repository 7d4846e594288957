"""fast/document_masks.py: the plain mask, in the form that each device's attention handles fastest."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

from common.device import has_cpp_compiler
from fast.document_masks import BlockMask, block_mask, dense_mask
from tests.tiny_gpt import CONFIG, plain_and_fast, seeded


@pytest.fixture
def gpt():
    return plain_and_fast()[1]


def documents() -> torch.Tensor:
    lengths = [(5, 1, 4, 1, 1, 4), (16,), (1, 14, 1)]  # of each row
    return torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])


def visible_by_hand(numbers: torch.Tensor) -> torch.Tensor:
    B, T = numbers.shape
    visible = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for row in range(B):
        for query in range(T):
            for key in range(query + 1):
                visible[row, 0, query, key] = numbers[row, query] == numbers[row, key]
    return visible


def test_the_plain_mask_by_hand():
    assert torch.equal(plain_and_fast()[0].document_mask(documents()), visible_by_hand(documents()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_mask_by_hand(dtype):
    mask = dense_mask(visible_by_hand(documents()), dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask, torch.zeros_like(mask).masked_fill(~visible_by_hand(documents()), -torch.inf))


def test_the_mask_has_the_precision_of_the_attention(gpt):
    with torch.autocast("cpu", torch.bfloat16):
        assert gpt.document_mask(documents()).dtype == torch.bfloat16
    found = gpt.document_mask(documents())
    assert torch.equal(found, dense_mask(visible_by_hand(documents()), torch.float32))


@pytest.mark.parametrize("length", [1, 127, 128, 300, 512])
def test_the_block_mask_is_the_one_that_torch_makes_from_every_pair(length):
    """Documents of a few ids, of several blocks, and blocks whose end is the end of a document."""
    generator = seeded(length)
    for step in (3, 100, 1000):
        numbers = (torch.rand(3, length, generator=generator) < 1 / step).cumsum(1)
        numbers[1, 128:] += 1
        found = block_mask(numbers)
        expected = flex.create_block_mask(found.mask_mod, 3, None, length, length, device="cpu")
        assert torch.equal(found.to_dense(), expected.to_dense()) and found.shape == expected.shape
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        for name in ("kv", "full_kv", "q", "full_q"):
            counts, indices = getattr(expected, f"{name}_num_blocks"), getattr(expected, f"{name}_indices")
            used = torch.arange(indices.shape[-1]) < counts[..., None]
            assert torch.equal(getattr(found, f"{name}_indices")[used], indices[used]), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_the_block_mask_equals_the_mask_by_hand(gpt):
    """What compiled training on CUDA uses; on a CPU it has only a forward pass."""
    generator = seeded(3)
    numbers = torch.randint(0, 2, (2, 300), generator=generator).cumsum(1) // 40  # three blocks of 128, the last cut
    q, k, v = (torch.randn(2, 2, 300, 16, generator=generator) for _ in range(3))
    ours = gpt.h[0].attn.attend(q, k, v, block_mask(numbers))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_by_hand(numbers))
    torch.testing.assert_close(ours, expected)


@pytest.mark.skipif(not has_cpp_compiler(), reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_compiled_blocks_accept_a_block_mask_and_share_code_that_is_compiled_once():
    torch._dynamo.reset()
    # Older torches' code for a CPU refuses queries, keys and values in one piece of memory; that for CUDA does not.
    is_recent = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor" if is_recent else "aot_eager")
    plain, fast = plain_and_fast()
    for block in fast.h:
        block.compiled = torch.compile(block.plain_forward, backend=counter)
    for seed in range(3):
        numbers = torch.randint(0, 2, (2, 16), generator=seeded(seed)).cumsum(1) // 4
        x = torch.randn(2, 16, CONFIG.n_embd, generator=seeded(seed))
        expected = plain.transform(x, mask=visible_by_hand(numbers))
        torch.testing.assert_close(fast.transform(x, mask=block_mask(numbers)), expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1 and len(fast.h) > 1
    fast.train().compiled_blocks = torch.compile(fast.plain_blocks, backend=counter)
    for _ in range(2):
        torch.testing.assert_close(fast.transform(x, mask=block_mask(numbers)), expected, atol=1e-4, rtol=1e-4)
        numbers = torch.randint(0, 2, (2, 16), generator=seeded(3)).cumsum(1) // 4
        expected = plain.transform(x, mask=visible_by_hand(numbers))
    assert counter.frame_count == 2, "compiled once, also for another micro-batch's mask"


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA."""

    is_cuda = True


def test_flex_attention_is_used_only_in_compiled_training_on_cuda_without_dropout(gpt, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    on_cuda = documents().as_subclass(OnCuda)

    def uses_flex_attention(numbers: torch.Tensor) -> bool:
        return isinstance(gpt.document_mask(numbers), BlockMask)

    gpt.h[0].compiled = gpt.h[0].plain_forward
    assert uses_flex_attention(on_cuda) and not uses_flex_attention(documents())
    gpt.eval()
    assert not uses_flex_attention(on_cuda)
    gpt.train()
    gpt.config = dataclasses.replace(CONFIG, dropout=0.1)
    assert not uses_flex_attention(on_cuda)
    gpt.config, gpt.h[0].compiled = CONFIG, None
    assert not uses_flex_attention(on_cuda)
    gpt.compiled_blocks = gpt.plain_blocks
    assert uses_flex_attention(on_cuda)
