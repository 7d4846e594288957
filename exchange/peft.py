"""Read and write adapters in the layout of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

PEFT stores the factors as Jojo does, A (R, in) and B (out, R), although transformers' GPT-2 stores its matrices as
(in, out), which adapter_config.json calls fan_in_fan_out. Only the names differ.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.cli import UserError, first_cause
from common.lora import LAYERS, N_CHAT_ROWS
from exchange.hugging_face import HUB_MODELS, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.transformer."
ROWS = f"{PREFIX}wte.token_adapter.trainable_tokens_delta"  # despite the name, the rows themselves
# Settings that would change what the factors mean, with the values that do not.
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
}


def is_peft(path: Path) -> bool:
    """Whether `path` is a folder with an adapter in PEFT's layout."""
    return (path / CONFIG).is_file()


def load_peft(path: Path) -> dict[str, Any]:
    """An adapter as "info", which lacks the model's own facts, and "model", its factors under Jojo's names.

    Raises UserError for an adapter that is damaged, or of another kind than LoRA on the matrices of GPT-2.
    """
    settings = _read_settings(path)
    factors = {}
    for name, tensor in _read_tensors(path).items():
        layer = re.fullmatch(rf"{re.escape(PREFIX)}(h\.\d+\.[\w.]+\.lora_[AB])\.weight", name)
        if not layer and name != ROWS:
            raise UserError(f"{path / WEIGHTS} contains {name}, which is not supported; use an adapter of GPT-2")
        factors[layer[1] if layer else "wte.rows"] = tensor.float()
    try:
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
        tokens = list((settings.get("trainable_token_indices") or {"wte": []})["wte"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / CONFIG} is not complete ({error}); save the adapter again") from error
    base = str(settings.get("base_model_name_or_path") or "")
    adapter = {
        "rank": rank,
        "alpha": alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha,
        "layers": _layers_of(factors),
        "chat_rows": bool(tokens),
        "base": next((short for short, name in HUB_MODELS.items() if name == base), base),
        "base_digest": None,
    }
    info = {"adapter": adapter, "chat_ids": tokens, "origin": f"PEFT ({path.resolve().name})"}
    return {"info": info, "model": factors, "training": None}


def require_chat_ids(path: str, info: dict[str, Any]) -> None:
    """Raise UserError if the embeddings that an adapter of PEFT trained are not those of ChatML's tokens."""
    n_vocab = info["model"]["n_vocab"]
    tokens = info.pop("chat_ids")
    if tokens not in ([], list(range(n_vocab - N_CHAT_ROWS, n_vocab))):
        raise UserError(
            f"{path} trained the embeddings of the ids {tokens}, and only those of ChatML's two tokens are supported; "
            "use another adapter"
        )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads((path / CONFIG).read_bytes())
        for name, values in PLAIN.items():
            if settings.get(name, values[0]) not in values:
                raise UserError(f"{path} has {name} {json.dumps(settings[name])}, which is not supported; use LoRA")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path / CONFIG} cannot be read ({first_cause(error)}); save the adapter again") from error
    return settings


def _read_tensors(path: Path) -> dict[str, Tensor]:
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path / WEIGHTS} cannot be read ({first_cause(error)}); save the adapter again") from error


def _layers_of(factors: Mapping[str, Tensor]) -> str:
    """The name in LAYERS of the matrices that have factors, or "some"."""
    found = {".".join(name.split(".")[2:4]) for name in factors if name.endswith(".lora_A")}
    return next((name for name, layers in LAYERS.items() if found == set(layers)), "some")


def write_peft(folder: Path, info: Mapping[str, Any], factors: Mapping[str, Tensor]) -> None:
    """Write an adapter for the Hugging Face export of its base. Raises UserError if the disk is full or read-only."""
    adapter, n_vocab = info["adapter"], info["model"]["n_vocab"]
    names = {name: f"{PREFIX}{name}.weight" for name in factors}
    names["wte.rows"] = ROWS
    write_safetensors(folder / WEIGHTS, {names[name]: tensor.contiguous() for name, tensor in factors.items()})
    layers = {".".join(name.split(".")[2:4]) for name in factors if name.endswith(".lora_A")}
    alpha, base = adapter["alpha"], adapter["base"]
    chat_ids = list(range(n_vocab - N_CHAT_ROWS, n_vocab))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # OpenAI's models on the hub lack ChatML's tokens, so an adapter that trained them fits only an export.
        "base_model_name_or_path": base if adapter["chat_rows"] else HUB_MODELS.get(base, base),
        "r": adapter["rank"],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(layers),
        "fan_in_fan_out": True,
        "bias": "none",
        "inference_mode": True,
        "trainable_token_indices": {"wte": chat_ids} if adapter["chat_rows"] else None,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
