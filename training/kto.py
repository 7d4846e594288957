"""KTO: learning from single answers that someone labelled good or bad.

Training raises the reward of good answers above a reference point and lowers that of bad answers below it. The
reference point is how far the model has moved from the reference in general, so that nothing is gained by making all
answers likelier, or all less likely ("KTO: Model Alignment as Prospect Theoretic Optimization", Ethayarajh et al.
2024).

Shapes: N labelled answers, T time (tokens); the axis of 2 is (the answer, an answer to another prompt).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.device import autocast
from model import IGNORED
from training.preferences import DPO, answer_log_probs, drift_per_token
from training.step import Batch, arrays_to_device


def kto_losses(log_ratios: Tensor, signs: Tensor, reference_point: Tensor, beta: float) -> Tensor:
    """The loss (N,) of each answer, between 0 and 1: that of Ethayarajh et al. (2024), section 4.1, without weights.

    `log_ratios` (N,) are log p(y|x) - log p_ref(y|x), `signs` (N,) is 1 for good and -1 for bad answers, and
    `reference_point` () is in nats.
    """
    return 1 - torch.sigmoid(beta * signs * (log_ratios - reference_point))


def reference_point(log_ratios: Tensor, is_real: Tensor) -> Tensor:
    """An estimate () of the Kullback-Leibler divergence from the reference, in nats per answer, at least 0.

    It is the mean log ratio of answers to other prompts (section 4.1 of the paper), `log_ratios` (N,), over those that
    are real and not padding.
    """
    return ((log_ratios * is_real).sum() / is_real.sum().clamp(min=1)).clamp(min=0)


class KTO(DPO):
    """KTO as an objective of train.py; see `training.step.Objective` for its methods.

    An item is a labelled answer with its two rows.
    """

    def numbers(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each answer and the metrics of `metric_names`, (N, 1 + metrics).

        The reward margin is an answer's reward, weighted and with the sign of its label, so that its mean is the good
        answers' mean reward minus the bad ones'. The accuracy counts answers on their side of the reference point.
        """
        ids, targets, reference, labels = arrays_to_device(self.config, batch)  # (N, 2, T), (N, 2, T), (N, 2), (N,)
        beta, is_real = self.config.beta, (targets[:, 0] != IGNORED).any(1)
        with torch.no_grad():
            point = reference_point(self._log_probs(model, ids[:, 1], targets[:, 1]) - reference[:, 1], is_real)
        log_ratios = self._log_probs(model, ids[:, 0], targets[:, 0]) - reference[:, 0]
        losses = labels.abs() * kto_losses(log_ratios, labels.sign(), point, beta)
        log_ratios = log_ratios.detach()
        margins = 2 * labels * beta * log_ratios
        is_right = labels * (log_ratios - point) > 0
        lengths = (targets[:, 0] != IGNORED).sum(1).clamp(min=1)
        return torch.stack([losses, margins, is_right.float(), drift_per_token(log_ratios / lengths)], dim=1)

    def _log_probs(self, model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.config.device, self.config.dtype):
            logits, _ = model(ids)
        return answer_log_probs(logits, targets)
