"""Document masks in the form that each device's attention handles fastest.

Replaces: the bool mask of GPT.document_mask. On a CPU and in eager steps, it becomes numbers that are added to the
scores; from a bool mask, every layer would make its own copy of these numbers for the backward pass. In compiled
training on CUDA, it becomes a BlockMask: FlexAttention skips the blocks of the score matrix that are fully masked.
Gains: see docs/performance.md, "What each fast part gains"; FlexAttention is not measured yet.
Skipped: with --plain; FlexAttention also with dropout, which it lacks, and on a CPU, where it has no backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

__all__ = ["BlockMask", "block_mask", "compute_dtype", "dense_mask", "flex_attention"]


def dense_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where `visible` is True, minus infinity elsewhere."""
    return torch.zeros(visible.shape, device=visible.device, dtype=dtype).masked_fill_(~visible, -math.inf)


def block_mask(documents: Tensor) -> BlockMask:
    """FlexAttention's causal mask within documents (B, T) ("Flex Attention", Dong et al. 2024)."""

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents[row, query] == documents[row, key])

    B, T = documents.shape
    return flex.create_block_mask(may_attend, B, None, T, T, device=documents.device)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention (B, H, T, D) under a block mask."""
    y = flex.flex_attention(q, k, v, block_mask=mask)
    assert isinstance(y, Tensor)  # not a tuple: no auxiliary outputs were asked for
    return y


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which matrices are multiplied with `tensor` now, under autocast or without."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
