"""What compare_optimizers.py compares: changes to the optimizer, to the initial weights, and to the batches.

Each is a published technique that keeps GPT-2's architecture. docs/experiments/optimizer.md says what they gained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from model import GPT, Block
from training.initialization import PUBLISHED_STD, PUBLISHED_WIDTH
from training.muon import Muon

SAFETY = 1.01  # rounding errors must not make a singular value larger than this
CUSHION = 0.024  # the least ratio between the ends of the interval that a polynomial is fitted to
ROW_SIZE_MOMENTUM = 0.95  # of NorMuon's running mean
FIRST_SHARE, GROWN_BY = 0.25, 0.5  # of the batch or the rows at the start; of the tokens, when it is whole


class PolarMuon(Muon):
    """Muon with a different polynomial in each iteration, the best one for the singular values at that point.

    "The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon Algorithm" (Amsel et al. 2025).
    """

    def orthogonalised(self, matrices: Tensor, group: dict) -> Tensor:
        is_tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if is_tall else matrices
        x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=group["eps"]) * SAFETY)
        for a, b, c in polar_coefficients(group["ns_steps"]):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return x.mT if is_tall else x


class CautiousMuon(Muon):
    """Muon whose decay skips the weights that the update makes larger ("Cautious Weight Decay", Chen et al. 2025)."""

    def apply(self, weights: list[Tensor], updates: Tensor, group: dict) -> None:
        for weight, update in zip(weights, updates, strict=True):
            shrinks = (update * weight > 0).to(weight.dtype)
            weight.sub_(weight * shrinks, alpha=group["lr"] * group["weight_decay"])
        super().apply(weights, updates, {**group, "weight_decay": 0.0})


class NorMuon(Muon):
    """Muon whose update is divided, row by row, by the recent size of that row ("NorMuon", Li et al. 2025).

    Afterwards the update has its former norm again, so that only the shares of the rows change.
    """

    def apply(self, weights: list[Tensor], updates: Tensor, group: dict) -> None:
        for weight, update in zip(weights, updates, strict=True):
            sizes = update.square().mean(1, keepdim=True)
            recent = self.state[weight].setdefault("row_sizes", torch.zeros_like(sizes))
            recent.lerp_(sizes, 1 - ROW_SIZE_MOMENTUM)
            norm = update.norm()
            update.div_(recent.sqrt().clamp(min=group["eps"]))
            update.mul_(norm / update.norm().clamp(min=group["eps"]))
        super().apply(weights, updates, group)


class WholeMuon(Muon):
    """Muon as in torch, for which the weight of c_attn is one matrix and not three."""

    def n_parts(self, weight: Tensor) -> int:
        return 1


class HyperballMuon(Muon):
    """Muon that keeps the norm of each matrix; the update, of the same norm times the rate, only turns it.

    As result 5 of modded-nanogpt's optimization track (2026). Weight decay would change nothing.
    """

    def apply(self, weights: list[Tensor], updates: Tensor, group: dict) -> None:
        for weight, update in zip(weights, updates, strict=True):
            norm = weight.norm()
            weight.sub_(update * (group["lr"] * norm / update.norm().clamp(min=group["eps"])))
            weight.mul_(norm / weight.norm())


def blocks_of(model: GPT) -> list[Block]:
    """The model's blocks, with their type."""
    return [cast(Block, block) for block in model.h]


@torch.no_grad()
def zero_projections(model: GPT) -> None:
    """Blocks that add nothing at first ("Fixup Initialization", Zhang et al. 2019, section 3, and modded-nanogpt)."""
    for block in blocks_of(model):
        block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()


@torch.no_grad()
def published_embeddings(model: GPT) -> None:
    """Embeddings with GPT-2's standard deviation instead of the larger one of `init_for_copying` for narrow models."""
    model.wte.weight.div_(max(1.0, PUBLISHED_WIDTH / model.config.n_embd))
    model.wpe.weight.normal_(std=PUBLISHED_STD)


@torch.no_grad()
def wide_matrices(model: GPT) -> None:
    """Matrices whose entries have the variance 1 / inputs ("Efficient BackProp", LeCun et al. 1998, section 4.6)."""
    for block in blocks_of(model):
        for linear in (block.attn.c_attn, block.mlp.c_fc):
            linear.weight.mul_(linear.in_features**-0.5 / PUBLISHED_STD)


