"""common/lora.py: adapters computed as the paper writes them, and nothing else that trains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from common.lora import LAYERS, Adapter, LoRALinear, adapt, fit_base, merge, trained_weights
from fast import compile_training, speed_up_training
from fast.training import FastLinear
from model import GPT, IGNORED
from tests.tiny_gpt import CONFIG, assert_same, random_ids, tiny_gpt

COMPILED = "aot_eager_decomp_partition"
SETTINGS = [
    Adapter(4),
    Adapter(2, 3.0, "attention"),
    Adapter(8, 8.0, "mlp", chat_rows=True),
    Adapter(4, chat_rows=True),
]
IDS = ["all", "attention", "mlp-rows", "all-rows"]


def adapted(adapter: Adapter, seed: int = 1) -> GPT:
    """A tiny model with an adapter that has learned something, in training mode."""
    gpt = tiny_gpt(seed).train()
    adapt(gpt, adapter)
    with torch.no_grad():
        for weight in trained_weights(gpt).values():
            weight.add_(0.1 * torch.randn_like(weight))
    return gpt


def dense(gpt: GPT, adapter: Adapter) -> GPT:
    """A plain model whose matrices are computed from the adapted one's by the paper's formula, one by one."""
    plain = tiny_gpt().train()
    state = {name: weight for name, weight in gpt.state_dict().items() if name in plain.state_dict()}
    for layer, block in enumerate(gpt.h):
        for name in LAYERS[adapter.layers]:
            linear = block.get_submodule(name)
            state[f"h.{layer}.{name}.weight"] = linear.weight + adapter.alpha / adapter.rank * (
                linear.lora_B @ linear.lora_A
            )
    if adapter.chat_rows:
        state["wte.weight"] = torch.cat([state["wte.weight"][:88], gpt.wte.rows, state["wte.weight"][90:]])
    plain.load_state_dict(state)
    return plain


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(3, 16)
    ids[:, 3:5] = torch.tensor([88, 89])  # ChatML's tokens
    targets = ids.roll(-1, 1)
    targets[0, 3] = IGNORED
    return ids, targets


@pytest.mark.parametrize("adapter", SETTINGS, ids=IDS)
def test_logits_and_loss_are_those_of_the_dense_update(adapter):
    gpt = adapted(adapter)
    plain = dense(gpt, adapter)
    ids, targets = batch()
    torch.testing.assert_close(gpt(ids)[0], plain(ids)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gpt(ids, targets)[1], plain(ids, targets)[1])


def test_a_new_adapter_changes_nothing():
    plain, gpt = tiny_gpt(), tiny_gpt()
    adapt(gpt, Adapter(4, chat_rows=True))
    ids, targets = batch()
    assert torch.equal(gpt(ids)[0], plain(ids)[0])
    assert torch.equal(gpt(ids, targets)[1], plain(ids, targets)[1])


@pytest.mark.parametrize("way", ["plain", "fast", "checkpointing", "compiled"])
@pytest.mark.parametrize("adapter", SETTINGS, ids=IDS)
def test_gradients_follow_from_those_of_the_dense_matrices(adapter, way, monkeypatch, capsys):
    """With dW the gradient of the dense matrix: dB = s dW A', dA = s B' dW; the rows get theirs of the embedding's."""
    monkeypatch.setattr("fast.training.give_back_freed_memory", lambda: None)
    torch._dynamo.reset()
    gpt = adapted(adapter)
    plain = dense(gpt, adapter)
    ids, targets = batch()
    plain(ids, targets)[1].backward()
    expected = {}
    for layer, block in enumerate(gpt.h):
        for name in LAYERS[adapter.layers]:
            linear, full = block.get_submodule(name), plain.h[layer].get_submodule(name)
            scale = adapter.alpha / adapter.rank
            expected[f"h.{layer}.{name}.lora_A"] = scale * linear.lora_B.T @ full.weight.grad
            expected[f"h.{layer}.{name}.lora_B"] = scale * full.weight.grad @ linear.lora_A.T
    if adapter.chat_rows:
        expected["wte.rows"] = plain.wte.weight.grad[88:90]
    if way != "plain":
        speed_up_training(gpt, way == "checkpointing")
    if way == "compiled":
        compile_training(gpt, lambda: gpt(ids, targets)[1].backward(), backend=COMPILED)
        gpt.zero_grad()
        assert "torch.compile: ready" in capsys.readouterr().out
    gpt(ids, targets)[1].backward()
    found = {name: weight.grad for name, weight in gpt.named_parameters() if weight.grad is not None}
    assert_same(found, {name: gradient.detach() for name, gradient in expected.items()}, atol=1e-6, rtol=1e-3)


