"""The parts of a training step, and an evaluation. Of these functions only `evaluate` waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common.device import autocast, without_cudnn_attention
from model import GPT, IGNORED
from training.config import RunConfig
from training.parallel import mean, rank, reduce, share, synchronizing, world_size
from training.sharding import full_tensor
from training.targets import document_numbers


def to_device(config: RunConfig, ids: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows on the device: ids, targets and, if attention is to stay inside documents, each id's document number."""
    arrays = [ids, targets, document_numbers(ids, config.n_vocab)] if config.document_mask else [ids, targets]
    tensors = [torch.from_numpy(array) for array in arrays]
    if config.device.startswith("cuda"):  # pinned memory can be copied while the device computes
        tensors = [tensor.pin_memory().to(config.device, non_blocking=True) for tensor in tensors]
    else:
        tensors = [tensor.to(config.device) for tensor in tensors]
    x, y = tensors[:2]
    return x, y, tensors[2] if config.document_mask else None


def forward_backward(
    model: nn.Module,
    config: RunConfig,
    ids: np.ndarray,
    targets: np.ndarray,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Add the gradients of an iteration's rows (N, T) to the weights, in micro-batches; returns the loss, one number.

    The loss is the mean over all targets of the iteration. Each process takes its share of the rows, and gradients and
    losses are averaged.
    """
    # Micro-batches have different numbers of targets, so the sum of each one's losses is divided by the number of
    # targets in the whole iteration. Processes are averaged, so each divides by its equal part of that number.
    part = max(1, int((targets != IGNORED).sum())) / world_size()
    n_targets = torch.full((), part, device=config.device)  # torch.tensor would wait for the device
    total = torch.zeros((), device=config.device)
    ids, targets = share(ids), share(targets)
    for first in range(0, len(ids), config.batch_size):
        rows = slice(first, first + config.batch_size)
        x, y, documents = to_device(config, ids[rows], targets[rows])
        with synchronizing(model, is_last=rows.stop >= len(ids)):
            with autocast(config.device, config.dtype):
                _, loss = model(x, y, n_targets, documents)
            (scaler.scale(loss) if scaler else loss).backward()
        total += loss.detach()
    return mean(total)


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
    for number in range(rank(), math.ceil(len(batches) / world_size()) * world_size(), world_size()):
        ids, targets = batches[number % len(batches)]
        # A sharded forward pass needs every process: one without a batch left repeats a batch, which does not count.
        counts.append(int((targets != IGNORED).sum()) if number < len(batches) else 0)
        x, y, documents = to_device(config, ids, targets)
        with autocast(config.device, config.dtype):
            _, loss = model(x, y, documents=documents)
        losses.append(loss)
    loss_sum = sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True))
    loss_sum, n_targets = reduce("sum", loss_sum, sum(counts))
    model.train()
    return loss_sum / max(1, n_targets)
