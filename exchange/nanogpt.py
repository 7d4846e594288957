"""nanoGPT's checkpoints (ckpt.pt), read as weights: https://github.com/karpathy/nanoGPT, train.py."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import TypeGuard

from common.cli import UserError
from model import GPTConfig


def is_nanogpt(content: object) -> TypeGuard[dict]:
    """Whether the content of a checkpoint file has nanoGPT's layout."""
    return isinstance(content, dict) and {"model", "model_args"} <= content.keys()


def load_nanogpt(path: Path, content: dict, parts: Collection[str]) -> dict:
    """The named parts of a nanoGPT checkpoint, in our own format; "training" is None.

    Raises UserError for a file that is damaged or incomplete.
    """
    _check_crc(path)
    try:
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
        settings = {name: content["model_args"][name] for name in names}
        weights = {}
        for name, tensor in content["model"].items():
            name = name.removeprefix("_orig_mod.").removeprefix("transformer.")  # _orig_mod: torch.compile's wrapper
            if name != "lm_head.weight" and not name.endswith(".attn.bias"):  # the tied head; the causal mask
                weights[name] = tensor.float()
        settings["n_vocab"] = min(GPTConfig.n_vocab, settings["vocab_size"])
        config = GPTConfig(**settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is an incomplete nanoGPT checkpoint ({error}); use another checkpoint") from error
    info = {"model": dataclasses.asdict(config), "dataset": "unknown", "format": "text", "config": {}, "data": {}}
    found = {"info": {**info, "origin": "nanoGPT"}, "model": weights, "training": None}
    return {name: found[name] for name in parts}


def _check_crc(path: Path) -> None:
    """Raise UserError if the zip file's checksums do not match; nanoGPT's checkpoints contain no digest."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        damaged = str(error)
    if damaged:
        raise UserError(f"{path} is damaged ({damaged}); use another checkpoint")
