"""The token embedding and the head that shares its weight, in a training step: a loss without all logits at once.

    head = TiedHead(wte.weight, targets, torch.bfloat16)
    x = head.embed(idx)                      # (B, T, C)
    loss = head.loss(blocks(x), n_targets)   # (B, T, C) -> mean cross entropy in nats

Replaces: the embedding, the head's product and F.cross_entropy in GPT.forward. In a small model, the logits of a batch
take most of the memory and time. Here they exist for one chunk of rows at a time, and their gradient, computed in the
forward pass, overwrites them. On a CPU with AMX, one kernel does this for small vocabularies (fast/head_kernel.py).
Gains: see docs/performance.md, "What each fast part gains".
Skipped: with --plain, and without targets. A frozen weight (see common/lora.py) gets no gradient.

Shapes: B batch, T time, C n_embd, V vocab_size, N rows of a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast import head_kernel
from model import IGNORED

LOSS_CHUNK_ROWS = 2048  # rows whose logits exist at the same time
# Larger on CUDA: larger products pay off there, and each chunk costs a pass over the weight's gradient in float32.
LOSS_CHUNK_ROWS_CUDA = 8192


def transposed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix (M, N) as (N, M) in another precision; on a CPU also in memory, which makes products there faster."""
    matrix = matrix.to(dtype).T
    return matrix.contiguous() if matrix.device.type == "cpu" else matrix


class TiedHead:
    """Embedding, head and loss of one training step over one weight (V, C), for targets (B, T).

    Its buffers, a copy of the weight in `dtype` and the logits of one chunk, are allocated before the blocks run:
    later they would not fit between the activations, and the process would grow. Where the kernel is used, which needs
    less memory, there are none; with `chunk_rows` it is not used. `transpose` is `transposed`, compiled or not, and
    `losses_and_gradient` one of the two functions below. `chunk_rows` is LOSS_CHUNK_ROWS, or on CUDA
    LOSS_CHUNK_ROWS_CUDA, by default. On a CPU, rows whose target is IGNORED are left out; on other devices counting
    them would make the program wait for the device.
    """

    def __init__(
        self,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        transpose: Callable[[Tensor, torch.dtype], Tensor] | None = None,
        chunk_rows: int | None = None,
        losses_and_gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.weight, self.targets = weight, targets.flatten()
        self.counts = self.targets != IGNORED
        self.on_cpu = weight.device.type == "cpu"
        self.rows = torch.arange(len(self.counts))[self.counts] if self.on_cpu else None
        self.transpose = transpose or transposed
        self.losses_and_gradient = losses_and_gradient or losses_and_gradient_
        self.low_weight: Tensor | None = None
        self.logits: Tensor | None = None
        self.weight_grads: list[Tensor] | None = None  # see embed
        self.has_kernel = chunk_rows is None and head_kernel.supports(weight, dtype)
        if self.has_kernel:
            return
        chunk = chunk_rows or (LOSS_CHUNK_ROWS_CUDA if weight.is_cuda else LOSS_CHUNK_ROWS)
        self.chunks: list[Tensor | slice]
        if self.rows is not None:
            self.chunks, longest = [*self.rows.split(chunk)], min(chunk, len(self.rows))
        else:
            self.chunks = [slice(first, first + chunk) for first in range(0, len(self.counts), chunk)]
            longest = min(chunk, len(self.counts))
        with torch.no_grad():  # a training step and an evaluation call the same compiled code
            self.low_weight = self.transpose(weight.detach(), dtype)  # (C, V)
        self.logits = torch.empty(longest, len(weight), device=weight.device, dtype=dtype)

    def embed(self, idx: Tensor) -> Tensor:
        """The weight's rows (B, T, C) for ids (B, T); their gradient is added to the one that `loss` computes.

        Otherwise two gradients of the weight's size, one of them mostly zeros, would have to be added.
        """
        self.weight_grads = []
        return _TiedEmbedding.apply(self.weight, idx, self.weight_grads)

    def loss(self, hidden: Tensor, n_targets: Tensor) -> Tensor:
        """The sum over all rows of cross_entropy(hidden @ weight.T, targets) / n_targets, a scalar tensor.

        `hidden` (B, T, C), or (N, C), is the output of the final LayerNorm.
        """
        wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        return _HeadLoss.apply(hidden.flatten(0, -2), self.weight, n_targets, self, wants_gradient)

    def partial_weight_grad(self, low_weight: Tensor, hidden: Tensor, logits_grad: Tensor, is_last: bool) -> Tensor:
        """What a chunk's rows (N, C) and their logits' gradient (N, V) add to the weight's gradient.

        (V, C), on a CPU (C, V), where the last product overwrites the weight's copy, which is no longer needed.
        """
        if not self.on_cpu:
            return logits_grad.T @ hidden
        is_own_copy = low_weight.data_ptr() != self.weight.data_ptr()
        out = low_weight if is_own_copy and is_last else None
        return torch.mm(hidden.T.contiguous(), logits_grad, out=out)

    def as_weight_layout(self, weight_grad: Tensor) -> Tensor:
        """The sum of the partial gradients as (V, C), in the weight's precision and layout."""
        if not self.on_cpu or self.has_kernel:
            return weight_grad.to(self.weight.dtype)
        if weight_grad.dtype == self.weight.dtype:
            return self.transpose(weight_grad, weight_grad.dtype)
        # torch's own copy: compiled code takes up to four times as long for this.
        return torch.empty_like(self.weight).copy_(weight_grad.T)

    def release(self) -> None:
        """Free the buffers."""
        self.low_weight = self.logits = None


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, so that no logits have to be kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, n_targets: Tensor, head: TiedHead, wants_gradient: bool
    ) -> Tensor:
        wanted = wants_gradient, wants_gradient and weight.requires_grad
        with torch.autocast(hidden.device.type, enabled=False):
            if head.has_kernel:
                assert head.rows is not None
                losses, *grads = head_kernel.losses_and_gradients(hidden, weight, head.targets, head.rows, *wanted)
                loss = losses.sum()
            else:
                loss, *grads = _in_chunks(hidden, weight, head, *wanted)
        head.release()
        ctx.head = head
        ctx.save_for_backward(*grads, n_targets)
        return loss / n_targets

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, n_targets = ctx.saved_tensors
        scale = grads[0] / n_targets
        hidden_grad.mul_(scale * ctx.head.counts[:, None])
        if weight_grad is None:  # the weight is frozen
            return hidden_grad, None, None, None, None
        weight_grad = ctx.head.as_weight_layout(weight_grad).mul_(scale)
        if ctx.head.weight_grads is not None:
            ctx.head.weight_grads.append(weight_grad)
            weight_grad = None
        return hidden_grad, weight_grad, None, None, None


