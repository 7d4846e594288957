"""A model in shards ("fsdp"): each process holds a part of every weight, gradient and optimizer state.

Layers are gathered while they are used and freed afterwards ("ZeRO", Rajbhandari et al. 2020; torch's `fully_shard`).
Checkpoints hold whole tensors, so a run can continue with any number of processes. Tensors that are not sharded are
returned unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import GPT
from training.config import RunConfig
from training.parallel import is_first, world_size


def is_sharded_run(config: RunConfig) -> bool:
    """Whether each process of the run holds a shard of the model."""
    return config.parallel == "fsdp" and world_size() > 1


def shard_model(model: GPT, device: str) -> GPT:
    """Shard a model that is on the CPU: each process keeps a part of every weight on its own device.

    A block's weights are whole on the device only while the block runs. The embedding, which the loss needs again,
    stays whole from the forward pass to the end of the backward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)  # type: ignore[return-value]


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is sharded over the processes (a DTensor)."""
    if not isinstance(tensor, Tensor) or type(tensor) in (Tensor, nn.Parameter):
        return False  # avoids the import below, which takes a second
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gather_full(state: Any) -> Any:
    """Nested dicts and lists in which every sharded tensor is whole in the first process, and None in the others.

    All processes must call this with the same structure.
    """
    if isinstance(state, dict):
        return {key: gather_full(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(gather_full, state))
    if not is_sharded(state):
        return state
    tensor = state.detach().full_tensor()
    return tensor.cpu() if is_first() else None


def shard_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's saved state, {number of the weight: {name: tensor}}, sharded like its weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {
        number: {name: shard_like(value, weights[number]) for name, value in values.items()}
        for number, values in state.items()
    }


def shard_like(value: Any, weight: Tensor) -> Any:
    """This process's shard of a tensor that every process holds as a whole, sharded like `weight`."""
    if not is_sharded(weight) or not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: each process has read the whole tensor and takes its shard of it without communication.
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(weight.device), mesh, placements, src_data_rank=None)
