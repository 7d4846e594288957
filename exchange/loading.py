"""Load a model in any layout: Jojo's own checkpoint, nanoGPT's, a Hugging Face folder, or "gpt2" from the hub.

model, info = load_model("models/story5000.pt", "cuda", "bfloat16")
model, info = load_model("gpt2")
model, info = load_model("models/chitchat1500.pt+models/own300.pt")   # an adapter on its base
model, info = load_model("models/own300.pt")                          # the same: it names its base
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import FORMAT, PARTS, build_model, checked_parts, digest, read_file
from common.cli import UserError
from common.lora import Adapter, fit_base, merge
from exchange.hugging_face import HUB_MODELS, is_hugging_face, load_folder
from exchange.nanogpt import is_nanogpt, load_nanogpt
from exchange.peft import is_peft, load_peft, require_chat_ids
from model import GPT, GPTConfig
from setup_tokenizer import Tokenizer


def load_checkpoint(path: str | os.PathLike, parts: Collection[str] = PARTS) -> dict:
    """The named parts ("info", "model", "training") of a model in any layout, on the CPU.

    An adapter is merged with its base. Only Jojo's own checkpoints have a "training" part; for other layouts, and for a
    merged adapter, it is None. Parts that are not requested are not read. Raises UserError for a file that is missing,
    damaged, in an unknown layout, or contains pickled code, and for an adapter without its base.
    """
    checkpoint = load_unmerged(path, parts)
    base = checkpoint.pop("base", None)
    if base is not None:
        info = checkpoint["info"]
        checkpoint["training"] = None
        try:
            config = GPTConfig(**info["model"])
            checkpoint["model"] = merge(fit_base(base, config), checkpoint["model"], Adapter(**info["adapter"]), config)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the adapter {path} does not fit its base ({reason}); use another adapter") from error
    return {name: checkpoint[name] for name in parts}


def load_unmerged(path: str | os.PathLike, parts: Collection[str] = PARTS) -> dict:
    """What `load_checkpoint` returns, but "model" holds an adapter's factors and "base" the weights of its base.

    "info" is always included. The base is checked against the digest that the adapter stores.
    """
    base_path, own_path = split_pair(str(path))
    checkpoint = _load_alone(own_path, {*parts, "info"})
    info = checkpoint["info"]
    if base_path is not None:
        _require_order(base_path, own_path, info)
    if "adapter" not in info:
        return checkpoint
    if base_path is None:
        base_path = find_base(own_path, info["adapter"])
    if "model" not in info:  # PEFT stores nothing about the base
        base_info = _load_alone(base_path, ("info",))["info"]
        kept = ("model", "tokenizer", "format", "dataset", "data")
        info |= {name: base_info[name] for name in kept if name in base_info}
        info |= {"config": {}, "format": "chat" if info["adapter"]["chat_rows"] else base_info["format"]}
        require_chat_ids(own_path, info)
    if "model" in parts:
        checkpoint["base"] = _load_base(base_path, own_path, info["adapter"])
    return checkpoint


def _load_alone(path: str | os.PathLike, parts: Collection[str]) -> dict:
    path = Path(path)
    if is_peft(path):
        return load_peft(path)
    if is_hugging_face(path):
        return load_folder(path, parts)
    content = read_file(path)
    if is_nanogpt(content):
        return load_nanogpt(path, content, parts)
    return checked_parts(path, content, parts)


# --- an adapter and its base ---


def split_pair(path: str) -> tuple[str | None, str]:
    """The base and the adapter that BASE+ADAPTER names; (None, path) for a path that names one model.

    The names of mixtures contain a plus, too, so a file of the whole name comes first.

    >>> split_pair("models/chitchat1500.pt+models/own300.pt")
    ('models/chitchat1500.pt', 'models/own300.pt')
    >>> split_pair("models/chitchat+own300.pt")
    (None, 'models/chitchat+own300.pt')
    """
    if Path(path).exists():
        return None, path
    pairs = [(path[: plus.start()], path[plus.end() :]) for plus in re.finditer(r"\+", path)]
    named = [pair for pair in pairs if all(name in HUB_MODELS or Path(name).exists() for name in pair)]
    likely = [pair for pair in pairs if pair[0].endswith(".pt") or pair[0] in HUB_MODELS or Path(pair[0]).is_dir()]
    return next(iter([*named, *likely]), (None, path))


def _require_order(base_path: str, path: str, info: Mapping[str, Any]) -> None:
    """Raise UserError if a pair is not a plain model and an adapter."""
    base_info = _load_alone(base_path, ("info",))["info"]
    if "adapter" in info and "adapter" in base_info:
        raise UserError(f"{base_path} and {path} are both adapters; name a base first, or {path} alone")
    if "adapter" in base_info:
        raise UserError(f"{path} is not an adapter, and {base_path} is; name the base first: {path}+{base_path}")
    if "adapter" not in info:
        raise UserError(f"{path} is not an adapter; name {path} alone, or an adapter made with train.py --lora_rank")


def find_base(path: str | os.PathLike, adapter: Mapping[str, Any]) -> str:
    """The base of the adapter at `path`: at its recorded path, or next to the adapter. Raises UserError without one."""
    recorded = adapter["base"]
    for candidate in (Path(recorded), Path(path).parent / Path(recorded).name):
        if recorded and (candidate.exists() or str(candidate) in HUB_MODELS):
            return str(candidate)
    raise UserError(
        f"the adapter {path} needs its base {recorded or '(not recorded)'}, which was not found; put the base next to "
        f"it, or name it in front: BASE+{path}"
    )


def _load_base(base_path: str, path: str, adapter: Mapping[str, Any]) -> dict[str, Tensor]:
    """The base's weights. Raises UserError if the adapter was trained with others."""
    weights = _load_alone(base_path, ("info", "model"))["model"]
    expected = adapter["base_digest"]
    if expected is not None and (found := digest(weights)) != expected:
        raise UserError(
            f"{base_path} is not the base of the adapter {path}, which was trained on {adapter['base']} as it was then "
            f"(sha256 {found[:12]} instead of {expected[:12]}); name the right base in front: BASE+{path}"
        )
    return weights


