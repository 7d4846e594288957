"""The optimizers of a run: AdamW for all weights, or Muon for the blocks' matrices and AdamW for the rest.

Muon orthogonalizes the update of a matrix (see training/muon.py), which only makes sense for matrices that map
activations to activations: embeddings are tables of vectors, and biases and LayerNorms are single vectors.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from model import GPT
from training.config import RunConfig
from training.muon import Muon

EMBEDDING_EPS = 1e-6 * 4096  # Adam's eps for the embeddings is this / tokens_per_iter; see make_optimizers


def make_optimizers(model: GPT, config: RunConfig, fast: ModuleType | None = None) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon for the blocks' matrices and AdamW for the rest.

    `fast` is the package of that name, if the run uses it.

    AdamW: "Decoupled Weight Decay Regularization" (Loshchilov and Hutter 2019); Muon as in torch.optim.Muon (Jordan et
    al. 2024). Biases and LayerNorms are not decayed.

    A token that hardly ever occurs has tiny gradients that all point the same way. Adam would enlarge them to full
    steps, and rare tokens would drift together until nothing tells them apart ("Better Embeddings with Coupled Adam",
    Stollenwerk and Stollenwerk 2025). So the embeddings have a larger eps. With it, gradients much smaller than
    that of a single occurrence, 1 / tokens_per_iter, lead to small steps.
    """
    if config.lora_rank is not None:
        return [_adapter_optimizer(model, config)]
    blocks = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and name.startswith("h.")]
    vectors = [weight for name, weight in model.named_parameters() if weight.dim() < 2]
    embeddings = [model.wte.weight, model.wpe.weight]
    eps = EMBEDDING_EPS / config.tokens_per_iter
    optimizers: list[torch.optim.Optimizer] = []
    groups: list[dict[str, Any]] = [{"params": embeddings, "weight_decay": config.embedding_weight_decay, "eps": eps}]
    if config.optimizer == "muon":
        optimizers.append(Muon(blocks, lr=config.muon_learning_rate, weight_decay=config.muon_weight_decay))
    else:
        groups.append({"params": blocks, "weight_decay": config.weight_decay})
    groups.append({"params": vectors, "weight_decay": 0.0})
    fused = config.device.startswith(("cuda", "cpu"))  # one kernel for the whole update
    # 0.95 as for GPT-3 (Brown et al. 2020, appendix B): the default, 0.999, averages over a thousand steps.
    optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused))
    if fast:
        fast.speed_up_optimizers(optimizers)
    return optimizers


def _adapter_optimizer(model: GPT, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW for an adapter's factors and for the rows of ChatML's tokens, which are embeddings."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    rows = [weight for name, weight in trained.items() if name.endswith(".rows")]
    factors = [weight for name, weight in trained.items() if not name.endswith(".rows")]
    groups: list[dict[str, Any]] = [{"params": factors, "weight_decay": config.weight_decay}]
    if rows:
        groups.append({"params": rows, "weight_decay": 0.0, "eps": EMBEDDING_EPS / config.tokens_per_iter})
    fused = config.device.startswith(("cuda", "cpu"))
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)


def init_optimizer_states(optimizers: list[torch.optim.Optimizer]) -> None:
    """Allocate the optimizers' states as zeros, by a step that changes no weight.

    If the first real step allocated them, they would be scattered between its gradients, and nothing large would fit
    into the gaps that the gradients leave.
    """
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for state in optimizer.state.values():  # AdamW has counted this step
            for value in state.values():
                value.zero_()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def set_rates(optimizers: list[torch.optim.Optimizer], config: RunConfig, scale: float) -> None:
    """Set every learning rate to `scale` times its peak."""
    for optimizer in optimizers:
        peak = config.muon_learning_rate if isinstance(optimizer, Muon) else config.learning_rate
        for group in optimizer.param_groups:
            group["lr"] = peak * scale
