"""Training an adapter with --lora_rank: its options, and the model, which is a frozen base with factors that train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.checkpoint import build_model, digest
from common.cli import UserError, option
from common.lora import LAYERS, Adapter, adapt, fit_base, trained_weights
from model import GPT, GPTConfig
from training.initialization import make_model, model_config

if TYPE_CHECKING:
    from training.config import RunConfig, TrainOptions

# A constant, so that the learning rate that fits one rank fits others (Hu et al. 2021, section 4.1).
DEFAULT_ALPHA = 16.0
FIELDS = ("lora_rank", "lora_alpha", "lora_layers", "lora_chat_rows", "lora_base", "lora_base_digest")


# --- the options ---


def rank_option() -> Any:
    """The field of --lora_rank."""
    return option(
        None,
        "train only an adapter: two factors of this rank beside each matrix of --init_from, whose weights stay as they "
        "are (4 to 16 are usual)",
        at_least=1,
        group="adapter",
        metavar="R",
    )


def alpha_option() -> Any:
    """The field of --lora_alpha."""
    return option(None, "the adapter's changes are scaled by this / R (default: 16)", above=0, group="adapter")


def layers_option() -> Any:
    """The field of --lora_layers."""
    return option(
        None,
        "the matrices of a block that get factors (default: all)",
        choices=tuple(LAYERS),
        group="adapter",
    )


def chat_rows_option() -> Any:
    """The field of --lora_chat_rows."""
    return option(
        None,
        "also train the embeddings of <|im_start|> and <|im_end|> (default: for chat data, if --init_from was not "
        "trained on chats)",
        group="adapter",
    )


def check_options(options: TrainOptions) -> None:
    """Raise ValueError for options that need others."""
    for name in ("lora_alpha", "lora_layers", "lora_chat_rows"):
        if options.lora_rank is None and options.resume is None and getattr(options, name) is not None:
            raise ValueError(f"--{name} belongs to an adapter; add --lora_rank, for example --lora_rank 8")
    if options.lora_rank is not None and options.init_from is None and options.resume is None:
        raise ValueError("--lora_rank needs a trained model; name it with --init_from")


def with_adamw(options: TrainOptions, given: Mapping[str, Any]) -> TrainOptions:
    """The options with AdamW as the optimizer, if an adapter trains. Raises UserError for what does not fit an adapter.

    Muon gives the updates of a matrix the same size in all directions, which suits a matrix between activations. A
    factor is only half of one.
    """
    if options.lora_rank is None:
        return options
    if given.get("optimizer") == "muon":
        raise UserError("--optimizer muon is for whole matrices, and an adapter trains with adamw; leave it out")
    if options.parallel == "fsdp":
        raise UserError(
            "--parallel fsdp does not shard a model with an adapter, whose frozen weights need no optimizer states; "
            "leave it out"
        )
    return dataclasses.replace(options, optimizer="adamw")


# --- the configuration ---


def choices(
    options: TrainOptions, shape: Mapping[str, Any], checkpoint: Mapping[str, Any] | None, formats: set[str]
) -> dict[str, Any]:
    """The FIELDS of a RunConfig; all None without an adapter. Raises UserError if the base does not fit.

    `checkpoint` is loaded from what --resume or --init_from names.
    """
    if options.lora_rank is None:
        return dict.fromkeys(FIELDS)
    assert checkpoint is not None, "check_options requires --init_from or --resume"
    info = checkpoint["info"]
    if options.resume is not None:
        return {name: info["config"][name] for name in FIELDS}
    if "adapter" in info:
        raise UserError(
            f"{options.init_from} is an adapter itself; write it and its base as one model first: python export.py "
            f"{options.init_from} exported/merged, then --init_from exported/merged"
        )
    if options.lora_rank > shape["n_embd"]:
        raise UserError(
            f"--lora_rank {options.lora_rank} exceeds the width {shape['n_embd']} of {options.init_from}, which is the "
            "largest rank of its matrices; use a smaller one, for example --lora_rank 8"
        )
    chat_rows = options.lora_chat_rows
    return {
        "lora_rank": options.lora_rank,
        "lora_alpha": options.lora_alpha or DEFAULT_ALPHA,
        "lora_layers": options.lora_layers or "all",
        "lora_chat_rows": ("chat" in formats and info["format"] != "chat") if chat_rows is None else chat_rows,
        "lora_base": options.init_from,
        "lora_base_digest": digest(checkpoint["model"]),
    }


def adapter_of(config: RunConfig | Mapping[str, Any]) -> Adapter | None:
    """The adapter that a run trains; None if it trains all weights."""
    values = config if isinstance(config, Mapping) else dataclasses.asdict(config)
    if values["lora_rank"] is None:
        return None
    return Adapter(*(values[name] for name in FIELDS))


def require_other_file(config: RunConfig) -> RunConfig:
    """The configuration. Raises UserError if the adapter's checkpoint would get the name of its base's file."""
    path = Path(config.out_dir) / f"{config.name}.pt"
    if config.lora_base is not None and path.resolve() == Path(config.lora_base).resolve():
        raise UserError(
            f"the adapter would be saved as {path}, which is its base; change --max_iters, or choose another --out_dir"
        )
    return config


# --- the model ---


def make_run_model(config: RunConfig, checkpoint: dict | None, path: str) -> GPT:
    """The model of a run on the CPU: new weights, those of the checkpoint loaded from `path`, or with an adapter."""
    shape = model_config(dataclasses.asdict(config), checkpoint)
    adapter = adapter_of(config)
    if adapter is None or checkpoint is None:
        return make_model(shape, checkpoint, path)
    is_new = "base" not in checkpoint
    base = checkpoint.pop("model" if is_new else "base")  # not kept, because a large one takes much memory
    model = frozen_model(shape, base, config.dtype, adapter.base)
    adapt(model, adapter)
    if not is_new:
        load_factors(model, checkpoint["model"], path)
    chat_rows = ", and the rows of ChatML's tokens" if adapter.chat_rows else ""
    print(
        f"adapter: rank {adapter.rank}, alpha {adapter.alpha:g}, {adapter.layers} matrices{chat_rows}: "
        f"{adapter.n_params(shape):,} weights train; {adapter.base} stays as it is"
    )
    return model


def frozen_model(config: GPTConfig, weights: Mapping[str, Tensor], dtype: str, path: str) -> GPT:
    """A model on the CPU with copies of the base's weights, which do not train."""
    model = build_model(path, {"info": {"model": dataclasses.asdict(config)}, "model": fit_base(weights, config)})
    lower_matrices(model, dtype)
    return model