# --- a model ---


def load_model(path: str | os.PathLike, device: str = "cpu", dtype: str = "float32") -> tuple[GPT, dict]:
    """A model in evaluation mode on `device` in `dtype`, and its info. Raises UserError as `load_checkpoint` does."""
    checkpoint = load_checkpoint(path, ("info", "model"))
    model = build_model(path, checkpoint).to(device=device, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False), checkpoint["info"]


def weights_digest(path: str | os.PathLike) -> str:
    """The digest of a model's weights; Jojo's checkpoints contain it. Raises UserError as `load_checkpoint` does."""
    content = read_file(path) if Path(path).is_file() else None
    if isinstance(content, dict) and content.get("format") == FORMAT and "adapter" not in content["info"]:
        return content["digests"]["model"]
    return digest(load_checkpoint(path, ("model",))["model"])


def tokenizer_of(path: str | os.PathLike, info: Mapping[str, Any], model: GPT) -> Tokenizer:
    """The tokenizer of a loaded model, with or without ChatML's tokens. Raises UserError if the model has other ids."""
    tokenizer = Tokenizer.from_info(info, str(path))
    if not tokenizer.endoftext < model.config.n_vocab <= tokenizer.n_vocab:
        raise UserError(
            f"{path} has a vocabulary of {model.config.n_vocab} tokens, which is not that of the tokenizer "
            f"{tokenizer.name}; use a checkpoint that train.py wrote"
        )
    return tokenizer


def read_info(path: str | os.PathLike) -> dict:
    """A model's plain facts, without reading its weights. Raises UserError as `load_checkpoint` does."""
    return load_checkpoint(path, ("info",))["info"]
