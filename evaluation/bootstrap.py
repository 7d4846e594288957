"""Which of two models is better, and how certain that is: a paired bootstrap over documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.splits import Split

RESAMPLES = 2000
FEWEST_UNITS = 10  # with fewer documents or blocks, the interval would be too narrow


def paired_bootstrap(split: Split, scope: str, first: np.ndarray, second: np.ndarray) -> dict | None:
    """The difference of two models' mean losses, second - first, with its 95 % interval; None with too few documents.

    Documents are drawn with replacement, the same ones for both models, RESAMPLES times from a fixed seed; the
    interval runs from the 2.5th to the 97.5th percentile ("An Introduction to the Bootstrap", Efron and Tibshirani
    1993, chapter 13; paired as in "Statistical Significance Tests for Machine Translation Evaluation", Koehn 2004).
    """
    counts = split.counted[scope][0]
    difference = second[counts].astype(np.float64) - first[counts]
    _, unit = np.unique(split.unit[counts], return_inverse=True)
    n_units = int(unit.max(initial=-1)) + 1
    if n_units < FEWEST_UNITS:
        return None
    nats, tokens = np.bincount(unit, weights=difference), np.bincount(unit)
    rng = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):
        drawn = rng.integers(n_units, size=n_units)
        means[resample] = nats[drawn].sum() / tokens[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return {
        "difference": float(difference.mean()),
        "interval": [low, high],
        "excludes_zero": low > 0 or high < 0,
        "units": f"{n_units:,} {split.unit_name}",
    }


def margin(split: Split, scope: str, losses: np.ndarray) -> float | None:
    """Half the 95 % interval of a model's mean loss over other text of the same kind; None with too few documents.

    The mean is a ratio of sums over documents, nats to tokens ("Sampling Techniques", Cochran 1977, section 6.3).
    """
    counts = split.counted[scope][0]
    own = losses[counts].astype(np.float64)
    _, unit = np.unique(split.unit[counts], return_inverse=True)
    n_units = int(unit.max(initial=-1)) + 1
    if n_units < FEWEST_UNITS:
        return None
    deviations = np.bincount(unit, weights=own - own.mean())
    return float(1.96 * np.sqrt((deviations**2).sum() * n_units / (n_units - 1)) / len(own))


def compare(split: Split, checkpoints: Sequence[str], losses: Sequence[np.ndarray]) -> list[dict]:
    """Every checkpoint but the first against the first, in each scope."""
    return [
        {"checkpoint": path, "baseline": checkpoints[0], "scope": scope, "bootstrap": bootstrap}
        for scope in split.counted
        for path, own in zip(checkpoints[1:], losses[1:], strict=True)
        for bootstrap in [paired_bootstrap(split, scope, losses[0], own)]
    ]


def verdict(split: Split, checkpoints: Sequence[str], losses: Sequence[np.ndarray]) -> dict | None:
    """The best checkpoint against the second best, in the split's main scope; None for a single checkpoint."""
    if len(checkpoints) < 2:
        return None
    counts = split.counted[split.main_scope][0]
    totals = [float(own[counts].sum(dtype=np.float64)) for own in losses]
    best, second = sorted(range(len(totals)), key=totals.__getitem__)[:2]
    return {
        "scope": split.main_scope,
        "best": checkpoints[best],
        "second": checkpoints[second],
        "bootstrap": paired_bootstrap(split, split.main_scope, losses[best], losses[second]),
    }
