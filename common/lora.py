"""Low-rank adapters (LoRA): a trained model's weights are frozen, and small added factors are trained.

    adapt(model, Adapter(rank=8))                # freezes the weights; only the new factors A and B are trained
    factors = trained_weights(model)             # what an adapter's checkpoint holds
    weights = merge(base, factors, adapter, config)   # plain weights again, for generation and export

A matrix W (out, in) becomes W + alpha / R * B A with A (R, in) and B (out, R) ("LoRA", Hu et al. 2021, section 4.1). B
is initialized to zero, so an adapted model starts out equal to its base. model.py knows nothing about adapters: each
layer gets a subclass of its own class, as in fast/, so parameter names and references do not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.embedding import extended_embedding
from model import GPT, GPTConfig

ATTENTION, MLP = ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")
LAYERS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # the matrices of a block, by --lora_layers
N_CHAT_ROWS = 2  # <|im_start|> and <|im_end|>, the last ids of a vocabulary


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The settings of an adapter, and the model that it belongs to, as its checkpoint stores them."""

    rank: int
    alpha: float = 16.0
    layers: str = "all"
    chat_rows: bool = False  # whether the embeddings of ChatML's two tokens train, too
    base: str = ""  # the path or name of the base
    base_digest: str | None = None  # the sha256 of its weights (see common/checkpoint.py); None if not known

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def n_params(self, config: GPTConfig) -> int:
        """The number of trainable weights."""
        C = config.n_embd
        sizes = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
        per_block = self.rank * sum(sum(sizes[name]) for name in LAYERS[self.layers])
        return config.n_layer * per_block + self.chat_rows * N_CHAT_ROWS * C


class LoRALinear(nn.Linear):
    """A linear layer whose weight is frozen, with two low-rank factors that train."""

    lora_A: nn.Parameter  # (R, in)
    lora_B: nn.Parameter  # (out, R)
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class EmbeddingWithTrainedRows(nn.Embedding):
    """An embedding (V, C) whose weight is frozen except for the `rows` (2, C) from id `first` on.

    The rows are a parameter of their own. They are written into the weight whenever it is used, and get their part of
    its gradient, so both the embedding and the tied head use them. The gradient of the whole weight exists briefly.
    """

    rows: nn.Parameter
    first: int

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return _WithRows.apply(self._parameters["weight"], self.rows, self.first)


class _WithRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, first: int) -> Tensor:
        ctx.positions = slice(first, first + len(rows))
        weight.data[ctx.positions] = rows.to(weight.dtype)  # hidden from autograd: rows change only between steps
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, grads[0][ctx.positions].float().clone(), None


def adapt(model: GPT, adapter: Adapter) -> None:
    """Freeze a model's weights and add the adapter's trainable factors. Call it before fast/ is applied.

    A is drawn from a normal distribution, scaled so that A x is about as large as x. The factors are float32, whatever
    the model is.
    """
    model.requires_grad_(False)
    for linear in adapted_layers(model, adapter):
        n_out, n_in = linear.weight.shape
        device = linear.weight.device
        linear.__class__ = LoRALinear
        linear.lora_A = nn.Parameter(torch.randn(adapter.rank, n_in, device=device) * n_in**-0.5)
        linear.lora_B = nn.Parameter(torch.zeros(n_out, adapter.rank, device=device))
        linear.scale = adapter.scale
    if adapter.chat_rows:
        wte, first = model.wte, model.config.n_vocab - N_CHAT_ROWS
        rows = wte.weight.detach()[first : first + N_CHAT_ROWS].clone().float()
        wte.__class__ = EmbeddingWithTrainedRows
        embedding = cast(EmbeddingWithTrainedRows, wte)
        embedding.rows, embedding.first = nn.Parameter(rows), first


def adapted_layers(model: GPT, adapter: Adapter) -> Iterator[LoRALinear]:
    """The layers that an adapter changes, block by block; they need not have been changed yet."""
    for block in model.h:
        for name in LAYERS[adapter.layers]:
            yield cast(LoRALinear, block.get_submodule(name))


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights by name: an adapter's factors, or all weights of a model without an adapter."""
    state = model.state_dict(keep_vars=True)
    return {name: weight.detach() for name, weight in state.items() if weight.requires_grad}


def fit_base(weights: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The base's weights, fitted to `config`: excess positions are dropped, and new ids get the mean embedding.

    The same for training and for merging, so that an adapter is always added to the weights that it was trained with.
    """
    fitted = dict(weights)
    if "wpe.weight" in weights:
        fitted["wpe.weight"] = weights["wpe.weight"][: config.block_size]
    known = weights.get("wte.weight")
    if known is not None and config.n_vocab - N_CHAT_ROWS <= len(known) < config.vocab_size:
        fitted["wte.weight"] = extended_embedding(known, config.n_vocab - N_CHAT_ROWS, config.vocab_size)
    return fitted


def merge(
    base: Mapping[str, Tensor], factors: Mapping[str, Tensor], adapter: Adapter, config: GPTConfig
) -> dict[str, Tensor]:
    """The weights of a base that `fit_base` fitted, with the adapter's changes, which are new tensors in float32.

    The sum is computed in float64 and rounded once, so the result does not depend on the number of threads. Raises
    KeyError or RuntimeError if the factors do not fit the base.
    """
    weights, first = dict(base), config.n_vocab - N_CHAT_ROWS
    for name, A in factors.items():
        layer, _, kind = name.rpartition(".")
        weight = base[f"{layer}.weight"]
        if kind == "lora_A":
            update = adapter.scale * (factors[f"{layer}.lora_B"].double() @ A.double())  # (out, in)
            if update.shape != weight.shape:
                raise RuntimeError(f"{layer} is {tuple(weight.shape)}, and its update {tuple(update.shape)}")
            weights[f"{layer}.weight"] = (weight.double() + update).float()
        elif name == "wte.rows":
            weights["wte.weight"] = weight.float().clone()
            weights["wte.weight"][first : first + N_CHAT_ROWS] = A
        elif kind != "lora_B" or f"{layer}.lora_A" not in factors:
            raise KeyError(name)
    return weights
