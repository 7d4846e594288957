"""AdamW and Muon as `make_optimizers` sets them up."""

from __future__ import annotations

import copy

import pytest
import torch

from model import GPT, GPTConfig
from tests.test_train_config import config_of
from training.optimizers import init_optimizer_states, make_optimizers

SHAPE = GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rare_tokens_do_not_drift(optimizer):
    """A gradient far below that of one occurrence must not move an embedding as far as a real one does."""
    gpt = GPT(SHAPE)
    decay = {"weight_decay": 0.0} if optimizer == "adamw" else {}
    config = config_of(optimizer=optimizer, **decay)
    one_occurrence = 1 / config.tokens_per_iter
    made = make_optimizers(gpt, config)
    names = {id(weight) for each in made for group in each.param_groups for weight in group["params"]}
    assert names == {id(weight) for weight in gpt.parameters()}
    before = gpt.wte.weight.detach().clone()
    gradient = torch.zeros_like(before)
    gradient[7], gradient[8] = one_occurrence, 1e-5 * one_occurrence  # the second only becomes less likely
    for _ in range(20):
        gpt.wte.weight.grad = gradient.clone()
        made[-1].step()
    moved = (gpt.wte.weight.detach() - before).abs().mean(1)
    assert moved[8] < moved[7] / 100 and moved[9] == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_states_made_before_the_first_step_are_those_of_torch(optimizer):
    config = config_of(optimizer=optimizer)
    found = []
    for is_early in (False, True):
        torch.manual_seed(0)
        gpt = GPT(SHAPE)
        both = make_optimizers(gpt, config)
        if is_early:
            groups = [group for each in both for group in each.param_groups]
            weights, rates = copy.deepcopy(gpt.state_dict()), [group["lr"] for group in groups]
            init_optimizer_states(both)
            torch.testing.assert_close(gpt.state_dict(), weights, rtol=0, atol=0)
            assert [group["lr"] for group in groups] == rates and all(rates)
            assert all(weight.grad is None for weight in gpt.parameters())
            made = [state for each in both for state in each.state_dict()["state"].values()]
            assert not any(value.any() for state in made for value in state.values())
        for weight in gpt.parameters():
            weight.grad = torch.randn_like(weight)
        for each in both:
            each.step()
        found.append((gpt.state_dict(), [each.state_dict()["state"] for each in both]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)  # the same weights and states after a step
