"""What a run minimizes: the next token's cross entropy, or a loss over preferences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from common.device import autocast
from model import GPT, IGNORED
from training.batches import Rows
from training.config import RunConfig
from training.datasets import TrainingData, make_rows
from training.kto import KTO
from training.label_rows import LabelRows
from training.pair_rows import PairRows
from training.preferences import DPO
from training.reference import open_pairs
from training.step import Batch, Objective, evaluate, micro_batches, model_inputs


class NextToken:
    """The cross entropy of each target."""

    metric_names: tuple[str, ...] = ()

    def __init__(self, config: RunConfig, data: TrainingData | None = None):
        self.config, self.data = config, data
        self.items_per_iter = config.batch_size * config.gradient_accumulation_steps
        self.tokens_per_iter = config.tokens_per_iter

    def make_rows(self) -> tuple[Rows, dict[str, list]]:
        assert self.data is not None
        return make_rows(self.data, self.config)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        return micro_batches(batch, self.config.batch_size)

    def count(self, batch: Batch) -> int:
        return max(1, int((batch[1] != IGNORED).sum()))

    def loss(self, model: nn.Module, batch: Batch, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = model_inputs(self.config, *batch)
        with autocast(self.config.device, self.config.dtype):
            _, loss = model(**inputs, n_targets=count)
        return loss, loss.detach()[None]

    def evaluate(self, model: GPT, batches: Sequence[Any]) -> tuple[float, dict[str, float]]:
        return evaluate(model, batches, self.config), {}


def evaluate_parts(
    objective: Objective, model: GPT, val_batches: Mapping[str, Sequence[Batch]]
) -> tuple[dict[str, float], dict[str, float]]:
    """The validation loss of each data set, and the objective's other metrics (only for a single data set)."""
    losses: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, batches in val_batches.items():
        losses[name], others = objective.evaluate(model, batches)
    return losses, others


def make_objective(
    config: RunConfig, data: TrainingData, model: GPT, checkpoint: Mapping[str, Any] | None
) -> tuple[Objective, str | None]:
    """The run's objective, and the digest of the reference log probabilities if it uses any.

    `model` has the weights of `checkpoint`, which --init_from or --resume names.
    """
    if config.objective == "next_token":
        return NextToken(config, data), None
    assert checkpoint is not None
    if config.objective == "kto":
        labels, digest = open_pairs(config, data, model, checkpoint, LabelRows)
        return KTO(config, labels), digest
    pairs, digest = open_pairs(config, data, model, checkpoint, PairRows)
    return DPO(config, pairs), digest
