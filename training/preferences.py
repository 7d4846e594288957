"""Learning from preferences: the loss of DPO, and the objective that trains with it.

A model's implicit reward for an answer y to a prompt x is beta (log p(y|x) - log p_ref(y|x)): how much likelier the
answer has become than under the reference, which is the model that training starts from. DPO raises the chosen answer's
reward above the rejected one's ("Direct Preference Optimization", Rafailov et al. 2023).

Shapes: P pairs, T time (tokens); the axis of 2 is (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import autocast
from model import IGNORED
from training.batches import Rows, fixed_batches
from training.config import RunConfig
from training.pair_rows import PairRows
from training.parallel import own_indices, reduce
from training.step import Batch, arrays_to_device, micro_batches


def answer_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """The log probability (N,) of each row's answer in nats: the sum over its targets that are not IGNORED.

    `logits` are (N, T, V), `targets` (N, T).
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view_as(targets).sum(1)


def dpo_losses(
    log_probs: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss (P,) of each pair and the margin (P,) by which its chosen answer's reward is larger.

    `log_probs` and `reference` (P, 2) are the answers' log probabilities by the model and by the reference. With
    `label_smoothing` 0 the loss is equation 7 of Rafailov et al. (2023). Otherwise it assumes that this fraction of the
    labels is swapped ("A note on DPO with noisy preferences", Mitchell 2023, equation 3).
    """
    rewards = beta * (log_probs - reference)  # (P, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return losses, margins


def drift_per_token(log_ratios: Tensor) -> Tensor:
    """An estimate (...) of the Kullback-Leibler divergence from the reference, in nats per token.

    `log_ratios` (...) are the logarithms of an answer's probability divided by the reference's, per token. The estimate
    is r - 1 - log r for the ratio r ("Approximating KL Divergence", Schulman 2020): 0 for the reference itself and
    otherwise positive. It is exact only for answers that the reference itself would give.
    """
    return log_ratios.exp() - 1 - log_ratios


class DPO:
    """DPO as an objective of train.py; see `training.step.Objective` for its methods."""

    metric_names: tuple[str, ...] = ("reward_margin", "accuracy", "drift")

    def __init__(self, config: RunConfig, rows: Mapping[str, PairRows]):
        self.config, self._rows = config, rows
        self.pairs_per_micro_batch = config.batch_size // 2
        self.items_per_iter = self.pairs_per_micro_batch * config.gradient_accumulation_steps
        self.tokens_per_iter = 2 * self.items_per_iter * rows["train"].length

    def make_rows(self) -> tuple[Rows, dict[str, list]]:
        name = self.config.dataset
        val = fixed_batches(self._rows["val"], self.pairs_per_micro_batch, max(1, self.config.val_rows // 2))
        return self._rows["train"], {name: val}

    def micro_batches(self, batch: Batch) -> list[Batch]:
        return micro_batches(batch, self.pairs_per_micro_batch)

    def count(self, batch: Batch) -> int:
        return len(batch[0])

    def loss(self, model: nn.Module, batch: Batch, n_pairs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        numbers = self.numbers(model, batch)  # (P, 4)
        sums = numbers.sum(0) / (len(batch[0]) if n_pairs is None else n_pairs)
        return sums[0], sums.detach()

    def numbers(self, model: nn.Module, batch: Batch) -> Tensor:
        """Each pair's loss and the metrics of `metric_names`, (P, 1 + metrics); the drift is that of both answers."""
        config = self.config
        ids, targets, reference = arrays_to_device(config, batch)  # (P, 2, T), (P, 2, T), (P, 2)
        with autocast(config.device, config.dtype):
            logits, _ = model(ids.flatten(0, 1))
        log_probs = answer_log_probs(logits, targets.flatten(0, 1)).view_as(reference)
        losses, margins = dpo_losses(log_probs, reference, config.beta, config.label_smoothing)
        lengths = (targets != IGNORED).sum(2).clamp(min=1)
        if config.sft_weight:
            losses = losses - config.sft_weight * log_probs[:, 0] / lengths[:, 0]
        log_ratios = (log_probs.detach() - reference) / lengths
        drift = drift_per_token(log_ratios).mean(1)
        return torch.stack([losses, margins.detach(), (margins.detach() > 0).float(), drift], dim=1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        model.eval()
        sums, n_pairs = np.zeros(1 + len(self.metric_names)), 0
        for number, is_own in own_indices(len(batches)):
            batch = batches[number]
            numbers = self.numbers(model, batch).double().cpu().numpy()
            is_real = (batch[1] != IGNORED).any(axis=(1, 2)) & is_own  # the last batch is padded
            sums += numbers[is_real].sum(0)
            n_pairs += int(is_real.sum())
        *totals, count = reduce("sum", *sums.tolist(), n_pairs)
        model.train()
        loss, *others = (total / max(1, count) for total in totals)
        return loss, dict(zip(self.metric_names, others, strict=True))
