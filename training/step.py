"""The parts of a training step, and an evaluation. Of these functions only `evaluate` waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoint import random_states, set_random_states
from common.device import autocast, without_cudnn_attention
from model import GPT, IGNORED
from training.batches import Rows
from training.config import RunConfig
from training.parallel import average_, own_indices, own_share, reduce, synchronizing, world_size
from training.sharding import full_tensor
from training.targets import document_numbers, document_positions

Batch = Sequence[np.ndarray]  # the columns of rows: ids, targets and, for pairs, reference log probabilities


class Objective(Protocol):
    """What differs between the objectives: rows, loss, evaluation, and what is logged."""

    metric_names: tuple[str, ...]  # of the numbers that are logged with the loss
    items_per_iter: int  # rows, or pairs of rows
    tokens_per_iter: int

    def make_rows(self) -> tuple[Rows, dict[str, list]]:
        """The rows to train on, and each data set's validation batches."""

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """A batch divided into micro-batches."""

    def count(self, batch: Batch) -> int:
        """The number of items over which an iteration's loss is averaged: targets, pairs or labelled answers."""

    def loss(self, model: nn.Module, batch: Batch, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum of a micro-batch's losses divided by `count`, by default its own count.

        Returns it for the backward pass and, detached, followed by the metrics of `metric_names`: (1 + metrics,).
        """

    def evaluate(self, model: Any, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """The mean loss over validation batches, which the processes share, and the metrics of `metric_names`."""


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """A batch divided into micro-batches of `size` rows, or pairs."""
    return [[column[first : first + size] for column in batch] for first in range(0, len(batch[0]), size)]


def model_inputs(config: RunConfig, ids: np.ndarray, targets: np.ndarray) -> dict[str, Tensor]:
    """The model's arguments for rows: ids, targets and, if attention is to stay inside documents, the number of each
    id's document and its position in it."""
    arrays = {"idx": ids, "targets": targets}
    if config.document_mask:
        documents = document_numbers(ids, config.n_vocab)
        arrays |= {"documents": documents, "positions": document_positions(ids, documents)}
    return dict(zip(arrays, arrays_to_device(config, list(arrays.values())), strict=True))


def arrays_to_device(config: RunConfig, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """Arrays as tensors on the run's device."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if config.device.startswith("cuda"):  # pinned memory can be copied while the device computes
        return [tensor.pin_memory().to(config.device, non_blocking=True) for tensor in tensors]
    return [tensor.to(config.device) for tensor in tensors]


def forward_backward(
    model: nn.Module,
    config: RunConfig,
    objective: Objective,
    batch: Batch,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Add the gradients of an iteration's batch to the weights, in micro-batches; returns the loss and the
    objective's other metrics, (1 + metrics,).

    The loss is the mean over all targets, or pairs, of the iteration. Each process takes its share of the rows, and
    gradients and losses are averaged.
    """
    # Micro-batches have different numbers of targets, so the sum of each one's losses is divided by the number of
    # targets in the whole iteration. Processes are averaged, so each divides by its equal part of that number.
    count = torch.full(
        (), objective.count(batch) / world_size(), device=config.device
    )  # torch.tensor would wait for the device
    total = torch.zeros(1 + len(objective.metric_names), device=config.device)
    parts = objective.micro_batches([own_share(column) for column in batch])
    for number, micro_batch in enumerate(parts, 1):
        with synchronizing(model, is_last=number == len(parts)):
            loss, numbers = objective.loss(model, micro_batch, count)
            (scaler.scale(loss) if scaler else loss).backward()
        total += numbers
    return average_(total)


def clip_gradients(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    grad_clip: float,
) -> Tensor:
    """Scale the gradients down to the norm `grad_clip` if theirs is larger (0: never); returns their norm before."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))


@torch.no_grad()
@without_cudnn_attention()
def evaluate(model: GPT, batches: Sequence[tuple[np.ndarray, np.ndarray]], config: RunConfig) -> float:
    """The mean loss in nats per target over batches of (ids, targets), which the processes share."""
    model.eval()
    losses, counts = [], []
    for number, is_own in own_indices(len(batches)):
        ids, targets = batches[number]
        counts.append(int((targets != IGNORED).sum()) if is_own else 0)
        inputs = model_inputs(config, ids, targets)
        with autocast(config.device, config.dtype):
            _, loss = model(**inputs)
        losses.append(loss)
    loss_sum = sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True))
    loss_sum, n_targets = reduce("sum", loss_sum, sum(counts))
    model.train()
    return loss_sum / max(1, n_targets)


def try_step(model: GPT, objective: Objective, batch: Batch, device: str) -> None:
    """Run one micro-batch of `batch` forward and backward, then restore the gradients and the random states."""
    states = random_states(device)
    try:
        loss, _ = objective.loss(model, objective.micro_batches(batch)[0])
        loss.backward()
        loss.item()  # waits for the device, which reports errors late
    finally:
        model.zero_grad(set_to_none=True)
        set_random_states(states, device)