def test_the_fast_parts_leave_an_adapters_layers_alone():
    gpt = adapted(Adapter(4, layers="attention"))
    speed_up_training(gpt)
    assert type(gpt.h[0].attn.c_attn) is LoRALinear and type(gpt.h[0].mlp.c_fc) is FastLinear


@pytest.mark.parametrize("adapter", SETTINGS, ids=IDS)
def test_only_the_factors_train_and_merging_gives_the_same_model(adapter):
    before = tiny_gpt().state_dict()
    gpt = tiny_gpt().train()
    adapt(gpt, adapter)
    factors = trained_weights(gpt)
    start = copy.deepcopy(factors)
    assert sum(weight.numel() for weight in factors.values()) == adapter.n_params(CONFIG)
    optimizer = torch.optim.AdamW([weight for weight in gpt.parameters() if weight.requires_grad], lr=1e-2)
    ids, targets = batch()
    losses = []
    for _ in range(5):
        loss = gpt(ids, targets)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    after = gpt.state_dict()
    rows = slice(88, 90) if adapter.chat_rows else slice(0, 0)
    for name, weight in before.items():
        kept = torch.ones(len(weight), dtype=torch.bool)
        if name == "wte.weight":
            kept[rows] = False
        assert torch.equal(after[name][kept], weight[kept]), name
    assert all(not torch.equal(weight, start[name]) for name, weight in trained_weights(gpt).items())
    merged = GPT(CONFIG)
    merged.load_state_dict(merge(before, trained_weights(gpt), adapter, CONFIG))
    torch.testing.assert_close(merged(ids)[0], gpt(ids)[0], atol=1e-5, rtol=1e-5)


def test_merging_rounds_once():
    gpt, adapter = adapted(Adapter(4, 7.0)), Adapter(4, 7.0)
    base, factors = tiny_gpt().state_dict(), trained_weights(gpt)
    merged = merge(base, factors, adapter, CONFIG)
    for name in base:
        expected = base[name].double()
        if f"{name.removesuffix('weight')}lora_A" in factors:
            A, B = (factors[f"{name.removesuffix('weight')}lora_{letter}"].double() for letter in "AB")
            expected = expected + 1.75 * (B @ A)
        assert torch.equal(merged[name], expected.float()), name


def test_a_full_rank_adapter_can_be_any_update():
    torch.manual_seed(0)
    gpt = tiny_gpt()
    adapt(gpt, Adapter(32, 32.0))
    update = torch.randn(96, 32)
    gpt.h[0].attn.c_attn.lora_A.data = torch.eye(32)
    gpt.h[0].attn.c_attn.lora_B.data = update
    x = torch.randn(5, 32)
    linear = gpt.h[0].attn.c_attn
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight + update, linear.bias))


def test_factors_that_do_not_fit_are_refused():
    base, factors = tiny_gpt().state_dict(), trained_weights(adapted(Adapter(4)))
    for change in (
        {"h.0.attn.c_attn.lora_B": torch.zeros(5, 4)},
        {"h.7.attn.c_attn.lora_A": torch.zeros(4, 32)},
        {"h.0.attn.c_attn.weight": torch.zeros(96, 32)},
    ):
        with pytest.raises((KeyError, RuntimeError)):
            merge(base, {**factors, **change}, Adapter(4), CONFIG)


def test_a_base_without_chatml_gets_the_mean_and_a_shorter_block_the_first_positions():
    weights = tiny_gpt(vocab_size=88, n_vocab=88).state_dict()
    fitted = fit_base(weights, tiny_gpt(block_size=8).config)
    assert fitted["wte.weight"].shape == (96, 32) and fitted["wpe.weight"].shape == (8, 32)
    assert torch.equal(fitted["wte.weight"][:88], weights["wte.weight"])
    mean = weights["wte.weight"].double().mean(0).float()
    assert all(torch.equal(row, mean) for row in fitted["wte.weight"][88:])
