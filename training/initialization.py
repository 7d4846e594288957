"""A run's model before its first step: new weights, or those of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import load_weights
from common.cli import UserError
from model import GPT, GPTConfig, padded_vocab_size

SHAPE = ("block_size", "n_vocab", "n_layer", "n_head", "n_embd", "dropout")
PUBLISHED_WIDTH, PUBLISHED_STD = 768, 0.02  # GPT-2's smallest model, and the spread of its new embeddings


def model_config(shape: Mapping[str, Any], checkpoint: dict | None = None) -> GPTConfig:
    """The GPTConfig of a run from its SHAPE; a checkpoint says whether there are biases, and may have more rows."""
    settings = {name: shape[name] for name in SHAPE}
    settings["vocab_size"] = padded_vocab_size(shape["n_vocab"])
    if checkpoint:
        saved = checkpoint["info"]["model"]
        settings["bias"] = saved["bias"]
        settings["vocab_size"] = max(settings["vocab_size"], saved["vocab_size"])
    try:
        return GPTConfig(**settings)
    except ValueError as error:
        raise UserError(f"{error}; change --n_embd or --n_head") from error


def make_model(config: GPTConfig, checkpoint: dict | None = None, path: str = "") -> GPT:
    """A model on the CPU with new weights, or those of the checkpoint loaded from `path`."""
    model = GPT(config)
    if checkpoint:
        load_weights(model, checkpoint["model"], path)
    else:
        init_for_copying(model)
    return model


@torch.no_grad()
def init_for_copying(model: GPT) -> None:
    """Give a new model embeddings that let it learn to copy from its context in a fraction of the steps.

    Copying needs a head that looks one token back ("In-context Learning and Induction Heads", Olsson et al. 2022).
    Position embeddings that are initialized to sinusoids, which are similar for neighbours, make that head easy to
    learn. A standard deviation of 0.02 suits the published widths. In a narrow model, a token whose embedding starts
    that short never gets the largest logit of the tied head unless it is frequent, so narrow models start with longer
    embeddings.
    """
    config = model.config
    std = PUBLISHED_STD * max(1.0, PUBLISHED_WIDTH / config.n_embd)
    model.wte.weight.mul_(std / PUBLISHED_STD)
    # sqrt(2): a sinusoid's mean square is 1/2, so the positions get the same standard deviation as the tokens.
    model.wpe.weight.copy_(std * math.sqrt(2) * sinusoids(config.block_size, config.n_embd))


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines (length, width) of rising wavelength ("Attention Is All You Need", section 3.5)."""
    wavelengths = 10000 ** (torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] / wavelengths  # (length, width / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]
