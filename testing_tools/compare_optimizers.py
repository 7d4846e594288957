"""Train small models in several ways, each with several seeds, and compare their validation losses.

    python testing_tools/compare_optimizers.py --dataset story --variants adamw muon --max_iters 300 150
    python testing_tools/compare_optimizers.py --n_layer 2 --n_embd 64 --seeds 1 2 3 --json losses.json

The settings are train.py's defaults for each optimizer, at a learning rate of 3e-3, except for what the variant changes
(optimizer_variants.py). Runs that have the same seed and differ only in the optimizer start from the same weights and
see the same rows. Prints each run, then the mean and the range over the seeds. docs/experiments/optimizer.md has
results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from optimizer_variants import VARIANTS, Variant

from common.cli import check_options, option, parse_options, run_script
from common.device import choose_device, device_option, seed_everything
from common.files import atomic_write, require_target
from common.speedups import load_speedups
from model import GPT
from training.batches import Batches
from training.config import RunConfig, make_config
from training.datasets import TrainingData, open_data
from training.initialization import SHAPE, make_model, model_config
from training.memory import move_model
from training.objectives import NextToken
from training.optimizers import make_optimizers, set_rates
from training.options import TrainOptions
from training.schedule import schedule
from training.step import clip_gradients, evaluate, forward_backward

LEARNING_RATE = 3e-3  # unless the variant has another; train.py's default depends on the vocabulary
SHARED = ("dataset", "data_dir", "n_layer", "n_head", "n_embd", "block_size", "batch_size", "eval_iters")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run trains with."""

    model: GPT
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    val_batches: list


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """The data, the model, and what to compare."""

    dataset: str = option("story", "prepared data set", group="data", metavar="NAME")
    data_dir: str = option("data", "folder of the prepared data", group="data", metavar="DIR")
    variants: tuple[str, ...] = option(
        tuple(VARIANTS), "what to compare", choices=tuple(VARIANTS), nargs="+", metavar="NAME"
    )
    max_iters: tuple[int, ...] = option((300,), "iterations; a run for each", at_least=1, nargs="+", type=int)
    seeds: tuple[int, ...] = option((1337, 1338, 1339), "seeds; a run for each", nargs="+", type=int)
    n_layer: int = option(3, "layers", at_least=1, group="model")
    n_head: int = option(3, "attention heads", at_least=1, group="model")
    n_embd: int = option(96, "width", at_least=1, group="model")
    block_size: int = option(128, "context length in tokens", at_least=1, group="model")
    batch_size: int = option(16, "sequences per iteration", at_least=1, group="model")
    eval_iters: int = option(20, "validation batches of 16 sequences", at_least=1)
    device: str | None = device_option(group=None)
    json: str | None = option(None, "also write each run's losses to this file", metavar="FILE")

    def __post_init__(self) -> None:
        check_options(self)


