"""What the tests of the network and of generation share: tiny random models, a brute-force decoder, comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fast import speed_up_training
from generation.decoding import ENDED, generate
from generation.sampling import Sampling
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=16, vocab_size=96, n_vocab=90, n_layer=2, n_head=2, n_embd=32)
GREEDY = Sampling(temperature=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_gpt(seed: int = 1, **changes) -> GPT:
    """A random model whose weights, biases too, are larger than at the start of training, so that every part matters.

    `changes` replace fields of CONFIG.
    """
    torch.manual_seed(seed)
    gpt = GPT(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return gpt


def plain_and_fast(activation_checkpointing: bool = False, **changes) -> tuple[GPT, GPT]:
    """Two models with the same weights, in training mode; `speed_up_training` has changed the second."""
    plain, fast = tiny_gpt(**changes).train(), tiny_gpt(**changes).train()
    speed_up_training(fast, activation_checkpointing)
    return plain, fast


def generating_gpt(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> GPT:
    """A random model whose logits are far enough apart that rounding does not change which id is likeliest."""
    torch.manual_seed(seed)
    gpt = GPT(dataclasses.replace(CONFIG, **changes)).to(dtype)
    for parameter in gpt.parameters():
        parameter.data.mul_(4).add_(0.05 * torch.randn_like(parameter))
    return gpt.eval().requires_grad_(False)


def text_gpt(block_size: int = 64) -> GPT:
    """A random model with the tokenizer's vocabulary, for text."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=block_size, n_layer=1, n_head=2, n_embd=16))
    gpt.wpe.weight.data.normal_(std=1.0)  # so that it does not repeat one id forever
    return gpt.eval().requires_grad_(False)


def random_ids(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, CONFIG.n_vocab, shape, generator=seeded(seed))


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return random_ids(length, seed=seed).tolist()


def brute_force(gpt: GPT, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy ids by a whole forward pass over the documented context for each id."""
    block_size = gpt.config.block_size
    context, ids = prompt[-block_size:], []
    for _ in range(max_tokens):
        ids.append(int(gpt(torch.tensor([context]))[0][0, -1].argmax()))
        if len(context) == block_size:
            context = context[block_size - block_size // 2 :]
        context = [*context, ids[-1]]
    return ids


def generated(
    gpt: GPT, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling = GREEDY, **settings
) -> list[list[int]]:
    """The ids that `generate` yields for each row."""
    steps = [ids.tolist() for ids in generate(gpt, prompts, max_tokens, sampling, **settings)]
    return [[token for token in row if token != ENDED] for row in zip(*steps, strict=True)]


def gradients(gpt: GPT, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter, by name."""
    gpt.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in gpt.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6, rtol: float = 1e-4) -> None:
    """Tensors with the same names and, within the tolerance, the same numbers."""
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], atol=atol, rtol=rtol, msg=lambda text, n=name: f"{n}: {text}"
        )
