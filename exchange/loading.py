"""Load a model in any layout: Jojo's own checkpoint, nanoGPT's, a Hugging Face folder, or "gpt2" from the hub.

model, info = load_model("models/story5000.pt", "cuda", "bfloat16")
model, info = load_model("gpt2")
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import torch

from common.checkpoint import PARTS, build_model, checked_parts, read_file
from exchange.hugging_face import is_hugging_face, load_folder
from exchange.nanogpt import is_nanogpt, load_nanogpt
from model import GPT


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


def read_info(path: str | os.PathLike) -> dict:
    """A model's plain facts, without reading its weights. Raises UserError as `load_checkpoint` does."""
    return load_checkpoint(path, ("info",))["info"]
