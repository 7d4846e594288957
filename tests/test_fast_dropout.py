"""Dropout in the kernels of fast/: the masks are found by special inputs, and torch computes the rest with them."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fast import block_kernel, document_attention, speed_up_training
from fast.block_kernel import block_with_kernel
from fast.document_attention import first_keys
from fast.dropout import new_seed
from fast.tile_kernels import tile_kernels
from model import GPT, Block, GPTConfig
from tests.tiny_gpt import seeded, tiny_gpt

pytestmark = pytest.mark.skipif(tile_kernels() is None, reason="no C compiler, or a processor without AMX")

WIDTH, HEADS, ROWS, TOKENS = 64, 2, 3, 96
SIZE = WIDTH // HEADS
BFLOAT16 = torch.bfloat16


def documents() -> Tensor:
    """Two documents in each row, except in the first one."""
    numbers = (torch.arange(TOKENS) > TOKENS // 3).long().repeat(ROWS, 1)
    numbers[0] = 0
    return numbers


def visible() -> Tensor:
    """Which keys a query sees, (ROWS, 1, TOKENS, TOKENS)."""
    numbers, causal = documents(), torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return ((numbers[:, :, None] == numbers[:, None, :]) & causal)[:, None]


def dropping_block(probability: float) -> Block:
    """A block in training whose weights and biases are large enough that every part matters."""
    config = GPTConfig(vocab_size=64, n_vocab=64, n_layer=1, n_head=HEADS, n_embd=WIDTH, dropout=probability)
    block = Block(config, 0).train()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.2, generator=seeded(4))
    return block


def run_kernel(block: Block, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=BFLOAT16):
        return block_with_kernel(block, x, first_keys(documents()))


def output_factors(probability: float, seed: int) -> tuple[Tensor, Tensor]:
    """What dropout multiplies the outputs of attention and of the MLP by: (ROWS, TOKENS, WIDTH) each.

    Of a block whose only parameters are two biases, 1 and 1024: the sum shows which of them were dropped.
    """
    block = dropping_block(probability)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.attn.c_proj.bias.fill_(1)
        block.mlp.c_proj.bias.fill_(1024)
        out = run_kernel(block, torch.zeros(ROWS, TOKENS, WIDTH), seed)
    of_mlp = (out > 512).float() / (1 - probability)
    return out - 1024 * of_mlp, of_mlp


def weight_factors(probability: float, seed: int) -> Tensor:
    """What dropout multiplies the weights of attention by, (ROWS, HEADS, TOKENS, TOKENS); 0 where a key is not visible.

    All scores are 0, so all weights of a query are the same, and the values are unit vectors of SIZE keys at a time.
    """
    torch.manual_seed(seed)
    own_seed, found = new_seed(), []
    for first in range(0, TOKENS, SIZE):
        values = torch.zeros(ROWS, TOKENS, HEADS, SIZE)
        values[:, first : first + SIZE] = torch.eye(SIZE)[:, None]
        qkv = torch.cat([torch.zeros(ROWS, TOKENS, 2 * WIDTH), values.flatten(2)], 2).to(BFLOAT16)
        y, _ = document_attention.forward(qkv, first_keys(documents()), HEADS, probability, own_seed)
        found.append(y.view(ROWS, TOKENS, HEADS, SIZE).transpose(1, 2))
    return torch.cat(found, 3).float() * visible().sum(3, keepdim=True)


def with_factors(block: Block, x: Tensor, of_weights: Tensor, of_attention: Tensor, of_mlp: Tensor) -> Tensor:
    """The block's output when dropout multiplies by these factors: plain torch, in the precision of x."""
    qkv = block.attn.c_attn(block.ln_1(x)).view(ROWS, TOKENS, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
    scores = (qkv[0] @ qkv[1].mT / math.sqrt(SIZE)).masked_fill(~visible(), -math.inf)
    y = (scores.softmax(3) * of_weights) @ qkv[2]
    x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2)) * of_attention
    return x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")) * of_mlp


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_output_and_gradients_are_those_of_torch_with_the_same_masks(probability):
    """Dropout takes place after the softmax, attention's projection and the MLP, as in Block.forward."""
    x, out_grad = (torch.randn(ROWS, TOKENS, WIDTH, generator=seeded(seed)) for seed in (1, 2))
    block, made = dropping_block(probability), x.clone().requires_grad_()
    out = run_kernel(block, made, seed=7)
    (out * out_grad).sum().backward()

    exact, right = copy.deepcopy(block).double(), x.double().requires_grad_()
    exact.zero_grad()
    factors = [weight_factors(probability, 7), *output_factors(probability, 7)]
    expected = with_factors(exact, right, *(factor.double() for factor in factors))
    (expected * out_grad).sum().backward()

    pairs = {"out": (out, expected), "x": (made.grad, right.grad)}
    theirs = dict(exact.named_parameters())
    pairs |= {name: (parameter.grad, theirs[name].grad) for name, parameter in block.named_parameters()}
    for name, (found, wanted) in pairs.items():
        assert (found - wanted).norm() < 0.02 * wanted.norm(), f"{name}: {(found - wanted).norm() / wanted.norm():.1e}"