@contextlib.contextmanager
def run_of(config: RunConfig, data: TrainingData, variant: Variant) -> Iterator[Run]:
    """A new model, its optimizers and its batches."""
    fast = load_speedups(plain=False)
    seed_everything(config.seed)
    model = make_model(model_config({name: getattr(config, name) for name in SHAPE}))
    if variant.prepare is not None:
        variant.prepare(model)
    if fast:
        fast.speed_up_training(model, residual_dtype=config.residual_dtype)
    model = move_model(model, config.device).train()
    optimizers = make_optimizers(model, config)
    if variant.muon is not None:
        (group,) = optimizers[0].param_groups
        optimizers[0] = variant.muon(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
    if fast:
        fast.speed_up_optimizers(optimizers)
    rows, val_batches = NextToken(config, data).make_rows()
    batches = Batches(rows, config.batch_size)
    try:
        yield Run(model, optimizers, batches, val_batches[config.dataset])
    finally:
        batches.close()


def train(config: RunConfig, data: TrainingData, variant: Variant) -> float:
    """Train a model as train.py does, without its files; returns the validation loss.

    The run ends when it has read the tokens of `max_iters` whole batches, which takes more steps if a variant cuts the
    batches. The schedule follows the tokens.
    """
    objective, scaler = NextToken(config, data), torch.amp.GradScaler("cpu", enabled=False)
    tokens_per_batch = config.batch_size * config.block_size
    n_read, n_tokens = 0, config.max_iters * tokens_per_batch
    with run_of(config, data, variant) as run:
        average = average_of(run.model, variant, config.max_iters)
        while n_read < n_tokens:
            batch = cut(run.batches.next(), variant, n_read / n_tokens)
            set_rates(run.optimizers, config, schedule(n_read / tokens_per_batch, config))
            if variant.decay_share is not None:
                run.optimizers[0].param_groups[0]["weight_decay"] = config.muon_weight_decay * variant.decay_share(
                    n_read / n_tokens
                )
            forward_backward(run.model, config, objective, batch)
            clip_gradients(run.model, run.optimizers, scaler, config.grad_clip)
            for each in run.optimizers:
                each.step()
            run.model.zero_grad(set_to_none=True)
            n_read += batch[0].size
            if average is not None:
                average.update_parameters(run.model)
        return evaluate(cast(GPT, average.module) if average else run.model, run.val_batches, config)


def average_of(model: GPT, variant: Variant, max_iters: int) -> AveragedModel | None:
    """A copy of the model that follows its weights, with a mean lag of `average_share` of the run."""
    if variant.average_share is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / max(1, variant.average_share * max_iters)))


def cut(batch: list[np.ndarray], variant: Variant, done: float) -> list[np.ndarray]:
    """The first rows of a batch and the first tokens of its rows, as many as the variant uses at this point."""
    n_rows, length = batch[0].shape
    if variant.rows_share is not None:
        n_rows = max(1, round(n_rows * variant.rows_share(done)))
    if variant.length_share is not None:
        length = max(1, round(length * variant.length_share(done)))
    return [column[:n_rows, :length] for column in batch]


def table(losses: dict[tuple[str, int], list[float]]) -> list[str]:
    """A line for each variant and number of iterations: the mean of the seeds' losses, and their range."""
    lines = [f"{'variant':<21}{'iterations':>11}{'mean':>8}{'lowest':>8}{'highest':>8}{'seeds':>6}"]
    for (variant, iterations), found in losses.items():
        mean = f"{statistics.mean(found):8.3f}{min(found):8.3f}{max(found):8.3f}"
        lines.append(f"{variant:<21}{iterations:>11}{mean}{len(found):>6}")
    return lines


def main() -> None:
    options = parse_options(CompareOptions, __doc__)
    if options.json is not None:
        require_target("json", options.json)
    device, fast = choose_device(options.device), load_speedups(plain=False)
    speed_up = fast.speed_up_training if fast else None
    data = open_data(options.dataset, options.data_dir)
    losses: dict[tuple[str, int], list[float]] = {}
    for seed in options.seeds:
        for variant in options.variants:
            for max_iters in options.max_iters:
                given = {name: getattr(options, name) for name in SHARED} | {"max_iters": max_iters, "seed": seed}
                given |= {"compile": False, "gradient_accumulation_steps": 1, "learning_rate": LEARNING_RATE}
                given |= VARIANTS[variant].changes
                config = make_config(TrainOptions(**given), given, device, data.facts, speed_up=speed_up)
                started = time.perf_counter()
                loss = train(config, data, VARIANTS[variant])
                losses.setdefault((variant, max_iters), []).append(loss)
                seconds = time.perf_counter() - started
                print(f"{variant}, {max_iters} iterations, seed {seed}: {loss:.4f} ({seconds:.0f} s)", flush=True)
    print("\n".join(["", *table(losses)]))
    if options.json is not None:
        found = [{"variant": name, "iterations": n, "losses": each} for (name, n), each in losses.items()]
        with atomic_write(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": dataclasses.asdict(options), "losses": found}, file, indent=1)


if __name__ == "__main__":
    run_script(main)
