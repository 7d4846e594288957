"""Custom backward passes for compiled training on a CPU, where torch's own take up to three times as long.

Replaces: F.linear and F.scaled_dot_product_attention; `linear` and `attention` return the same results.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: in eager steps, on other devices, in evaluation; `linear` also in float32, `attention` also with dropout.

Shapes: B batch, T time, H heads, D head size, N rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_BLOCK = 256  # keys whose scores exist at the same time in the backward pass of attention


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with a faster product for the gradient of its weight."""
    return _Linear.apply(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_block: int = KEY_BLOCK) -> Tensor:
    """Attention (B, H, T, D) without dropout, causal unless there is a `mask`, which is added to the scores."""
    return _Attention.apply(q, k, v, mask, key_block)


class _Linear(torch.autograd.Function):
    """F.linear that copies the first, smaller matrix of the product for the weight's gradient into row-major order.

    torch multiplies a transposed view instead, which takes twice as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y_grad,) = grads
        x, weight = ctx.saved_tensors
        weight_grad, bias_grad = linear_gradients(x, weight, y_grad, ctx.has_bias)
        return (y_grad @ weight.to(y_grad.dtype)).to(x.dtype), weight_grad, bias_grad


def linear_gradients(x: Tensor, weight: Tensor, y_grad: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of a linear layer's weight and bias, for its input x (..., n_in) and the gradient of its output."""
    n_out, n_in = weight.shape
    rows, row_grads = x.to(y_grad.dtype).flatten(0, -2), y_grad.flatten(0, -2)  # (N, n_in), (N, n_out)
    if n_in < n_out:
        weight_grad = (copied(rows.T) @ row_grads).T
    elif n_in > n_out:
        weight_grad = copied(row_grads.T) @ rows
    else:  # too small to gain
        weight_grad = row_grads.T @ rows
    bias_grad = row_grads.sum(0, dtype=weight.dtype) if has_bias else None
    return weight_grad.to(weight.dtype).contiguous(), bias_grad


def copied(matrix: Tensor) -> Tensor:
    """A row-major copy of a matrix. The compiler would treat the one that `contiguous` makes as a view."""
    if not torch.compiler.is_compiling():
        return matrix.contiguous()
    return torch.ops.prims.inductor_force_stride_order(matrix, (matrix.shape[1], 1))


class _Attention(torch.autograd.Function):
    """torch's forward pass, and a backward pass of large products.

    As in "FlashAttention" (Dao et al. 2022, appendix B.4) the weights are recomputed from the scores and each query's
    logsumexp, here for `key_block` keys at a time. Scores are stored as (keys, queries), so that only the gradient of
    the queries needs a transposed matrix.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_block: int) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y, logsumexp = flash(q, k, v, 0.0, mask is None, attn_mask=mask)
        ctx.save_for_backward(q, k, v, y, logsumexp, mask)
        ctx.key_block = key_block
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y_grad,) = grads
        q, k, v, y, logsumexp, mask = ctx.saved_tensors
        T, scale, key_block = q.shape[2], 1 / math.sqrt(q.shape[3]), ctx.key_block
        y_grad = y_grad.contiguous()
        delta = (y_grad.float() * y.float()).sum(3)  # (B, H, T), the mean of a query's weight gradients
        q_grad: Tensor | None = None
        k_grads, v_grads = [], []
        for start in range(0, T, key_block):  # queries before the block do not attend to it
            keys, values = k[:, :, start : start + key_block], v[:, :, start : start + key_block]
            queries, y_grads = q[:, :, start:], y_grad[:, :, start:]
            scores = (keys @ queries.transpose(2, 3)).float() * scale - logsumexp[:, :, None, start:]
            if mask is None:
                visible = torch.arange(keys.shape[2])[:, None] <= torch.arange(T - start)
                weights = torch.where(visible, scores.exp(), 0.0)
            else:
                weights = (scores + mask[:, :, start:, start : start + key_block].transpose(2, 3)).exp()
            weights_grad = (values @ y_grads.transpose(2, 3)).float() - delta[:, :, None, start:]
            scores_grad = (weights * weights_grad * scale).to(q.dtype)
            k_grads.append(scores_grad @ queries)
            v_grads.append(weights.to(q.dtype) @ y_grads)
            part = scores_grad.transpose(2, 3) @ keys  # (B, H, T - start, D)
            q_grad = part if q_grad is None else torch.cat([q_grad[:, :, :start], q_grad[:, :, start:] + part], 2)
        return q_grad, torch.cat(k_grads, 2), torch.cat(v_grads, 2), None, None
