"""A key-value cache whose rows are computed independently: some prefilled in chunks, others decoded together.

cache = RowCache(model.config, 16, device, dtype)
hidden = prefill_chunk(model, cache, row=3, ids=ids[:128])          # (128, C)
logits = decode_rows(model, ids, rows=[3, 7], lengths=[128, 40], cache=cache)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from generation.decoding import common_prefix, logits_after
from model import GPT, KVCache

# (model, ids (N,), their rows in the cache, ids in each of those rows, cache) -> logits (N, n_vocab)
DecodeRows = Callable[[GPT, Tensor, list[int], list[int], "RowCache"], Tensor]


class RowCache(KVCache):
    """A KVCache whose rows a step may choose, in any order."""

    chosen: Tensor | None = None  # (N,) rows of the step, None while `select` is in use

    def select(self, positions: slice | Tensor, end: int, rows: slice = slice(None)) -> None:
        self.chosen = None
        super().select(positions, end, rows)

    def select_rows(self, rows: Tensor, positions: Tensor, end: int) -> None:
        """Choose where `update` writes, positions (N,) of rows (N,), and that it returns the first `end` positions."""
        self.chosen, self.positions, self.end = rows, positions, end

    def update(self, layer: int, keys_values: Tensor) -> Tensor:
        """As in KVCache. After `select_rows`: keys and values (2, N, H, 1, D) -> (2, N, H, end, D), a copy."""
        if self.chosen is None:
            return super().update(layer, keys_values)
        stored = self.keys_values[layer]  # (2, B, H, block_size, D)
        stored[:, self.chosen, :, self.positions] = keys_values[:, :, :, 0].transpose(0, 1)  # (N, 2, H, D)
        return stored[:, self.chosen, :, : self.end]

    def share_prefix(self, row: int, context: Sequence[int]) -> int:
        """Reuse in `row` the longest cached prefix of `context`, copied if it is in another row; returns its length.

        The last id of the context does not count: it is always computed, for its output.
        """
        wanted = list(context[:-1])
        shared = [common_prefix(tokens, wanted) for tokens in self.tokens]
        source = max(range(len(shared)), key=lambda other: (shared[other], other == row))
        own, longest = shared[row], shared[source]
        # If an exception interrupts this function, the row must not claim more ids than it holds.
        self.tokens[row] = wanted[:own]
        if longest > own:
            self.keys_values[:, :, row, :, own:longest] = self.keys_values[:, :, source, :, own:longest]
            self.tokens[row] = wanted[:longest]
        return longest


def prefill_chunk(model: GPT, cache: RowCache, row: int, ids: list[int]) -> Tensor:
    """Append ids (T,) to a row of the cache in one pass; returns the output (T, C) at each of them."""
    start = len(cache.tokens[row])
    end = start + len(ids)
    device = model.wte.weight.device
    positions = torch.arange(start, end, device=device)
    cache.select(slice(start, end), end, slice(row, row + 1))
    mask = torch.arange(end, device=device) <= positions[:, None] if start else None
    hidden = model.hidden(torch.tensor([ids], device=device), cache, positions, mask)[0]
    cache.tokens[row] = [*cache.tokens[row], *ids]
    return hidden


def decode_rows(model: GPT, ids: Tensor, rows: list[int], lengths: list[int], cache: RowCache) -> Tensor:
    """Logits (N, n_vocab) of what follows ids (N,), each stored in its row after the row's `length` ids.

    A single row is computed exactly as `decode_step` computes a batch of one.
    """
    if len(rows) == 1:
        (row,), (length,) = rows, lengths
        cache.select(slice(length, length + 1), length + 1, slice(row, row + 1))
        positions = torch.full((1,), length, device=ids.device)
        return model.logits(model.hidden(ids[:, None], cache, positions)[:, 0])
    end = max(lengths) + 1
    positions = torch.tensor(lengths, device=ids.device)
    cache.select_rows(torch.tensor(rows, device=ids.device), positions, end)
    return logits_after(model, ids, positions, end, cache)


def decode_each(model: GPT, ids: Tensor, rows: list[int], lengths: list[int], cache: RowCache) -> Tensor:
    """`decode_rows` with a pass for each row: slower, but a row's logits do not depend on the other rows.

    The products of a batch are rounded differently from those of a single row.
    """
    each = zip(ids.split(1), rows, lengths, strict=True)
    return torch.cat([decode_rows(model, one, [row], [length], cache) for one, row, length in each])
