"""What --lora_rank means for the configuration of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.checkpoint import digest
from common.cli import UserError
from common.lora import Adapter
from training.options import TrainOptions

# A constant, so that the learning rate that fits one rank fits others (Hu et al. 2021, section 4.1).
DEFAULT_ALPHA = 16.0
FIELDS = ("lora_rank", "lora_alpha", "lora_layers", "lora_chat_rows", "lora_base", "lora_base_digest")


def with_adamw(options: TrainOptions, given: Mapping[str, Any]) -> TrainOptions:
    """The options with AdamW as the optimizer, if an adapter trains. Raises UserError for what does not fit an adapter.

    Muon gives the update of a matrix the same size in all directions, which suits a matrix that maps activations to
    activations. A factor is only half of such a matrix.
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


def adapter_choices(
    options: TrainOptions, shape: Mapping[str, Any], checkpoint: Mapping[str, Any] | None, formats: set[str]
) -> dict[str, Any]:
    """The FIELDS of a RunConfig; all None without an adapter. Raises UserError if the base does not fit.

    `checkpoint` is loaded from what --resume or --init_from names.
    """
    if options.lora_rank is None:
        return dict.fromkeys(FIELDS)
    assert checkpoint is not None, "TrainOptions requires --init_from or --resume"
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


def adapter_of(config: Mapping[str, Any]) -> Adapter | None:
    """The adapter that a run with these fields of a RunConfig trains; None if it trains all weights."""
    return None if config["lora_rank"] is None else Adapter(*(config[name] for name in FIELDS))


def require_other_file(path: str, base: str | None) -> None:
    """Raise UserError if the checkpoint of an adapter, at `path`, would replace its base."""
    if base is not None and Path(path).resolve() == Path(base).resolve():
        raise UserError(
            f"the adapter would be saved as {path}, which is its base; change --max_iters, or choose another --out_dir"
        )