def test_attention_alone_has_the_gradient_of_torch_with_the_same_mask():
    """As for blocks that have no kernel: frozen layers, adapters, a residual stream in bfloat16."""
    qkv, y_grad = (torch.randn(ROWS, TOKENS, n * WIDTH, generator=seeded(n)).to(BFLOAT16) for n in (3, 1))
    torch.manual_seed(7)
    qkv.requires_grad_()
    y = document_attention.document_attention(qkv, first_keys(documents()), HEADS, dropout=0.3)
    y.backward(y_grad)

    right = qkv.detach().double().requires_grad_()
    q, k, v = right.view(ROWS, TOKENS, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / math.sqrt(SIZE)).masked_fill(~visible(), -math.inf)
    expected = ((scores.softmax(3) * weight_factors(0.3, 7)) @ v).transpose(1, 2).flatten(2)
    expected.backward(y_grad.double())
    for found, wanted in ((y, expected), (qkv.grad, right.grad)):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_dropout_drops_the_requested_share_and_scales_the_rest():
    probability = 0.25
    for factors in (
        *output_factors(probability, 1),
        weight_factors(probability, 1)[visible().expand(-1, HEADS, -1, -1)],
    ):
        is_kept = factors > 0.5
        torch.testing.assert_close(factors[is_kept], torch.full_like(factors[is_kept], 4 / 3), atol=0.01, rtol=0)
        sigma = math.sqrt(probability * (1 - probability) / factors.numel())
        assert abs(1 - is_kept.float().mean() - probability) < 4 * sigma


def test_masks_of_different_places_and_seeds_are_independent():
    """Neighbours, rows, heads, layers' two outputs, and seeds that follow each other: no correlation of 4 sigma."""
    masks = {seed: [(factors > 0.5).float() for factors in output_factors(0.5, seed)] for seed in (1, 2)}
    (of_attention, of_mlp), (other, _) = masks[1], masks[2]
    weights = (weight_factors(0.5, 1)[0] > 0.5).float()  # of one document: (HEADS, TOKENS, TOKENS)
    seen = visible()[0, 0]
    pairs = [
        (of_attention, of_mlp),
        (of_attention, other),
        (of_attention[0], of_attention[1]),
        *((of_attention[:, :, step:], of_attention[:, :, :-step]) for step in (1, 2, 16, 32)),
        *((of_attention[:, step:], of_attention[:, :-step]) for step in (1, 2, 32)),
        (weights[0][seen], weights[1][seen]),
        (weights[0][1:, :-1][seen[1:, 1:]], weights[0][:-1, :-1][seen[1:, 1:]]),
    ]
    for left, right in pairs:
        agreement = (left == right).float().mean()
        assert abs(agreement - 0.5) < 4 * 0.5 / math.sqrt(left.numel()), f"{agreement:.3f} of {left.numel()}"


def test_dropout_repeats_with_torchs_seed_and_stops_in_evaluation():
    block, x = dropping_block(0.2), torch.randn(ROWS, TOKENS, WIDTH, generator=seeded(1))
    with torch.no_grad():
        first, again, other = (run_kernel(block, x, seed) for seed in (5, 5, 6))
        evaluated = run_kernel(block.eval(), x, 5)
        plain = run_kernel(dropping_block(0.0), x, 5)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(evaluated, plain)


def test_without_dropout_no_random_number_is_drawn():
    block, x = dropping_block(0.0), torch.randn(ROWS, TOKENS, WIDTH, generator=seeded(1))
    run_kernel(block, x, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


# --- the model ---


def training_gpt(dropout: float, **settings) -> GPT:
    gpt = tiny_gpt(block_size=128, n_layer=2, n_head=HEADS, n_embd=WIDTH, dropout=dropout).train()
    speed_up_training(gpt, **settings)
    return gpt


def loss_and_gradients(gpt: GPT, seed: int) -> tuple[Tensor, list[Tensor]]:
    ids = torch.randint(90, (8, 128), generator=seeded(3))
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=BFLOAT16):
        loss = gpt(ids, ids.roll(-1, 1))[1]
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in gpt.parameters()]


def test_checkpointed_blocks_drop_the_same_numbers_twice(monkeypatch):
    called = []
    monkeypatch.setattr(block_kernel, "block_with_kernel", lambda *given: called.append(1) or block_with_kernel(*given))
    (loss, expected), (again, found) = (
        loss_and_gradients(training_gpt(0.2, activation_checkpointing=way), 1) for way in (False, True)
    )
    assert len(called) == 2 + 4 and torch.equal(loss, again)
    assert all(itertools.starmap(torch.equal, zip(found, expected, strict=True)))


def test_a_compiled_model_keeps_torchs_dropout():
    """torch.compile cannot draw the seed, so compiled attention does not run in the kernel; other steps do."""
    gpt = training_gpt(0.2)
    ids = torch.zeros(8, 128, dtype=torch.long)
    with torch.autocast("cpu", dtype=BFLOAT16):
        assert gpt.has_attention_kernel(ids)
        gpt.fast_blocks()[0].compiled = gpt.fast_blocks()[0].plain_forward
        assert not gpt.has_attention_kernel(ids)
        gpt.fast_blocks()[0].compiled, gpt.compiled_blocks = None, gpt.plain_blocks
        assert not gpt.has_attention_kernel(ids)
        assert gpt.eval().has_attention_kernel(ids)
    with torch.autocast("cpu", enabled=False):
        assert not training_gpt(0.2).has_attention_kernel(ids), "in float32, there is no kernel with dropout"
