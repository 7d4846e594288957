"""Rows of labelled answers: each in its own row with its prompt, paired with a row that KTO compares it with.

The second row is the same prompt with the answer to another prompt. From such rows KTO estimates how far the model has
moved from the reference in general. The other answers are drawn once for a data set, so that the reference's log
probabilities of these rows can be computed before training, too.
"""

from __future__ import annotations

import numpy as np

from data.token_stream import TokenStream
from training.pair_rows import PairRows, locate_pairs


class LabelRows(PairRows):
    """Labelled answers in a new order each epoch, as rows (2, length): the answer, then an answer to another prompt.

    `labels` (answers,) are positive for good and negative for bad answers. Their absolute values are weights, of mean
    1, that give good and bad answers the same total weight, as the paper advises. A second row that is too long is cut,
    which makes the estimate slightly less precise. Raises UserError if no answer fits into block_size.
    """

    noun = "labelled answer"

    def __init__(self, stream: TokenStream, block_size: int, seed: int):
        super().__init__(stream, block_size, seed)
        own = self._located
        is_good = own[:, 1] == own[:, 2]  # a good answer follows the prompt, a bad one the empty message
        n_good, n_bad = int(is_good.sum()), int((~is_good).sum())
        n_labels = (n_good > 0) + (n_bad > 0)
        weights = [len(own) / (n_labels * max(1, count)) for count in (n_good, n_bad)]
        self.labels = np.where(is_good, weights[0], -weights[1]).astype(np.float32)
        self._located = np.concatenate([own, self._others(own)], axis=1)

    def _locate(self) -> np.ndarray:
        """(answers, 5) positions: of the prompt as in `locate_pairs`, and of the answer that is not empty."""
        pairs = locate_pairs(self.stream)
        is_good = pairs[:, 7] - pairs[:, 6] == 1  # the rejected answer is only <|im_end|>
        return np.concatenate([pairs[:, :2], np.where(is_good[:, None], pairs[:, 2:5], pairs[:, 5:8])], axis=1)

    def _others(self, own: np.ndarray) -> np.ndarray:
        """The positions (answers, 3) of an answer to another prompt for each: of the next one in a random order."""
        order = np.random.default_rng(0).permutation(len(own))
        others = np.empty((len(own), 3), dtype=np.int64)
        others[order] = own[np.roll(order, -1), 2:]
        longest = self.length + 1 - (own[:, 1] - own[:, 0])  # what remains after the prompt, with the last target
        others[:, 2] = np.minimum(others[:, 2], others[:, 0] + longest)
        others[:, 1] = np.minimum(others[:, 1], others[:, 2])
        return others

    def describe(self) -> str:
        n_good = int((self.labels > 0).sum())
        return f"{super().describe()}, {n_good:,} good and {len(self) - n_good:,} bad"

    def row(self, index: int) -> tuple[np.ndarray, ...]:
        """Ids and targets, (2, length) each, reference log probabilities (2,) and label () of the epoch's `index`."""
        return *super().row(index), self.labels[self._order[index]]
