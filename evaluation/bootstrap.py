"""Which of two models is better, and how certain that is: a paired bootstrap over documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evaluation.splits import Split

RESAMPLES = 2000
MIN_UNITS = 10  # with fewer documents or blocks, the interval would be too narrow
NATS_PER_TOKEN, BITS_PER_BYTE = "nats per token", "bits per byte"


class Scored(NamedTuple):
    """A model's losses at every position of a split; models with other tokenizers have splits of their own."""

    checkpoint: str
    split: Split
    losses: np.ndarray  # (N + 1,) nats


def paired_bootstrap(scope: str, first: Scored, second: Scored) -> dict | None:
    """The difference of two models' mean losses, second - first, with its 95 % interval; None with too few documents.

    Models with one tokenizer are compared in nats per token, others in bits per byte of the same documents. Documents
    are drawn with replacement, the same ones for both models, RESAMPLES times from a fixed seed; the interval runs from
    the 2.5th to the 97.5th percentile ("An Introduction to the Bootstrap", Efron and Tibshirani 1993, chapter 13;
    paired as in "Statistical Significance Tests for Machine Translation Evaluation", Koehn 2004).
    """
    same_ids = first.split.ids is second.split.ids
    per_unit = _per_token(scope, first, second) if same_ids else _per_byte(scope, first, second)
    if per_unit is None:
        return None
    sums, sizes = per_unit
    rng = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):
        drawn = rng.integers(len(sums), size=len(sums))
        means[resample] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return {
        "difference": float(sums.sum() / sizes.sum()),
        "interval": [low, high],
        "excludes_zero": low > 0 or high < 0,
        "units": f"{len(sums):,} {first.split.unit_name}",
        "measure": NATS_PER_TOKEN if same_ids else BITS_PER_BYTE,
    }


def margin(split: Split, scope: str, losses: np.ndarray) -> float | None:
    """Half the 95 % interval of a model's mean loss over other text of the same kind; None with too few documents.

    The mean is a ratio of sums over documents, nats to tokens ("Sampling Techniques", Cochran 1977, section 6.3).
    """
    counts = split.counted[scope][0]
    own = losses[counts].astype(np.float64)
    _, unit = np.unique(split.unit[counts], return_inverse=True)
    n_units = int(unit.max(initial=-1)) + 1
    if n_units < MIN_UNITS:
        return None
    deviations = np.bincount(unit, weights=own - own.mean())
    return float(1.96 * np.sqrt((deviations**2).sum() * n_units / (n_units - 1)) / len(own))


def _per_token(scope: str, first: Scored, second: Scored) -> tuple[np.ndarray, np.ndarray] | None:
    """The difference in nats, and the number of tokens, of each document or block."""
    split = first.split
    counts = split.counted[scope][0]
    difference = second.losses[counts].astype(np.float64) - first.losses[counts]
    _, unit = np.unique(split.unit[counts], return_inverse=True)
    if int(unit.max(initial=-1)) + 1 < MIN_UNITS:
        return None
    return np.bincount(unit, weights=difference), np.bincount(unit)


def _per_byte(scope: str, first: Scored, second: Scored) -> tuple[np.ndarray, np.ndarray] | None:
    """The difference in bits, and the bytes of text, of each document; None if there are too few documents."""
    split = first.split
    if split.unit_name.startswith("blocks") or split.unit_name != second.split.unit_name:
        return None  # blocks of tokens contain other text in another tokenizer
    n_units = int(max(split.unit.max(), second.split.unit.max())) + 1
    bits = [np.zeros(n_units), np.zeros(n_units)]
    for one, own in zip(bits, (first, second), strict=True):
        counts = own.split.counted[scope][0]
        one += np.bincount(own.split.unit[counts], own.losses[counts] / math.log(2), minlength=n_units)
    in_scope = split.counted[scope][0]
    sizes = np.bincount(split.unit[in_scope], split.bytes_at[in_scope], minlength=n_units)
    is_counted = sizes > 0
    if is_counted.sum() < MIN_UNITS:
        return None
    return (bits[1] - bits[0])[is_counted], sizes[is_counted]


def compare(models: Sequence[Scored]) -> list[dict]:
    """Compare every checkpoint but the first with the first, in each scope."""
    baseline = models[0]
    return [
        {"checkpoint": other.checkpoint, "baseline": baseline.checkpoint, "scope": scope, "bootstrap": bootstrap}
        for scope in baseline.split.counted
        for other in models[1:]
        for bootstrap in [paired_bootstrap(scope, baseline, other)]
    ]


def verdict(models: Sequence[Scored]) -> dict | None:
    """Compare the best checkpoint with the second best, in the split's main scope; None for a single checkpoint."""
    if len(models) < 2:
        return None
    scope = models[0].split.main_scope
    totals = [float(own.losses[own.split.counted[scope][0]].sum(dtype=np.float64)) for own in models]
    best, second = (models[index] for index in sorted(range(len(totals)), key=totals.__getitem__)[:2])
    return {
        "scope": scope,
        "best": best.checkpoint,
        "second": second.checkpoint,
        "bootstrap": paired_bootstrap(scope, best, second),
    }