def lower_matrices(model: GPT, dtype: str) -> None:
    """Keep the blocks' matrices in `dtype`, and copies of all other weights in float32.

    Under autocast the products are in this precision anyway, so frozen weights give the same results with half the
    memory. The small steps of weights that train would be lost.
    """
    for name, weight in model.named_parameters():
        is_matrix = weight.dim() == 2 and name.startswith("h.")
        weight.data = weight.data.to(getattr(torch, dtype) if is_matrix else torch.float32, copy=True)


def load_factors(model: GPT, factors: Mapping[str, Tensor], path: str) -> None:
    """Copy a checkpoint's factors into an adapted model. Raises UserError if they are not those of its adapter."""
    own = trained_weights(model)
    wrong = sorted(own.keys() ^ factors.keys())
    wrong += [name for name in own.keys() & factors.keys() if own[name].shape != factors[name].shape]
    if wrong:
        raise UserError(f"{path} does not fit its own settings ({wrong[0]}); use another checkpoint")
    model.load_state_dict(factors, strict=False)


def trial_model(config: GPTConfig, adapter: Adapter | None, device: str, dtype: str) -> GPT:
    """A throwaway model as large as a run's, on its device."""
    if adapter is None:
        with torch.device(device):
            return GPT(config)
    with torch.device("meta"):
        model = GPT(config)
    lower_matrices(model, dtype)
    model.to_empty(device=device)
    adapt(model, adapter)
    return model