def growing(done: float) -> float:
    """The share of a batch, or of its rows, after this part of the run's tokens: it grows evenly, and then is whole."""
    return min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * done / GROWN_BY)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a run does differently from train.py with its defaults."""

    changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # of train.py's options
    muon: type[Muon] | None = Muon  # the optimizer of the blocks' matrices; None for AdamW
    prepare: Callable[[GPT], None] | None = None  # called with the new model
    rows_share: Callable[[float], float] | None = None  # of the batch, by the part of the tokens that is done
    length_share: Callable[[float], float] | None = None  # likewise, of each row
    decay_share: Callable[[float], float] | None = None  # likewise, of Muon's weight decay
    average_share: float | None = None  # of the run, over which the weights that are evaluated are averaged


VARIANTS = {
    "adamw": Variant({"optimizer": "adamw"}, muon=None),
    "adamw, 6e-3": Variant({"optimizer": "adamw", "learning_rate": 6e-3}, muon=None),
    "adamw, published": Variant({"optimizer": "adamw"}, muon=None, prepare=published_embeddings),
    "adamw, published, 1.5e-3": Variant(
        {"optimizer": "adamw", "learning_rate": 1.5e-3}, muon=None, prepare=published_embeddings
    ),
    "adamw, published, 6e-4": Variant(
        {"optimizer": "adamw", "learning_rate": 6e-4}, muon=None, prepare=published_embeddings
    ),
    "adamw, 6e-4": Variant({"optimizer": "adamw", "learning_rate": 6e-4}, muon=None),
    "adamw, 1.5e-3": Variant({"optimizer": "adamw", "learning_rate": 1.5e-3}, muon=None),
    "muon": Variant(),
    "muon, 6e-3": Variant({"learning_rate": 6e-3}),  # of the embeddings, and with them of the tied head
    "muon, 0.04": Variant({"muon_learning_rate": 0.04}),
    "polar": Variant(muon=PolarMuon),
    "decay": Variant({"muon_weight_decay": 0.1}),
    "falling decay": Variant({"muon_weight_decay": 0.2}, decay_share=lambda done: 1 - done),
    "cautious": Variant({"muon_weight_decay": 0.1}, muon=CautiousMuon),
    "growing batch": Variant(rows_share=growing),
    "growing rows": Variant(length_share=growing),
    "zero projections": Variant(prepare=zero_projections),
    "wide matrices": Variant(prepare=wide_matrices),
    "published embeddings": Variant(prepare=published_embeddings),
    "published, 6e-3": Variant({"learning_rate": 6e-3}, prepare=published_embeddings),
    "bfloat16": Variant({"dtype": "bfloat16"}),
    "bfloat16 residual": Variant({"dtype": "bfloat16", "residual_dtype": "bfloat16"}),
    "whole c_attn, 6e-3": Variant({"learning_rate": 6e-3}, muon=WholeMuon),
    "normuon": Variant(muon=NorMuon),
    "normuon, 0.04": Variant({"muon_learning_rate": 0.04}, muon=NorMuon),
    "hyperball": Variant({"muon_weight_decay": 0.0}, muon=HyperballMuon),
    "hyperball, 0.1": Variant({"muon_weight_decay": 0.0, "muon_learning_rate": 0.1}, muon=HyperballMuon),
    "to zero": Variant({"min_lr": 0.0}),
    "averaged": Variant(average_share=0.05),
}


def polar_coefficients(steps: int, lowest: float = 1e-3) -> list[tuple[float, float, float]]:
    """The a, b, c of each iteration's a x + b x^3 + c x^5, for singular values from `lowest` to 1.

    Each polynomial is the best for the interval in which the one before leaves the values. In all but the last the
    argument is divided by `SAFETY`, so that rounding takes no value out of its interval.
    """
    low, high, found = lowest, 1.0, []
    for step in range(1, steps + 1):
        # Fitted to the smallest values, the first polynomials would amplify them so much that larger ones fall below.
        a, b, c = best_quintic(max(low, CUSHION * high), high)
        at_low, at_high = (a * x + b * x**3 + c * x**5 for x in (low, high))
        scale = 2 / (at_low + at_high)  # so that the interval has its centre at 1
        low, high = scale * at_low, scale * at_high
        safety = SAFETY if step < steps else 1.0
        found.append((scale * a / safety, scale * b / safety**3, scale * c / safety**5))
    return found


def best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The a, b, c with the smallest maximum of |1 - (a x + b x^3 + c x^5)| for x from `low` to `high`, by Remez.

    The best polynomial is alternately below and above 1 by the same error, at the ends and at its two extrema.
    """
    a = b = c = 0.0
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(100):
        x = np.array([low, *inner, high])
        system = np.stack([x, x**3, x**5, np.array([1, -1, 1, -1])], axis=1)
        a, b, c, _error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return float(a), float(b), float(c)