def _in_chunks(
    hidden: Tensor, weight: Tensor, head: TiedHead, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum of the losses, the gradient of `hidden` (N, C), and that of the weight in the layout of TiedHead."""
    low_weight, buffer = head.low_weight, head.logits
    assert low_weight is not None and buffer is not None, "a TiedHead is for a single step"
    counts, dtype = head.counts[:, None], buffer.dtype
    loss = torch.zeros((), device=hidden.device)
    hidden_grad, weight_grad = torch.zeros_like(hidden) if wants_hidden else None, None
    low_hidden = hidden.to(dtype) * counts
    for number, rows in enumerate(head.chunks, 1):
        part, targets = low_hidden[rows], head.targets[rows].clamp(min=0)
        logits = torch.mm(part, low_weight, out=buffer[: len(part)])
        losses = head.losses_and_gradient(logits, targets)
        loss += (losses * head.counts[rows]).sum()
        if hidden_grad is not None:
            hidden_grad[rows] = (logits @ low_weight.T).to(hidden.dtype)
        if wants_weight:
            product = head.partial_weight_grad(low_weight, part, logits, is_last=number == len(head.chunks))
            weight_grad = product if weight_grad is None else weight_grad.to(weight.dtype).add_(product)
    return loss, hidden_grad, weight_grad


class _TiedEmbedding(torch.autograd.Function):
    """Rows of the weight; their gradient is added to the head's, which the backward pass has already computed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, idx: Tensor, weight_grads: list[Tensor]) -> Tensor:
        ctx.weight_grads = weight_grads
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (idx,) = ctx.saved_tensors
        weight_grad = ctx.weight_grads.pop()
        return weight_grad.index_add_(0, idx.flatten(), grads[0].flatten(0, -2)), None, None


def losses_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Each row's cross entropy (N,) in float32; `logits` (N, V) become the gradient of their sum in place.

    As exact as the logits' precision allows, also for probabilities near 0 or 1. A probability too small for that
    precision counts as its smallest number: the loss is then 17 in float16, and 90 or more otherwise.
    """
    rows = torch.arange(len(logits), device=logits.device)
    torch.softmax(logits, 1, out=logits)
    hit = logits[rows, targets].float()
    logits[rows, targets] = logits.new_zeros(())  # a Python 0 would be copied to the device, which waits for it
    missed = logits.sum(1)  # the probability of all other tokens; 1 - hit would lose it where it is small
    logits[rows, targets] = -missed
    missed = missed.float()
    limits = torch.finfo(logits.dtype)
    return -torch.where(missed < 0.5, torch.log1p(-missed), hit.clamp(min=limits.tiny * limits.eps).log())


def fused_losses_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """`losses_and_gradient_` for torch.compile: three loops over a row in one kernel, all in float32.

    Uncompiled it would need several copies of the logits in float32. Computing with the other ids' sum and not with
    1 minus the target's probability keeps small numbers, as there.
    """
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    scores = logits.float()
    scores = scores - scores.amax(1, keepdim=True)
    powers = scores.exp()
    hit, missed = (torch.where(mask, powers, 0.0).sum(1) for mask in (is_target, ~is_target))
    score = torch.where(is_target, scores, 0.0).sum(1)  # a look-up would be a kernel of its own
    total = hit + missed
    logits.copy_(torch.where(is_target, -missed[:, None], powers) / total[:, None])
    return torch.where(missed < hit, torch.log1p(missed / hit), total.log() - score)
