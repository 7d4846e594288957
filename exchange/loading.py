"""Load a model in any layout: Jojo's own checkpoint, nanoGPT's, a Hugging Face folder, or "gpt2" from the hub.

model, info = load_model("models/story5000.pt", "cuda", "bfloat16")
model, info = load_model("gpt2")
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import PARTS, build_model, checked_parts, read_file
from common.cli import UserError
from exchange.hugging_face import is_hugging_face, load_folder
from exchange.nanogpt import is_nanogpt, load_nanogpt
from model import GPT
from setup_tokenizer import Tokenizer


def load_checkpoint(path: str | os.PathLike, parts: Collection[str] = PARTS) -> dict:
    """The named parts ("info", "model", "training") of a model in any layout, on the CPU.

    Only Jojo's own checkpoints have a "training" part; for other layouts it is None. Parts that are not requested are
    not read. Raises UserError for a file that is missing, damaged, in an unknown layout, or contains pickled code.
    """
    path = Path(path)
    if is_hugging_face(path):
        return load_folder(path, parts)
    content = read_file(path)
    if is_nanogpt(content):
        return load_nanogpt(path, content, parts)
    return checked_parts(path, content, parts)


def load_model(path: str | os.PathLike, device: str = "cpu", dtype: str = "float32") -> tuple[GPT, dict]:
    """A model in evaluation mode on `device` in `dtype`, and its info. Raises UserError as `load_checkpoint` does."""
    checkpoint = load_checkpoint(path, ("info", "model"))
    model = build_model(path, checkpoint).to(device=device, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False), checkpoint["info"]


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
