"""Mixtures of data sets: what `--dataset story=0.7,chat=0.3` means, and rows drawn from its parts by weight.

A weight is a share of the training rows, each block_size tokens long; weights are divided by their sum. Rows are drawn
in rounds; a round is as short as possible with a whole number of rows from each part. The order within a round depends
on the seed and the round's number. Each part has its own epochs, as if it were the only one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from data.dataset import PREFERENCE_FORMATS, data_parts
from data.epochs import Portion

MAX_ROUND = 1 << 20  # rows


def parse_mixture(dataset: str) -> dict[str, Fraction]:
    """The share of each data set that --dataset names; they add up to 1. Raises ValueError, in one sentence.

    >>> parse_mixture("story=3,chat=1")
    {'story': Fraction(3, 4), 'chat': Fraction(1, 4)}
    >>> parse_mixture("story")
    {'story': Fraction(1, 1)}
    """
    weights: dict[str, Fraction] = {}
    words = dataset.split(",")
    for word in words:
        name, equals, number = word.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or (len(words) > 1 and not equals):
            raise ValueError(f"--dataset must be a name such as story, or story=0.7,chat=0.3, not {dataset!r}")
        is_number = re.fullmatch(r"\d+\.?\d*|\.\d+", number, re.ASCII)
        weight = Fraction(number) if is_number else Fraction(not equals)
        if weight == 0:
            raise ValueError(f"--dataset: the weight of {name} must be a number above 0 such as 0.3, not {number!r}")
        if name in weights:
            raise ValueError(f"--dataset: {name} occurs twice in {dataset!r}; give it one weight")
        weights[name] = weight
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    if _round_rows(shares.values()) > MAX_ROUND:
        raise ValueError(f"--dataset: the weights in {dataset!r} have too many digits; round them, to 0.001 or so")
    return shares


def _round_rows(shares: Iterable[Fraction]) -> int:
    """The number of rows in the shortest round with a whole number of rows from each part."""
    return math.lcm(*(share.denominator for share in shares))


def mixture_name(dataset: str) -> str:
    """The name of a data set or a mixture, also in file names.

    >>> mixture_name("story=0.7,chat=0.3")
    'story+chat'
    """
    return "+".join(parse_mixture(dataset))


def mixture_facts(facts: Mapping[str, dict], shares: Mapping[str, Fraction]) -> dict:
    """What a checkpoint stores about the data: a data set's .json; for a mixture, a list of them under "parts".

    A mixture with a chat part trains a chat model, so its "format" is "chat".
    """
    first = next(iter(facts.values()))
    if len(facts) == 1:
        return first
    parts = [{**facts[name], "weight": float(share)} for name, share in shares.items()]
    return {
        "name": "+".join(facts),
        "format": "chat" if any(part["format"] == "chat" for part in parts) else "text",
        "tokenizer": first["tokenizer"],
        "n_vocab": first["n_vocab"],
        **({"tokenizer_digest": first["tokenizer_digest"]} if "tokenizer_digest" in first else {}),
        "parts": parts,
    }


def model_format(data_format: str) -> str:
    """The format of a model, "text" or "chat", that was trained on data of a format: preferences are chats."""
    return "chat" if data_format in PREFERENCE_FORMATS else data_format


def portions(facts: Mapping[str, Any]) -> list[Portion]:
    """The data sets that `mixture_facts` describes, with their training tokens, shares, and rows of preferences."""
    made = []
    for part in data_parts(facts):
        split = part["splits"]["train"]
        n_rows = 2 * split["documents"] if part["format"] in PREFERENCE_FORMATS else None
        made.append(Portion(part["name"], split["tokens"], part.get("weight", 1.0), n_rows))
    return made


class MixedRows:
    """Rows of several parts in rounds. `Batches` treats a round as an epoch: epoch and row are the whole position."""

    def __init__(self, parts: Sequence, shares: Sequence[Fraction], seed: int):
        n_rows = _round_rows(shares)
        self._counts = [int(share * n_rows) for share in shares]
        self._parts, self._seed = [_EndlessRows(part) for part in parts], seed

    def start_epoch(self, epoch: int) -> int:
        """Order a round; returns how many rows it has."""
        rng = np.random.default_rng([self._seed, epoch, len(self._counts)])
        self._part = rng.permutation(np.repeat(np.arange(len(self._counts)), self._counts))
        self._number = np.empty(len(self._part), dtype=np.int64)  # of each row among all rows of its part
        for part, count in enumerate(self._counts):
            self._number[self._part == part] = epoch * count + np.arange(count)
        return len(self._part)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and targets, (block_size,) each, of the round's row `index`."""
        return self._parts[self._part[index]].row(int(self._number[index]))


class _EndlessRows:
    """A part's rows, numbered consecutively across its epochs."""

    def __init__(self, rows: Any):
        self._rows, self._epoch, self._first, self._n_rows = rows, -1, 0, 0

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Row `number` across all epochs; a resumed run skips the epochs before it."""
        if number < self._first:
            self._epoch, self._first, self._n_rows = -1, 0, 0
        while number >= self._first + self._n_rows:
            self._epoch, self._first = self._epoch + 1, self._first + self._n_rows
            self._n_rows = self._rows.start_epoch(self._epoch)
        return self._rows.row(number - self._first)
