"""The learning rate over a run."""

from __future__ import annotations

import math

from training.config import RunConfig

WSD_STABLE = 0.8  # fraction of the iterations before "wsd" starts to lower the rate


def schedule(iter_num: float, config: RunConfig) -> float:
    """The learning rate of an iteration as a fraction of its peak: linear warm-up, then a fall to min_lr.

    `iter_num` is a whole number in train.py, where all iterations have the same number of tokens.

    "wsd" (warm-up, stable, decay) keeps the peak until a fifth of the iterations is left, and then falls with the
    square root of the completed fraction of that fifth ("MiniCPM", Hu et al. 2024, section 4; the root: Haegele et al.
    2024, section 3). "cosine" falls along half a cosine wave ("SGDR", Loshchilov and Hutter 2017, section 3, no
    restarts).
    """
    if iter_num < config.warmup_iters:
        return (iter_num + 1) / config.warmup_iters
    lowest = min(1.0, config.min_lr / config.learning_rate) if config.learning_rate else 0.0
    if config.schedule == "wsd":
        start = max(config.warmup_iters, round(WSD_STABLE * config.max_iters))
        fall = math.sqrt(min(1.0, max(0, iter_num - start) / max(1, config.max_iters - start)))
    else:
        done = min(1.0, (iter_num - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters))
        fall = 0.5 * (1 - math.cos(math.pi * done))
    return 1 - (1 - lowest) * fall
