"""torch's Muon, for several matrices at a time and for sharded matrices.

Muon updates a matrix by its orthogonalized momentum: all singular values are made nearly one ("Muon: An optimizer for
hidden layers in neural networks", Jordan et al. 2024). torch.optim.Muon updates one matrix after another, with products
too small to keep two CPU cores busy, let alone a GPU; here the matrices of one shape are multiplied together. The state
is torch's, and so is the default that adjusts the learning rate to a matrix's shape. The precision of the products is
torch's (bfloat16) or, for processors that only emulate it, float32, which on such a CPU is 20 times as fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from training.sharding import full_tensor, shard_like

TOGETHER = 4  # matrices multiplied at a time; more would take memory and gain nothing


class Muon(torch.optim.Muon):
    """torch.optim.Muon whose step multiplies weights of the same shape together.

    The momentum of sharded weights stays sharded; each process computes the whole update and takes its shard. The
    products are computed in `dtype`.
    """

    def __init__(self, params: Iterable[Tensor], dtype: torch.dtype = torch.bfloat16, **settings: Any):
        super().__init__(params, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weights in same_shapes([weight for weight in group["params"] if weight.grad is not None]):
                rows, columns = weights[0].shape
                updates = torch.empty(len(weights), rows, columns, device=weights[0].device, dtype=self.dtype)
                for update, weight in zip(updates, weights, strict=True):
                    update.copy_(self._direction(weight, group))
                updates = orthogonalised_(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(shard_like(update, weight), alpha=-rate)

    def _direction(self, weight: Tensor, group: dict) -> Tensor:
        """The momentum's direction, with the current gradient added once more (Nesterov), whole and in `dtype`."""
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None  # `step` leaves out weights without one
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        return full_tensor(direction.to(self.dtype))


def same_shapes(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of weights with the same shape, at most TOGETHER in each."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        by_shape.setdefault(weight.shape, []).append(weight)
    for alike in by_shape.values():
        for first in range(0, len(alike), TOGETHER):
            yield alike[first : first + TOGETHER]


def orthogonalised_(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (n, rows, columns) with all singular values made nearly one, by the Newton-Schulz iteration.

    Overwrites `matrices`.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.contiguous() if is_tall else matrices
    x /= torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if is_tall else x  # in the weights' memory layout, which adds four times as fast
