"""The decode loop: one pass fills the key-value cache with the prompts, then each step adds one id per row.

for ids in generate(model, [[50256, 7454]], max_tokens=100, sampling=TEXT_SAMPLING):
    ...    # (B,) the next id of each row
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from common.device import without_cudnn_attention
from generation.sampling import Sampling, penalize_repetition, sample, seen_ids
from model import GPT, GPTConfig, KVCache

ENDED = -1  # what `generate` yields for a row that has drawn a stop id

# (model, ids (B,), number of ids in each row of the cache, cache) -> logits (B, n_vocab). A step that has a method
# `draw` also replaces `sampling.draw`.
DecodeStep = Callable[[GPT, Tensor, list[int], KVCache], Tensor]


def decode_step(model: GPT, ids: Tensor, lengths: list[int], cache: KVCache) -> Tensor:
    """Logits (B, n_vocab) of what follows ids (B,), each stored after its row's `lengths[row]` ids."""
    start, longest = min(lengths), max(lengths)
    if start < longest:
        return decode_at(model, ids, torch.tensor(lengths, device=ids.device), longest + 1, cache)
    cache.select(slice(start, start + 1), start + 1)
    positions = torch.full((1,), start, device=ids.device)
    return model.logits(model.hidden(ids[:, None], cache, positions)[:, 0])


def decode_at(model: GPT, ids: Tensor, positions: Tensor, end: int, cache: KVCache) -> Tensor:
    """`decode_step` for rows of different lengths: positions (B,) are a tensor, and shapes depend only on `end`."""
    cache.select(positions, end)
    return logits_after(model, ids, positions, end, cache)


def logits_after(model: GPT, ids: Tensor, positions: Tensor, end: int, cache: KVCache) -> Tensor:
    """Logits (B, n_vocab) of what follows ids (B,) at positions (B,), which the caller has selected in `cache`."""
    mask = torch.arange(end, device=ids.device) <= positions[:, None, None, None]  # (B, 1, 1, end)
    if ids.is_cuda:  # an additive mask, made once; from a bool mask, each layer would make its own
        dtype = model.ln_f.weight.dtype
        mask = torch.zeros(mask.shape, device=ids.device, dtype=dtype).masked_fill_(~mask, -math.inf)
    return model.logits(model.hidden(ids[:, None], cache, positions[:, None], mask)[:, 0])


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Tensor | Sequence[Sequence[int]],
    max_tokens: int | None,
    sampling: Sampling | None = None,
    *,
    generator: torch.Generator | None = None,
    stop_ids: Collection[int] = (),
    cache: KVCache | None = None,
    observe: Callable[[Tensor], None] | None = None,
    decode: DecodeStep = decode_step,
) -> Iterator[Tensor]:
    """Continue each prompt by up to `max_tokens` ids (None: no limit); yields the next ids (B,) of each step.

    They are on the CPU; reading them is the only point of a step at which the program waits for the device. A row that
    has drawn one of `stop_ids` yields ENDED from then on. By default ids are drawn from the model's own distribution. A
    `cache` from `new_cache` that outlives this call saves recomputing the ids that a prompt shares with what the cache
    holds. `observe` is called with the logits (B, n_vocab) of each step before any setting changes them, and must not
    keep them.

    Only the last block_size ids of a longer prompt are used. When block_size ids are in use, all but the last
    block_size // 2 are dropped and generation continues, with one long prefill every block_size / 2 ids. Raises
    ValueError for empty prompts and ids outside the vocabulary, FloatingPointError for logits that are not finite.
    """
    sampling = sampling or Sampling()
    rows = check_prompts(prompts, model.config)
    cache = new_cache(model, len(rows)) if cache is None else cache
    device = model.wte.weight.device
    ended = [False] * len(rows)
    penalty = sampling.repetition_penalty
    seen = seen_ids(rows, model.config.n_vocab, device) if penalty != 1 else None
    was_training = model.training
    model.eval()
    try:
        logits = prefill(model, rows, cache)
        for step in itertools.count(1) if max_tokens is None else range(1, max_tokens + 1):
            if observe is not None:
                observe(logits)
            scores = logits if seen is None else penalize_repetition(logits, seen, penalty)
            ids = sample(scores, sampling, generator, getattr(decode, "draw", None))
            new = ids.tolist()
            yield torch.tensor([ENDED if done else token for token, done in zip(new, ended, strict=True)])
            ended = [done or token in stop_ids for token, done in zip(new, ended, strict=True)]
            if step == max_tokens or all(ended):
                return
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            logits = append(model, ids, cache, decode, new)
    finally:
        model.train(was_training)


