"""64-bit hashes of n-grams of token ids; no other module hashes n-grams."""

from __future__ import annotations

import numpy as np

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying modulo 2**64 loses no information


def hash_ngrams(ids: np.ndarray, n: int) -> np.ndarray:
    """A hash of each run of n consecutive ids: (len(ids) - n + 1,) uint64, empty if there are fewer than n ids.

    The hash is a polynomial of the ids modulo 2**64, so its low bits depend mostly on the last ids. Use `mixed` where
    every bit counts.
    """
    tokens = ids.astype(np.uint64)
    count = max(0, len(ids) - n + 1)
    hashes = tokens[:count] + np.uint64(1)
    for offset in range(1, n):
        hashes *= MULTIPLIER
        hashes += tokens[offset : offset + count]
    return hashes


def mixed(hashes: np.ndarray) -> np.ndarray:
    """Hashes in which every bit depends on every bit of the input (the finalizer of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
