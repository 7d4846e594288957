"""Dropout for kernels in C (dropout.h): what is dropped follows from a seed, so no mask has to be stored."""

from __future__ import annotations

import ctypes

import torch


class Dropout(ctypes.Structure):
    """`struct dropout` of dropout.h."""

    _fields_ = (("seed", ctypes.c_uint32), ("least", ctypes.c_uint32), ("scale", ctypes.c_float))


def dropout(probability: float, seed: int) -> Dropout:
    """Dropout with this probability, at least 0 and below 1; what is kept is divided by 1 - probability."""
    return Dropout(seed, min(round(probability * 2**32), 2**32 - 1), 1 / (1 - probability))


def new_seed() -> int:
    """A seed from torch's random numbers, so that runs repeat and checkpointed blocks drop the same numbers again."""
    return int(torch.randint(2**32, ()))
