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

BLOCK = 128  # queries and keys per block of the score matrix, as in torch's kernels

__all__ = ["BlockMask", "block_mask", "compute_dtype", "dense_mask", "flex_attention"]


def dense_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where `visible` is True, minus infinity elsewhere."""
    return torch.zeros(visible.shape, device=visible.device, dtype=dtype).masked_fill_(~visible, -math.inf)


def block_mask(documents: Tensor) -> BlockMask:
    """FlexAttention's causal mask within documents (B, T) ("Flex Attention", Dong et al. 2024).

    The numbers must not fall along a row. Then the first and the last number of each block decide what it sees, and
    the mask of every pair of positions, which torch's `create_block_mask` evaluates, is not needed.
    """

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents[row, query] == documents[row, key])

    T, device = documents.shape[1], documents.device
    first, last = documents[:, ::BLOCK], documents[:, BLOCK - 1 :: BLOCK]
    if is_cut := T % BLOCK > 0:
        last = torch.cat([last, documents[:, -1:]], 1)
    n = first.shape[1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=device).tril(-1)
    sees_some = (last[:, None] == first[:, :, None]) & earlier  # (B, blocks of queries, blocks of keys)
    sees_all = (first[:, None] == last[:, :, None]) & earlier
    if is_cut:
        sees_all[:, -1].zero_()  # its queries beyond T see nothing
    partly = (sees_some & ~sees_all) | torch.eye(n, dtype=torch.bool, device=device)
    return BlockMask.from_kv_blocks(
        *_counts_and_indices(partly),
        *_counts_and_indices(sees_all),
        BLOCK_SIZE=BLOCK,
        mask_mod=may_attend,
        seq_lengths=(T, T),
    )


def _counts_and_indices(seen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries sees (B, 1, n), and their numbers first in a list (B, 1, n, n)."""
    chosen = seen[:, None].int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention (B, H, T, D) under a block mask."""
    y = flex.flex_attention(q, k, v, block_mask=mask)
    assert isinstance(y, Tensor)  # not a tuple: no auxiliary outputs were asked for
    return y


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which matrices are multiplied with `tensor` now, under autocast or without."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
