"""Attention of one new token per row, with the write into the key-value cache, as one Triton kernel on CUDA.

    attend(qkv, cache.keys_values[layer], positions, rows)

Replaces: KVCache.update and Attention.attend in decode steps whose positions are a tensor: captured steps
(fast/cuda_graphs.py), and those of several rows in serve.py.
Gains: one launch per layer instead of about four, and no key beyond a row's own position is read. Not measured, because
no GPU was available.
Skipped: with --plain, without Triton, and where the kernel's results differ from torch's (`find_fault`).

On Linux, Triton comes with torch's CUDA builds. fast/generation.py imports this module when a model is on CUDA.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from generation.row_cache import RowCache
from model import Attention, KVCache

TILE = 8192  # numbers of the cached keys that are in registers at a time: 128 positions of a head of 64
N_WARPS = 8
LOG2_E = math.log2(math.e)
TOLERANCE = 0.02  # relative, in the Euclidean norm: a rounding to bfloat16 is 0.004


@triton.jit
def _attend(
    qkv_pointer,
    keys_pointer,
    values_pointer,
    positions_pointer,
    rows_pointer,
    result_pointer,
    scale,
    block_size,
    n_head: tl.constexpr,
    size: tl.constexpr,
    padded_size: tl.constexpr,
    block: tl.constexpr,
):
    """One row (program 0) and head (program 1): softmax(q k' scale) v over the cached positions and the new one.

    The softmax is computed in one pass: when a larger score is found, the sums so far are scaled down ("Online
    normalizer calculation for softmax", Milakov and Gimelshein 2018).
    """
    token, head = tl.program_id(0), tl.program_id(1)
    width = n_head * size
    columns = tl.arange(0, padded_size)
    in_head = columns < size
    position = tl.load(positions_pointer + token)
    row = tl.load(rows_pointer + token)
    new = qkv_pointer + token * 3 * width + head * size + columns
    query = tl.load(new, mask=in_head, other=0.0).to(tl.float32) * scale
    new_key = tl.load(new + width, mask=in_head, other=0.0)
    new_value = tl.load(new + 2 * width, mask=in_head, other=0.0)

    start = (row * n_head + head) * block_size * size
    tl.store(keys_pointer + start + position * size + columns, new_key, mask=in_head)
    tl.store(values_pointer + start + position * size + columns, new_value, mask=in_head)

    # The new token attends to itself. What was just stored is not read again.
    largest = tl.sum(query * new_key.to(tl.float32), axis=0)
    total = tl.full([], 1.0, tl.float32)
    result = new_value.to(tl.float32)
    for first in range(0, position, block):
        cached = first + tl.arange(0, block)
        is_before = cached < position
        at = start + cached[:, None] * size + columns[None, :]
        mask = is_before[:, None] & in_head[None, :]
        keys = tl.load(keys_pointer + at, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(values_pointer + at, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(is_before, tl.sum(keys * query[None, :], axis=1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_largest)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=0)
        result = result * shrink + tl.sum(weights[:, None] * values, axis=0)
        largest = new_largest
    tl.store(result_pointer + token * width + head * size + columns, result / total, mask=in_head)


def attend(qkv: Tensor, keys_values: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """The attention (N, C) of new tokens with queries, keys and values (N, 3C); stores the keys and values.

    `keys_values` (2, B, H, block_size, D) is a layer's part of the cache. Token n is stored at `positions[n]` of row
    `rows[n]` and attends to the positions up to its own.
    """
    n_head, block_size, size = keys_values.shape[2:]
    qkv = qkv.contiguous()
    result = torch.empty_like(qkv[:, : n_head * size], memory_format=torch.contiguous_format)
    keys, values = keys_values  # each contiguous
    padded_size = triton.next_power_of_2(size)
    with torch.cuda.device_of(qkv):  # Triton launches on the thread's device, and a server has several threads
        _attend[(len(qkv), n_head)](
            qkv,
            keys,
            values,
            positions,
            rows,
            result,
            LOG2_E / math.sqrt(size),
            block_size,
            n_head=n_head,
            size=size,
            padded_size=padded_size,
            block=block_of(padded_size),
            num_warps=N_WARPS,
        )
    return result


def block_of(padded_size: int) -> int:
    """The cached positions that the kernel reads at a time."""
    return max(1, TILE // padded_size)


class TritonAttention(Attention):
    """Attention whose decode steps use the kernel, if each row's position is in a tensor."""

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        rows = None if cache is None or x.shape[1] > 1 else rows_of(cache)
        if cache is None or rows is None:
            return super().forward(x, cache, mask)
        y = attend(self.c_attn(x)[:, 0], cache.keys_values[self.layer], cast(Tensor, cache.positions), rows)
        return self.c_proj(y)[:, None]


def rows_of(cache: KVCache) -> Tensor | None:
    """The rows (N,) of the cache in which a step has selected one position each; None if it selected anything else."""
    if isinstance(cache, RowCache) and cache.chosen is not None:
        return cache.chosen
    return cache.each_row if isinstance(cache.positions, Tensor) and cache.rows == slice(None) else None


def find_fault(n_head: int, size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot be used on this device, or None: it does not run, or it differs from torch's attention."""
    generator = torch.Generator().manual_seed(0)
    block = block_of(triton.next_power_of_2(size))
    positions, rows = torch.tensor([1, 2 * block, block + 3]), torch.tensor([2, 0, 3])
    shape = (2, 4, n_head, 2 * block + 16, size)
    keys_values = torch.randn(shape, generator=generator).to(device, dtype)
    # Larger queries than usual, so that some keys of each matter more than others.
    qkv = (2 * torch.randn(3, 3 * n_head * size, generator=generator)).to(device, dtype)
    expected, expected_cache = _attend_with_torch(qkv, keys_values.clone(), positions.tolist(), rows.tolist())
    try:
        found = attend(qkv, keys_values, positions.to(device), rows.to(device))
        difference = float((found.float() - expected).norm() / expected.norm())
        is_stored = torch.equal(keys_values, expected_cache)
    except Exception as error:  # Triton fails in many ways, for example without a C compiler
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    if not is_stored:
        return "it does not write what torch writes into the cache"
    if difference < TOLERANCE:
        return None
    return f"its results differ from torch's (relative error {difference:.1e})"


def _attend_with_torch(
    qkv: Tensor, keys_values: Tensor, positions: list[int], rows: list[int]
) -> tuple[Tensor, Tensor]:
    """What `attend` computes, row by row in float32, and the cache after it."""
    n_head, _, size = keys_values.shape[2:]
    results = []
    for token, position, row in zip(qkv.view(-1, 3, n_head, 1, size), positions, rows, strict=True):
        keys_values[:, row, :, position] = token[1:, :, 0]
        keys, values = keys_values[:, row, :, : position + 1].float()
        results.append(F.scaled_dot_product_attention(token[0].float(), keys, values).flatten())
    return torch.stack(results), keys_values