def check_prompts(prompts: Tensor | Sequence[Sequence[int]], config: GPTConfig) -> list[list[int]]:
    """Prompts as lists of ids. Raises ValueError for no prompt, an empty prompt, or an id that the tokenizer lacks."""
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    if not rows:
        raise ValueError("there is no prompt")
    for number, prompt in enumerate(rows):
        if not prompt:
            raise ValueError(f"prompt {number} has no id")
        if min(prompt) < 0 or max(prompt) >= config.n_vocab:
            raise ValueError(f"prompt {number} has an id outside 0 to {config.n_vocab - 1}")
    return rows


def new_cache(model: GPT, batch_size: int = 1) -> KVCache:
    """An empty cache for `batch_size` rows, in the weights' precision and on their device."""
    weight = model.ln_f.weight
    return KVCache(model.config, batch_size, weight.device, weight.dtype)


@without_cudnn_attention()
def prefill(model: GPT, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Fill `cache` with one prompt per row; returns the logits (B, n_vocab) of what follows each.

    A single row keeps what it shares with the beginning of the prompt, so that a chat computes only its newest
    messages. Raises FloatingPointError for logits that are not finite.
    """
    contexts = [list(prompt[-model.config.block_size :]) for prompt in prompts]
    shared = 0
    if len(contexts) == 1:
        shared = common_prefix(cache.tokens[0], contexts[0][:-1])  # the last id's logits are always needed
    logits = model.logits(_fill(model, slice(None), contexts, shared, cache))
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    return logits


def common_prefix(first: list[int], second: list[int]) -> int:
    """The length of the longest common prefix of two lists."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(first), len(second)))


def _fill(model: GPT, rows: slice, contexts: list[list[int]], start: int, cache: KVCache) -> Tensor:
    """Fill the cache's `rows` with `contexts`, whose first `start` ids it already contains.

    Returns the network's output (rows, C) at the end of each context. Shorter rows are padded on the right: the causal
    mask hides the padding, and later ids overwrite it.
    """
    # If an exception interrupts this function, no row may claim more ids than it holds.
    cache.tokens[rows] = [tokens[:start] for tokens in cache.tokens[rows]]
    device = model.wte.weight.device
    longest = max(map(len, contexts))
    idx = torch.tensor([context[start:] + [0] * (longest - len(context)) for context in contexts], device=device)
    positions = torch.arange(start, longest, device=device)
    cache.select(slice(start, longest), longest, rows)
    mask = torch.arange(longest, device=device) <= positions[:, None] if start else None
    hidden = model.hidden(idx, cache, positions, mask)
    cache.tokens[rows] = contexts
    return hidden[range(len(contexts)), [len(context) - 1 - start for context in contexts]]


@without_cudnn_attention()
def append(
    model: GPT, ids: Tensor, cache: KVCache, decode: DecodeStep = decode_step, new: list[int] | None = None
) -> Tensor:
    """Append one id to each of the cache's rows, ids (B,); returns the logits (B, n_vocab) of what follows.

    `new` are the same ids as a list, if the caller has read them from the device.
    """
    _make_room(model, cache)
    new = ids.tolist() if new is None else new  # before the step is launched, for which it would otherwise wait
    logits = decode(model, ids, [len(tokens) for tokens in cache.tokens], cache)
    for tokens, token in zip(cache.tokens, new, strict=True):
        tokens.append(token)
    return logits


def _make_room(model: GPT, cache: KVCache) -> None:
    """Drop all but the last block_size // 2 ids of rows that are full.

    Each remaining id gets a new position. Its keys and values depend on the position, so they are recomputed.
    """
    block_size = model.config.block_size
    keep = block_size // 2
    full = [row for row, tokens in enumerate(cache.tokens) if len(tokens) == block_size]
    if not keep:  # block_size 1: each id is its own context
        cache.tokens = [[] if len(tokens) == block_size else tokens for tokens in cache.tokens]
    elif len(full) == len(cache.tokens):
        _fill(model, slice(None), [tokens[-keep:] for tokens in cache.tokens], 0, cache)
    else:
        for row in full:
            _fill(model, slice(row, row + 1), [cache.tokens[row][-keep:]], 0, cache)
