"""A model with frozen weights and an adapter's trainable factors."""

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
    """A model on the CPU with copies of the base's weights, in which the blocks' matrices have `dtype`."""
    model = build_model(path, {"info": {"model": dataclasses.asdict(config)}, "model": fit_base(weights, config)})
    cast_matrices(model, dtype)
    return model


def cast_matrices(model: GPT, dtype: str) -> None:
    """Convert the blocks' matrices to `dtype`, and all other weights to float32; all of them are copied.

    Under autocast the products are in this precision anyway, so frozen weights give the same results with half the
    memory. Trainable weights need float32, because `dtype` would round their small updates away.
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
    cast_matrices(model, dtype)
    model.to_empty(device=device)
    adapt(model, adapter)
    return model
