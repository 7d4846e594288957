"""How many iterations fit a data set: the default of train.py, and what the prepare scripts advise.

An epoch is one pass over the training rows. Rows are counted as the tokens divided by block_size; conversations, which
are packed whole, fill a few more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_ITERS = 5000
# The published data sets have more tokens than this (DailyDialog: 1.6 million) and get DEFAULT_ITERS.
FEW_TOKENS = 1_000_000
FITTING_EPOCHS = 8  # with more, a model mostly memorizes a small text
MIN_ITERS = 100  # with fewer steps, a new model learns nothing, however little data there is
# A trained model is changed in smaller steps, so it needs more of them, but fewer rows in each: with the rows of a new
# model, a few conversations would be in each step several times (docs/fine-tuning.md).
MIN_FINE_TUNING_ITERS = 300
FINE_TUNING_ROWS = 4
PREFERENCE_EPOCHS = 3
MIN_PREFERENCE_ITERS = 50


@dataclass(frozen=True)
class Portion:
    """A data set as part of a run: its name, its training tokens, its share of the rows, and its rows if known."""

    name: str
    tokens: int
    share: float = 1.0
    rows: int | None = None

    def epochs(self, iters: float, block_size: int, rows_per_iter: int) -> float:
        """The number of epochs in `iters` iterations."""
        return iters * rows_per_iter * self.share / (self.rows or math.ceil(self.tokens / block_size))

    def fitting_iters(self, block_size: int, rows_per_iter: int, fewest: int) -> int:
        """The iterations of FITTING_EPOCHS, at least `fewest`; DEFAULT_ITERS if there are not few tokens."""
        if self.tokens >= FEW_TOKENS:
            return DEFAULT_ITERS
        iters = FITTING_EPOCHS / self.epochs(1, block_size, rows_per_iter)
        return min(DEFAULT_ITERS, max(fewest, round_up(iters)))


def fitting_iters(portions: Sequence[Portion], block_size: int, rows_per_iter: int) -> int:
    """The iterations that fit a mixture: as many as its least repeated part needs.

    >>> fitting_iters([Portion("diary", 50_000)], block_size=256, rows_per_iter=16)
    100
    """
    return max(portion.fitting_iters(block_size, rows_per_iter, MIN_ITERS) for portion in portions)


def fine_tuning_iters(portions: Sequence[Portion], block_size: int, rows_per_iter: int) -> int:
    """The iterations that teach a trained model a mixture: as many as its most repeated part needs.

    The other parts are there so that the model does not forget them.
    """
    return min(portion.fitting_iters(block_size, rows_per_iter, MIN_FINE_TUNING_ITERS) for portion in portions)


def default_iters(portions: Sequence[Portion], block_size: int, rows_per_iter: int, is_fine_tuning: bool) -> int:
    """The iterations that fit a run's data, without --max_iters."""
    if any(portion.rows for portion in portions):
        return preference_iters(portions, rows_per_iter)
    return (fine_tuning_iters if is_fine_tuning else fitting_iters)(portions, block_size, rows_per_iter)


def preference_iters(portions: Sequence[Portion], rows_per_iter: int) -> int:
    """The iterations for preference pairs: PREFERENCE_EPOCHS, at least MIN_PREFERENCE_ITERS.

    >>> preference_iters([Portion("mine", 30_000, rows=2000)], rows_per_iter=16)
    380
    """
    iters = max(PREFERENCE_EPOCHS / portion.epochs(1, 1, rows_per_iter) for portion in portions)
    return max(MIN_PREFERENCE_ITERS, round_up(iters))


def has_few_tokens(portions: Sequence[Portion]) -> bool:
    """Whether a part has few tokens."""
    return any(portion.tokens < FEW_TOKENS for portion in portions)


def round_up(number: float) -> int:
    """A number rounded up to two significant digits.

    >>> round_up(97.1), round_up(101)
    (98, 110)
    """
    whole = math.ceil(number - 1e-6)  # 490.00000000000006 is 490
    unit = 10 ** max(0, len(str(whole)) - 2)
    return math.ceil(whole / unit) * unit


def in_words(epochs: float) -> str:
    """A number of epochs with two or more significant digits.

    >>> in_words(0.04), in_words(8.16), in_words(1640.2)
    ('0.04', '8.2', '1,640')
    """
    return f"{epochs:,.{0 if epochs >= 9.95 else 1 if epochs >= 0.095 else 2}f}"
