"""A model whose weights are frozen, with an adapter's factors that train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from common.checkpoint import build_model
from common.cli import UserError
from common.lora import Adapter, adapt, fit_base, trained_weights
from model import GPT, GPTConfig


def frozen_model(config: GPTConfig, weights: Mapping[str, Tensor], dtype: str, path: str) -> GPT:
    """A model on the CPU with copies of the base's weights, which do not train."""
    model = build_model(path, {"info": {"model": dataclasses.asdict(config)}, "model": fit_base(weights, config)})
    lower_matrices(model, dtype)
    return model


def lower_matrices(model: GPT, dtype: str) -> None:
    """Keep the blocks' matrices in `dtype`, and copies of all other weights in float32.

    Under autocast the products are in this precision anyway, so frozen weights give the same results with half the
    memory. The small steps of weights that train would be lost.
    """
    for name, weight in model.named_parameters():
        is_matrix = weight.dim() == 2 and name.startswith("h.")
        weight.data = weight.data.to(getattr(torch, dtype) if is_matrix else torch.float32, copy=True)


def load_factors(model: GPT, factors: Mapping[str, Tensor], path: str) -> None:
    """Copy a checkpoint's factors into an adapted model. Raises UserError if they are not those of its adapter."""
    own = trained_weights(model)
    wrong = sorted(own.keys() ^ factors.keys())
    wrong += [name for name in own.keys() & factors.keys() if own[name].shape != factors[name].shape]
    if wrong:
        raise UserError(f"{path} does not fit its own settings ({wrong[0]}); use another checkpoint")
    model.load_state_dict(factors, strict=False)


def trial_model(config: GPTConfig, adapter: Adapter | None, device: str, dtype: str) -> GPT:
    """A throwaway model as large as a run's, on its device."""
    if adapter is None:
        with torch.device(device):
            return GPT(config)
    with torch.device("meta"):
        model = GPT(config)
    lower_matrices(model, dtype)
    model.to_empty(device=device)
    adapt(model, adapter)
    return model
