"""What benchmark.py can measure: for each task both sides' work, and the configuration that they share.

work = WORKS["train"]["ours"](options, training_config(options))
seconds, tokens = timed(work, steps=10)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmark_generation import GenerationConfig, generate_ours, generate_transformers
from benchmark_preparation import prepare_ours, prepare_tiktoken
from benchmark_timing import Work
from benchmark_training import train_compiled, train_ours, train_plain, train_transformers

from common.cli import UserError
from common.device import choose_device, choose_dtype
from common.speedups import load_speedups
from setup_tokenizer import N_VOCAB

if TYPE_CHECKING:
    from training.config import RunConfig

WORKS: dict[str, dict[str, Callable[..., Work]]] = {
    "train": {
        "ours": train_ours,
        "transformers": train_transformers,
        "plain": train_plain,
        "compiled": train_compiled,
    },
    "generate": {"ours": generate_ours, "transformers": generate_transformers},
    "prepare": {"ours": prepare_ours, "tiktoken": prepare_tiktoken},
}
PEERS = {task: tuple(sides)[1:] for task, sides in WORKS.items()}
LONG_RUN_ITERS = 5000
BATCH_SIZE = 16  # as train.py's default, but without trying whether it fits


def training_config(options: Any) -> RunConfig:
    """The RunConfig of a long run with these options on the chosen device. Raises UserError as train.py does."""
    from training.config import make_config
    from training.options import TrainOptions

    check_preset(options.preset)
    names = {field.name for field in dataclasses.fields(options)} & {f.name for f in dataclasses.fields(TrainOptions)}
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    fast = load_speedups(options.plain)
    return make_config(
        TrainOptions(**{"batch_size": BATCH_SIZE, "max_iters": LONG_RUN_ITERS, **given}),
        given,
        choose_device(options.device),
        {"format": "text", "n_vocab": options.n_vocab or N_VOCAB},
        speed_up=fast.speed_up_training if fast else None,
        logits_rows=fast.LOSS_CHUNK_ROWS if fast else None,
    )


def check_preset(preset: str | None) -> None:
    """Raise UserError for an unknown preset. The options cannot check it: its import would load torch for --help."""
    from model import PRESETS

    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset {preset} is unknown; use one of {', '.join(PRESETS)}")


def generation_config(options: Any) -> GenerationConfig:
    """The model to generate with, on the chosen device. Raises UserError if the text does not fit into the context."""
    from model import PRESETS

    check_preset(options.preset)
    device = choose_device(options.device)
    preset = options.preset or ("gpt2" if device.startswith("cuda") else "small")
    names = ("n_layer", "n_head", "n_embd", "block_size")
    shape = {name: getattr(options, name) or getattr(PRESETS[preset], name) for name in names}
    longest = options.prompt_tokens + options.max_tokens
    if longest > shape["block_size"]:
        raise UserError(f"{longest} tokens exceed the block size {shape['block_size']}; use a smaller --max_tokens")
    return GenerationConfig(preset, **shape, device=device, dtype=choose_dtype(options.dtype, device))


def peer_setting(task: str, peer: str, device: str) -> str:
    """How the other side works, in words."""
    if task == "prepare":
        return "one thread of encode_ordinary"
    if task == "generate":
        return "its generate with a cache, greedy, in our precision"
    if peer == "compiled" or (peer == "transformers" and device.startswith("cuda")):
        return f"{choose_dtype(None, device)} autocast, torch.compile, fused AdamW, all logits at once"
    return "float32, eager, AdamW, all logits at once"
