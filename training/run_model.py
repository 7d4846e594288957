"""The model of a run: new weights, those of a checkpoint, or a frozen base with an adapter's trainable factors."""

from __future__ import annotations

import dataclasses

from common.lora import adapt
from model import GPT
from training.adapter_config import adapter_of
from training.config import RunConfig
from training.frozen_model import frozen_model, load_factors
from training.initialization import make_model, model_config


def make_run_model(config: RunConfig, checkpoint: dict | None, path: str) -> GPT:
    """The model of a run on the CPU: new weights, those of the checkpoint loaded from `path`, or with an adapter."""
    shape = model_config(dataclasses.asdict(config), checkpoint)
    adapter = adapter_of(dataclasses.asdict(config))
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
