"""Which model to use if no checkpoint is named: the best-trained chat model, or the newest model.

best, *others = chat_models()
print(best.path, best.description)
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import find_checkpoints, readable_infos
from common.cli import UserError
from common.numbers import count_in_words, significant
from data.dataset import data_parts
from exchange.loading import read_info, split_pair
from model import GPTConfig

TINY_TOKENS = 500_000  # of chat data, about 120 iterations of `make demo`: too few for sensible replies
MAX_NAMED = 8


@dataclasses.dataclass(frozen=True)
class FoundModel:
    """A checkpoint in the folder of models; `chat_tokens` is how much chat data its weights were trained on."""

    path: Path
    info: Mapping[str, Any]
    chat_tokens: float = 0.0

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def is_finished(self) -> bool:
        """Whether its run reached the last iteration."""
        max_iters = (self.info.get("config") or {}).get("max_iters") or 0
        return (self.info.get("iter_num") or 0) >= max_iters

    @property
    def rank(self) -> tuple[bool, float, float, str]:
        """A key that sorts chat models, the best-trained first: copies, stopped runs and tiny ones come last."""
        is_copy = re.search(r"-(best|iter\d+)$", self.name)
        comes_later = bool(is_copy) or not self.is_finished or self.chat_tokens < TINY_TOKENS
        return comes_later, -self.chat_tokens, _or_infinity(self.info.get("val_loss")), self.name

    @property
    def description(self) -> str:
        """Its data, the tokens that it has seen, its validation loss, and whether its run is unfinished, in words."""
        info, config = self.info, self.info.get("config") or {}
        facts = [str(info.get("dataset") or "unknown data")]
        if info.get("tokens_seen"):
            facts.append(f"{count_in_words(info['tokens_seen'])} tokens")
        if info.get("val_loss") is not None:
            facts.append(f"validation loss {significant(info['val_loss'], 3)}")
        if adapter := info.get("adapter"):
            facts.append(f"adapter of {Path(adapter['base']).stem}")
        elif config.get("init_from"):
            facts.append(f"started from {Path(config['init_from']).stem}")
        if not self.is_finished:
            facts.append(f"iteration {info.get('iter_num') or 0:,} of {config['max_iters']:,}")
        return ", ".join(facts)


def _or_infinity(value: float | None) -> float:
    return float("inf") if value is None else value


def find_models(folder: str | os.PathLike = "models") -> list[FoundModel]:
    """The readable checkpoints in `folder`, newest first; the others are named on standard error.

    An adapter whose base is missing counts as unreadable. A second name of the same file, such as `-best` if the last
    evaluation was the best one, is left out.
    """
    paths: list[Path] = []
    for path in find_checkpoints(folder):
        if not any(path.samefile(other) for other in paths):
            paths.append(path)
    infos = readable_infos(paths, read_info)
    by_file = {path.resolve(): info for path, info in infos.items()}
    return [FoundModel(path, info, _chat_tokens(path.resolve(), by_file)) for path, info in infos.items()]


def _chat_tokens(path: Path, infos: Mapping[Path, Mapping[str, Any]], later: Collection[Path] = ()) -> float:
    """The tokens of chat data that a model has seen, with those of the models whose weights it started from."""
    if path not in infos or path in later:
        return 0.0
    info = infos[path]
    source = info["adapter"]["base"] if "adapter" in info else (info.get("config") or {}).get("init_from")
    before = _chat_tokens(Path(source).resolve(), infos, (*later, path)) if source else 0.0
    return before + (info.get("tokens_seen") or 0) * chat_share(info)


def chat_share(info: Mapping[str, Any]) -> float:
    """The share of the training rows that are conversations."""
    parts = data_parts(info.get("data") or {})
    if len(parts) == 1:
        return float(info.get("format") == "chat")
    return sum(part.get("weight", 1 / len(parts)) for part in parts if part.get("format") == "chat")


def chat_models(folder: str | os.PathLike = "models") -> list[FoundModel]:
    """The models that were trained on chat data, the best-trained first. Raises UserError if there are no such models.

    The best-trained one has seen the most tokens of chat data among the finished runs; `-best` copies, stopped runs and
    tiny ones come after these.
    """
    found = find_models(folder)
    chat = sorted((model for model in found if model.info.get("format") == "chat"), key=lambda model: model.rank)
    if not chat:
        existing = f" (found: {', '.join(str(model.path) for model in found[:MAX_NAMED])})" if found else ""
        raise UserError(
            f"no checkpoint in {folder} was trained on chat data{existing}; train one in minutes with: make demo"
        )
    return chat


def newest_models(folder: str | os.PathLike = "models") -> list[FoundModel]:
    """All models, newest first. Raises UserError for a folder without models."""
    found = find_models(folder)
    if not found:
        raise UserError(f"no checkpoint in {folder}; train one with: python train.py, or in minutes with: make demo")
    return found


def named_model(name: str, models: Sequence[FoundModel], folder: str | os.PathLike = "models") -> FoundModel:
    """One of `models` or of the others in `folder` by its name, such as chitchat1500, or any model by its path.

    Raises UserError, which names `models`, if no model has that name.
    """
    for model in models:
        if name in (model.name, model.path.name, str(model.path)):
            return model
    for path in (Path(name), Path(folder) / f"{name}.pt"):
        if path.exists() or split_pair(str(path))[0] is not None:
            return FoundModel(path, read_info(path))
    raise UserError(f"there is no model {name}; choose one of {', '.join(model.name for model in models)}")


def listing(models: Sequence[FoundModel], current: str | os.PathLike = "") -> str:
    """One line per model with its name and what is known about it; a star marks the current one."""
    width = max(len(model.name) for model in models)
    is_current = [model.path.resolve() == Path(current).resolve() for model in models]
    lines = [
        f"{'*' if marked else ' '} {model.name:<{width}}  {model.description}"
        for marked, model in zip(is_current, models, strict=True)
    ]
    return "\n".join([*lines, *([f"* {current}"] if current and not any(is_current) else [])])


def names(models: Sequence[FoundModel]) -> str:
    """The names of some models in one line.

    >>> names([FoundModel(Path("models/chat900.pt"), {}), FoundModel(Path("models/chat300.pt"), {})])
    'chat900, chat300'
    """
    more = [f"and {len(models) - MAX_NAMED} more"] if len(models) > MAX_NAMED else []
    return ", ".join([*(model.name for model in models[:MAX_NAMED]), *more])


def was_trained_on_text(info: Mapping[str, Any]) -> bool:
    """Whether a model was trained on plain text, possibly mixed with conversations."""
    return any(part.get("format") == "text" for part in data_parts(info.get("data") or {}))


def format_note(path: str, info: Mapping[str, Any], chat: bool) -> str | None:
    """What to expect of a chat with a text model, or of a text prompt for a chat model; None if the two fit."""
    if chat and info.get("format") != "chat":
        return f"{path} was trained on {info.get('dataset', 'text')}, not on chat data, so do not expect replies"
    if not chat and info.get("format") == "chat" and not was_trained_on_text(info):
        return f"{path} was trained on chat data; talk to it with --chat (control tokens are hidden here)"
    return None


def details(path: str, info: Mapping[str, Any], config: GPTConfig, n_params: int, device: str) -> str:
    """What gen.py --verbose prints about a model; `device` describes the device, the precision and the layers."""
    losses = {"train": info.get("train_loss"), "val": info.get("val_loss")}
    known = [f"{name} {significant(loss, 4)}" for name, loss in losses.items() if loss is not None]
    tokens = count_in_words(info.get("tokens_seen") or 0)
    facts = {
        "checkpoint": path,
        "data": f"{info.get('dataset')} ({info.get('format')}), {tokens} tokens seen",
        "iteration": f"{info.get('iter_num') or 0:,}, loss {', '.join(known) or 'unknown'}",
        "model": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, window {config.block_size}, "
        f"{n_params / 1e6:.1f} M parameters",
        "device": device,
    }
    return "\n".join(f"{name:<11}{value}" for name, value in facts.items())
