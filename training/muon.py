"""torch's Muon, for several matrices at a time and for sharded matrices.

Muon updates a matrix by its orthogonalized momentum: all singular values are made nearly one ("Muon: An optimizer for
hidden layers in neural networks", Jordan et al. 2024). torch.optim.Muon updates one matrix after another, with products
too small to keep two CPU cores busy, let alone a GPU; here the matrices of one shape are multiplied together. The state
is torch's, and so is the default that adjusts the learning rate to a matrix's shape. The precision of the products is
torch's (bfloat16), except on processors that only emulate it (see common.device.tensor_core_dtype): on a CPU with AVX2
bfloat16 takes 20 to 40 times as long as float32.

The weight of c_attn consists of three matrices, for queries, keys and values. Each is orthogonalized on its own, as
Muon's authors recommend: models learn faster at first (docs/experiments/optimizer.md).

Under DistributedDataParallel all processes have the same gradients. Each process computes the updates of some of the
matrices and sends them to the others. The results are exactly the same, but each is computed only once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.device import tensor_core_dtype
from training.parallel import rank, world_size
from training.sharding import full_tensor, is_sharded, shard_like

MATRICES_AT_ONCE = 4  # matrices multiplied at a time; more would take memory and gain nothing


class Muon(torch.optim.Muon):
    """torch.optim.Muon whose step multiplies weights of the same shape together, and splits c_attn's into three.

    The momentum of sharded weights stays sharded; each process computes the whole update and takes its shard. Weights
    that are not sharded are the same in all processes, which share the work. `dtype` is the precision of the products
    (None: the device's).
    """

    def __init__(self, params: Iterable[Tensor], dtype: torch.dtype | None = None, **settings: Any):
        super().__init__(params, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            groups = list(group_by_shape(weights))
            if world_size() == 1 or any(map(is_sharded, weights)):
                for matrices in groups:
                    self.apply(matrices, self._updates(matrices, group), group)
            else:
                self._share(groups, group)

    def _share(self, groups: list[list[Tensor]], group: dict) -> None:
        """Multiply this process's groups of weights, exchange the updates, and apply them."""
        sent = []
        for matrices, owner in zip(groups, owners_of(groups), strict=True):
            updates = self._updates(matrices, group, is_own=owner == rank())
            sent.append((matrices, updates, dist.broadcast(updates.view(torch.uint8), owner, async_op=True)))
        for matrices, updates, exchange in sent:
            exchange.wait()
            self.apply(matrices, updates, group)

    def _updates(self, weights: list[Tensor], group: dict, is_own: bool = True) -> Tensor:
        """The orthogonalized updates (n, rows, columns), or memory for those that another process computes."""
        device = weights[0].device
        dtype = self.dtype or tensor_core_dtype(str(device))
        updates = torch.empty(len(weights), *weights[0].shape, device=device, dtype=dtype)
        for update, weight in zip(updates, weights, strict=True):
            if is_own:
                self.write_direction(update, weight, group)
            else:
                self._direction(weight, group)  # in every process, so that all have the momentum
        if not is_own:
            return updates
        return self.orthogonalised(self.parts(updates), group).view_as(updates)

    def parts(self, matrices: Tensor) -> Tensor:
        """The matrices (n, rows, columns) that are orthogonalized on their own, as one tensor."""
        return matrices.reshape(-1, matrices.shape[1] // self.n_parts(matrices[0]), matrices.shape[2])

    def n_parts(self, weight: Tensor) -> int:
        """How many matrices a weight holds; see the function of this name."""
        return n_parts(weight)

    def write_direction(self, update: Tensor, weight: Tensor, group: dict) -> None:
        """Update the momentum with the weight's gradient, and write its direction, as a whole matrix, to `update`."""
        direction = self._direction(weight, group)
        if update.dtype == torch.float16:
            whole = full_tensor(direction) if is_sharded(direction) else direction
            direction = scaled_into_range(self.parts(whole[None]), group["eps"]).view_as(update)
        update.copy_(full_tensor(direction.to(update.dtype)) if is_sharded(direction) else direction)

    def orthogonalised(self, matrices: Tensor, group: dict) -> Tensor:
        """Matrices (n, rows, columns) with all singular values made nearly one; may overwrite `matrices`."""
        return orthogonalised_(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])

    def apply(self, weights: list[Tensor], updates: Tensor, group: dict) -> None:
        """Decay weights of one shape and add their updates (n, rows, columns)."""
        rate = self.rate(weights[0], group)
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(shard_like(update, weight), alpha=-rate)

    def rate(self, weight: Tensor, group: dict) -> float:
        """The learning rate times the root of rows / columns of the weight's matrices, if that is more than 1."""
        rows, columns = weight.shape
        return group["lr"] * max(1.0, rows / self.n_parts(weight) / columns) ** 0.5

    def _direction(self, weight: Tensor, group: dict) -> Tensor:
        """The momentum's direction, with the current gradient added once more (Nesterov), sharded like the weight."""
        gradient = weight.grad
        assert gradient is not None  # `step` leaves out weights without one
        momentum = self.momentum(weight).lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def momentum(self, weight: Tensor) -> Tensor:
        """The weight's momentum, zeros at first."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def n_parts(weight: Tensor) -> int:
    """How many matrices a weight (rows, columns) holds: 3 for c_attn, which is three times as tall as wide, else 1.

    >>> n_parts(torch.empty(768, 256)), n_parts(torch.empty(1024, 256))
    (3, 1)
    """
    rows, columns = weight.shape
    return 3 if rows == 3 * columns else 1


def group_by_shape(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of weights with the same shape and at most MATRICES_AT_ONCE matrices (a single weight may have more)."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        by_shape.setdefault(weight.shape, []).append(weight)
    for same in by_shape.values():
        together = max(1, MATRICES_AT_ONCE // n_parts(same[0]))
        for first in range(0, len(same), together):
            yield same[first : first + together]


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


def scaled_into_range(matrices: Tensor, eps: float) -> Tensor:
    """Matrices (n, rows, columns), each divided by its norm: float16 is too small for the range of gradients."""
    return matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp(min=eps)


def owners_of(groups: list[list[Tensor]]) -> list[int]:
    """The rank that multiplies each group of weights: the largest groups first, each to the rank with least work."""
    work = [0] * world_size()
    owners = [0] * len(groups)
    costs = [len(matrices) * n_multiplications(matrices[0]) for matrices in groups]
    for number in sorted(range(len(groups)), key=lambda number: -costs[number]):
        owners[number] = min(range(len(work)), key=work.__getitem__)
        work[owners[number]] += costs[number]
    return owners


def n_multiplications(weight: Tensor) -> int:
    """How many multiplications a Newton-Schulz step takes: two products with each matrix, and one of its square."""
    parts = n_parts(weight)
    short, long = sorted((weight.shape[0] // parts, weight.shape[1]))
    return parts * short * short * (2 * long + short)
