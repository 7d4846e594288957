"""The token embedding and the head that shares its weight, in a training step: the loss without the whole logits.

    head = TiedHead(wte.weight, targets, torch.bfloat16)
    x = head.embed(idx)                      # (B, T, C)
    loss = head.loss(blocks(x), n_targets)   # (B, T, C) -> mean cross entropy in nats

All logits of a batch would be most of a small model's memory and time. Here they exist for a chunk of rows at a time,
and their gradient, made in the forward pass, takes their place. Legend of shapes: B batch, T time, C n_embd,
V vocab_size, N rows of a loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that does not count, as in F.cross_entropy
HEAD_CHUNK = 2048  # rows whose logits exist at the same time
HEAD_CHUNK_CUDA = 8192  # there larger products pay, and each chunk costs a pass over the weight's gradient in float32


class TiedHead:
    """Embedding, head and loss of one training step over one weight (V, C), for targets (B, T).

    Its buffers, a copy of the weight in `dtype` and the logits of one chunk of rows, are taken before the blocks run:
    later there is no gap so large between the activations, and the process would grow. `transpose` is `transposed`,
    compiled or not. Rows whose target is IGNORED are left out on a CPU; elsewhere counting them would wait for the
    device.
    """

    def __init__(self, weight: Tensor, targets: Tensor, dtype: torch.dtype, transpose: Callable | None = None):
        self.weight, self.targets = weight, targets.flatten()
        self.counts = self.targets != IGNORED
        self.on_cpu = weight.device.type == "cpu"
        chunk = HEAD_CHUNK_CUDA if weight.is_cuda else HEAD_CHUNK
        if self.on_cpu:
            rows = torch.arange(len(self.counts))[self.counts]
            self.chunks, longest = rows.split(chunk), min(chunk, len(rows))
        else:
            self.chunks = [slice(first, first + chunk) for first in range(0, len(self.counts), chunk)]
            longest = min(chunk, len(self.counts))
        self.transpose = transpose or transposed
        self.low_weight = self.transpose(weight.detach(), dtype)  # (C, V)
        self.logits = torch.empty(longest, len(weight), device=weight.device, dtype=dtype)
        self.weight_grads: list[Tensor] | None = None  # see embed

    def embed(self, idx: Tensor) -> Tensor:
        """The weight's rows (B, T, C) of ids (B, T); their gradient is added into the one that `loss` makes.

        Two gradients of the size of the weight, most of one of them zeros, would have to be added otherwise.
        """
        self.weight_grads = []
        return _TiedEmbedding.apply(self.weight, idx, self.weight_grads)

    def loss(self, hidden: Tensor, n_targets: Tensor) -> Tensor:
        """Sum over all rows of cross_entropy(hidden @ weight.T, targets) / n_targets, a tensor of one number.

        `hidden` (B, T, C), or (N, C), is the last layer's output.
        """
        wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        return _HeadLoss.apply(hidden.flatten(0, -2), self.weight, n_targets, self, wants_gradient)

    def part_of_weight_grad(self, hidden: Tensor, logits_grad: Tensor, is_last: bool) -> Tensor:
        """What a chunk's rows (N, C) and their logits' gradient (N, V) add to the weight's: (V, C), on a CPU (C, V).

        The last product on a CPU takes the place of the weight's copy, which has served.
        """
        if not self.on_cpu:
            return logits_grad.T @ hidden
        is_own_copy = self.low_weight.data_ptr() != self.weight.data_ptr()
        out = self.low_weight if is_own_copy and is_last else None
        return torch.mm(hidden.T.contiguous(), logits_grad, out=out)

    def laid_out_as_weight(self, weight_grad: Tensor) -> Tensor:
        """The sum of the parts as a gradient (V, C) in the weight's precision and layout."""
        if not self.on_cpu:
            return weight_grad.to(self.weight.dtype)
        if weight_grad.dtype == self.weight.dtype:
            return self.transpose(weight_grad, weight_grad.dtype)
        # torch's own copy: compiled code takes up to four times as long for this.
        return torch.empty_like(self.weight).copy_(weight_grad.T)

    def release(self) -> None:
        """Let go of the buffers."""
        self.low_weight = self.logits = None


class _HeadLoss(torch.autograd.Function):
    """The gradients are made in the forward pass, chunk by chunk, so that no chunk's logits need to be kept."""

    @staticmethod
    def forward(ctx, hidden, weight, n_targets, head, wants_gradient):
        counts, dtype = head.counts[:, None], head.logits.dtype
        loss = torch.zeros((), device=hidden.device)
        hidden_grad, weight_grad = torch.zeros_like(hidden) if wants_gradient else None, None
        with torch.autocast(hidden.device.type, enabled=False):
            low_hidden = hidden.to(dtype) * counts
            for number, rows in enumerate(head.chunks, 1):
                part, targets = low_hidden[rows], head.targets[rows].clamp(min=0)
                logits = torch.mm(part, head.low_weight, out=head.logits[: len(part)])
                losses = losses_and_gradient_(logits, targets)
                loss += (losses * head.counts[rows]).sum()
                if wants_gradient:
                    hidden_grad[rows] = (logits @ head.low_weight.T).to(hidden.dtype)
                    product = head.part_of_weight_grad(part, logits, is_last=number == len(head.chunks))
                    weight_grad = product if weight_grad is None else weight_grad.to(weight.dtype).add_(product)
        head.release()
        ctx.head = head
        ctx.save_for_backward(hidden_grad, weight_grad, n_targets)
        return loss / n_targets

    @staticmethod
    def backward(ctx, loss_grad):
        hidden_grad, weight_grad, n_targets = ctx.saved_tensors
        scale = loss_grad / n_targets
        hidden_grad.mul_(scale * ctx.head.counts[:, None])
        weight_grad = ctx.head.laid_out_as_weight(weight_grad).mul_(scale)
        if ctx.head.weight_grads is not None:
            ctx.head.weight_grads.append(weight_grad)
            weight_grad = None
        return hidden_grad, weight_grad, None, None, None


class _TiedEmbedding(torch.autograd.Function):
    """Rows of the weight; their gradient is added into the head's, which the backward pass has made before."""

    @staticmethod
    def forward(ctx, weight, idx, weight_grads):
        ctx.weight_grads = weight_grads
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx, grad):
        (idx,) = ctx.saved_tensors
        weight_grad = ctx.weight_grads.pop()
        return weight_grad.index_add_(0, idx.flatten(), grad.flatten(0, -2)), None, None


def losses_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Each row's cross entropy (N,) in float32; `logits` (N, V) become the gradient of their sum in place.

    As exact as the logits' precision allows, also for a probability near 0 or 1. A probability too small for that
    precision counts as the smallest that is not: a loss of 17 in float16, of 90 and more elsewhere.
    """
    rows = torch.arange(len(logits), device=logits.device)
    torch.softmax(logits, 1, out=logits)
    hit = logits[rows, targets].float()
    logits[rows, targets] = logits.new_zeros(())  # a mere 0 would be sent to the device, which waits for it
    missed = logits.sum(1)  # the probability of all other tokens; 1 - hit would have lost it where it is small
    logits[rows, targets] = -missed
    missed = missed.float()
    limits = torch.finfo(logits.dtype)
    return -torch.where(missed < 0.5, torch.log1p(-missed), hit.clamp(min=limits.tiny * limits.eps).log())


def transposed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix (M, N) as (N, M) in another precision; on a CPU in memory too, for there products are faster then."""
    matrix = matrix.to(dtype).T
    return matrix.contiguous() if matrix.device.type == "cpu" else matrix
