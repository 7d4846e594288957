"""The loss of a model at every scored position of a split, computed in overlapping windows, and its summary.

A text longer than block_size is scored in windows of block_size tokens, each `stride` tokens after the one before. The
first window scores all its tokens, each later one only those that no earlier window contained, so that these have at
least block_size - stride tokens of context ("Perplexity of fixed-length models" in the documentation of transformers).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.cli import UserError
from common.device import autocast, without_cudnn_attention
from evaluation.bootstrap import margin
from evaluation.splits import Split
from model import GPT

HEAD_CHUNK = 1024  # rows of logits in memory at a time; those of a whole batch would take gigabytes


def windows(start: int, end: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over positions start to end as (begin, end, first): the context starts at `begin`, the scores at `first`.

    Every position is scored exactly once, and in every window but the first it has block_size - stride positions of
    context or more.

    >>> list(windows(0, 10, block_size=6, stride=3))
    [(0, 6, 0), (3, 9, 6), (6, 10, 9)]
    """
    first = start
    for begin in range(start, end, stride):
        stop = min(begin + block_size, end)
        yield begin, stop, first
        if stop == end:
            return
        first = stop


@torch.inference_mode()
@without_cudnn_attention()
def score(
    model: GPT, split: Split, stride: int, batch_size: int = 16, device: str = "cpu", dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """The loss in nats at every position, NaN if not scored, and whether the likeliest id was right.

    Returns (N + 1,) float32 and (N + 1,) bool. Raises UserError for ids that the model lacks and for losses that are
    not finite.
    """
    block_size, n_vocab = model.config.block_size, model.config.n_vocab
    if split.ids.max() >= n_vocab:
        raise UserError(
            f"{split.name} contains the id {split.ids.max()} and the model has {n_vocab} ids; choose a data set of "
            "the model's tokenizer with --dataset"
        )
    losses = np.full(len(split.ids), np.nan, dtype=np.float32)
    is_right = np.zeros(len(split.ids), dtype=bool)
    todo = [window for start, end in split.spans for window in windows(start, end, block_size, stride)]
    todo.sort(key=lambda window: window[0] - window[1])  # longest first, so that a batch needs little padding
    for start in tqdm(range(0, len(todo), batch_size), desc=split.name, unit="batch", leave=False, disable=None):
        inputs, is_scored, positions = window_batch(split.ids, todo[start : start + batch_size])
        with autocast(device, dtype):
            hidden = model.hidden(torch.from_numpy(inputs).to(device))[torch.from_numpy(is_scored).to(device)]  # (N, C)
            targets = torch.from_numpy(split.ids[positions]).to(device)
            losses[positions], is_right[positions] = score_rows(model, hidden, targets)
    if not np.isfinite(losses[split.counted["all"][0]]).all():
        raise UserError("the model's losses are not finite; use another checkpoint or --dtype float32")
    return losses, is_right


def window_batch(ids: np.ndarray, batch: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows as model inputs (B, T), which outputs are scored (B, T), and the positions that these predict (N,).

    The longest window comes first. Shorter ones are padded on the right, where no scored position sees the padding.
    """
    longest = batch[0][1] - batch[0][0]
    inputs = np.zeros((len(batch), longest), dtype=ids.dtype)
    is_scored = np.zeros((len(batch), longest), dtype=bool)
    for row, (begin, end, first) in enumerate(batch):
        inputs[row, : end - begin] = ids[begin - 1 : end - 1]
        is_scored[row, first - begin : end - begin] = True
    return inputs, is_scored, np.concatenate([np.arange(first, end) for _, end, first in batch])


def score_rows(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The loss, and whether the likeliest id is the target, (N,) each, from the last layer's output (N, C)."""
    losses, is_right = [], []
    for rows, chunk in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        logits = model.logits(rows)  # (HEAD_CHUNK, n_vocab)
        is_right.append(logits.argmax(-1) == chunk)
        losses.append(logits.logsumexp(-1) - logits.gather(1, chunk[:, None])[:, 0])  # -log softmax of the target
    return torch.cat(losses).cpu().numpy(), torch.cat(is_right).cpu().numpy()


def summarize(split: Split, scope: str, losses: np.ndarray, is_right: np.ndarray) -> dict:
    """The numbers of one scope ("all", "assistant") of a scored split.

    Bits per byte (nats / ln 2 / bytes of text) compare models with different tokenizers ("The Pile", Gao et al. 2020,
    section 3.1). The numerator includes control tokens and ChatML's role lines; the bytes are those of the documents,
    for chat those of the message contents. `loss_margin` is half the 95 % interval of the loss, or None.
    """
    counts, text_bytes = split.counted[scope]
    tokens, nats = int(counts.sum()), float(losses[counts].sum(dtype=np.float64))
    loss = nats / tokens if tokens else math.nan
    return {
        "tokens": tokens,
        "text_bytes": text_bytes,
        "loss": loss,
        "loss_margin": margin(split, scope, losses),
        "perplexity": math.exp(min(loss, 700)),  # exp(710) overflows a float
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else math.nan,
        "accuracy": float(is_right[counts].mean()) if tokens else math.nan,
    }
