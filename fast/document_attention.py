"""Attention within documents on a CPU, computed document by document.

Replaces: attention under the mask of GPT.document_mask. That mask is dense: all T x T scores of a row are computed,
although in a row of 512 tokens with conversations of 90 tokens nine of ten are masked. Here the documents of all rows
are sorted by length, padded to a multiple of LENGTH_STEP, and each length is one batch of causal attention.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: with --plain, on other devices, with dropout, and if a document number occurs in two parts of a row.

Shapes: B batch, T time, H heads, D head size, C = H D, N documents of about the same length, L that length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LENGTH_STEP = 32  # a smaller step pads less, a larger one makes fewer and larger batches


def are_contiguous(documents: Tensor) -> bool:
    """Whether the numbers in each row of documents (B, T) never decrease, so that equal ones are neighbors."""
    return bool((documents.diff(dim=1) >= 0).all())


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Causal attention (B, H, T, D) within documents (B, T), without dropout."""
    return _DocumentAttention.apply(q, k, v, documents)


# Operators of their own: torch.compile calls them as they are, because the documents' lengths differ in every step.


@torch.library.custom_op("jojo::document_attention", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, H, T, D), and each query's logsumexp (B, H, T), which the backward pass needs."""
    B, H, T, D = q.shape
    y, logsumexp = q.new_empty(B * T, H * D), q.new_empty(B * T, H, dtype=torch.float32)
    for index, is_real in batches_of_documents(documents):
        parts = [gather(x, index) for x in (q, k, v)]
        found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, True)
        target = index[is_real]
        y[target] = found.transpose(1, 2).flatten(2)[is_real]
        logsumexp[target] = sums.transpose(1, 2)[is_real]
    return y.view(B, T, H, D).transpose(1, 2), logsumexp.view(B, T, H).transpose(1, 2)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2), q.new_empty(B, T, H, dtype=torch.float32).transpose(1, 2)


@torch.library.custom_op("jojo::document_attention_backward", mutates_args=())
def attend_backward(
    y_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each (B, H, T, D)."""
    B, H, T, D = q.shape
    grads = [q.new_empty(B * T, H * D) for _ in range(3)]
    for index, is_real in batches_of_documents(documents):
        hidden = ~is_real[:, None]  # (N, 1, L)
        part_grad = gather(y_grad, index).masked_fill_(hidden[..., None], 0)
        parts = [gather(x, index) for x in (q, k, v, y)]
        # A padding query has another document's scores: an infinite logsumexp makes its weights 0, not infinite.
        sums = gather(logsumexp[..., None], index)[..., 0].masked_fill_(hidden, math.inf)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        target = index[is_real]
        for grad, found in zip(grads, backward(part_grad, *parts, sums, 0.0, True), strict=True):
            grad[target] = found.transpose(1, 2).flatten(2)[is_real]
    q_grad, k_grad, v_grad = (grad.view(B, T, H, D).transpose(1, 2) for grad in grads)
    return q_grad, k_grad, v_grad


@attend_backward.register_fake
def _(
    y_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    q_grad, k_grad, v_grad = (q.new_empty(B, T, H, D).transpose(1, 2) for _ in range(3))
    return q_grad, k_grad, v_grad


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        y, logsumexp = attend(q, k, v, documents)
        ctx.save_for_backward(q, k, v, y, logsumexp, documents)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *attend_backward(grads[0], *ctx.saved_tensors), None


def batches_of_documents(documents: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The documents of rows (B, T) by length: for each, indices into the B * T tokens (N, L), and which are real."""
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents.diff(dim=1) != 0
    starts = is_first.flatten().nonzero()[:, 0]
    n_tokens = documents.numel()
    lengths = torch.diff(starts, append=starts.new_tensor([n_tokens]))
    padded = -(-lengths // LENGTH_STEP) * LENGTH_STEP
    batches = []
    for length in padded.unique().tolist():
        chosen, offsets = padded == length, torch.arange(length)
        index = (starts[chosen, None] + offsets).clamp_(max=n_tokens - 1)  # (N, L)
        batches.append((index, offsets < lengths[chosen, None]))
    return batches


def gather(x: Tensor, index: Tensor) -> Tensor:
    """The tokens (N, L) of x (B, H, T, D) as (N, H, L, D)."""
    H, D = x.shape[1], x.shape[3]
    return x.transpose(1, 2).reshape(-1, H * D)[index.flatten()].view(*index.shape, H, D).transpose(1, 2)
