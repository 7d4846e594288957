"""Train small models with several optimizers, each with several seeds, and compare their validation losses.

    python testing_tools/compare_optimizers.py --dataset story --variants adamw muon --max_iters 300 150
    python testing_tools/compare_optimizers.py --n_layer 2 --n_embd 64 --seeds 1 2 3 --json losses.json

The settings are train.py's defaults for each optimizer except for what the variant changes (VARIANTS below). Runs that
have the same seed and differ only in the optimizer start from the same weights and see the same rows. Prints each run,
then the mean and the range over the seeds. docs/experiments/optimizer.md has results.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
from training.muon import Muon
from training.objectives import NextToken
from training.optimizers import make_optimizers, set_rates
from training.options import TrainOptions
from training.schedule import schedule
from training.step import clip_gradients, evaluate, forward_backward

SAFETY = 1.01  # rounding errors must not make a singular value larger than this
CUSHION = 0.024  # the least ratio between the ends of the interval that a polynomial is fitted to
SHARED = ("dataset", "data_dir", "n_layer", "n_head", "n_embd", "block_size", "batch_size", "eval_iters")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run trains with."""

    model: GPT
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    val_batches: list


class PolarMuon(Muon):
    """Muon with a different polynomial in each iteration, the best one for the singular values at that point.

    "The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon Algorithm" (Amsel et al. 2025).
    """

    def orthogonalised(self, matrices: Tensor, group: dict) -> Tensor:
        is_tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if is_tall else matrices
        x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=group["eps"]) * SAFETY)
        for a, b, c in polar_coefficients(group["ns_steps"]):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return x.mT if is_tall else x


class CautiousMuon(Muon):
    """Muon whose decay skips the weights that the update makes larger ("Cautious Weight Decay", Chen et al. 2025)."""

    def apply(self, weights: list[Tensor], updates: Tensor, group: dict) -> None:
        for weight, update in zip(weights, updates, strict=True):
            shrinks = (update * weight > 0).to(weight.dtype)
            weight.sub_(weight * shrinks, alpha=group["lr"] * group["weight_decay"])
        super().apply(weights, updates, {**group, "weight_decay": 0.0})


# name -> (what it changes in train.py's options, the optimizer of the blocks' matrices)
VARIANTS: dict[str, tuple[dict[str, Any], type[Muon] | None]] = {
    "adamw": ({"optimizer": "adamw"}, None),
    "adamw, 6e-3": ({"optimizer": "adamw", "learning_rate": 6e-3}, None),
    "adamw, 1.5e-3": ({"optimizer": "adamw", "learning_rate": 1.5e-3}, None),
    "muon": ({}, Muon),
    "muon, 6e-3": ({"learning_rate": 6e-3}, Muon),  # of the embeddings, and with them of the tied head
    "muon, 0.04": ({"muon_learning_rate": 0.04}, Muon),
    "polar": ({}, PolarMuon),
    "decay": ({"muon_weight_decay": 0.1}, Muon),
    "cautious": ({"muon_weight_decay": 0.1}, CautiousMuon),
}


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """The data, the model, and what to compare."""

    dataset: str = option("story", "prepared data set", group="data", metavar="NAME")
    data_dir: str = option("data", "folder of the prepared data", group="data", metavar="DIR")
    variants: tuple[str, ...] = option(
        tuple(VARIANTS), "optimizers to compare", choices=tuple(VARIANTS), nargs="+", metavar="NAME"
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


def polar_coefficients(steps: int, lowest: float = 1e-3) -> list[tuple[float, float, float]]:
    """The a, b, c of each iteration's a x + b x^3 + c x^5, for singular values from `lowest` to 1.

    Each polynomial is the best for the interval in which the one before leaves the values. In all but the last the
    argument is divided by `SAFETY`, so that rounding takes no value out of its interval.
    """
    low, high, found = lowest, 1.0, []
    for step in range(1, steps + 1):
        # Fitted to the smallest values, the first polynomials would amplify them so much that larger ones fall below.
        a, b, c = best_quintic(max(low, CUSHION * high), high)
        at_low, at_high = (a * x + b * x**3 + c * x**5 for x in (low, high))
        scale = 2 / (at_low + at_high)  # so that the interval has its centre at 1
        low, high = scale * at_low, scale * at_high
        safety = SAFETY if step < steps else 1.0
        found.append((scale * a / safety, scale * b / safety**3, scale * c / safety**5))
    return found


def best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The a, b, c with the smallest maximum of |1 - (a x + b x^3 + c x^5)| for x from `low` to `high`, by Remez.

    The best polynomial is alternately below and above 1 by the same error, at the ends and at its two extrema.
    """
    a = b = c = 0.0
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(100):
        x = np.array([low, *inner, high])
        system = np.stack([x, x**3, x**5, np.array([1, -1, 1, -1])], axis=1)
        a, b, c, _error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return float(a), float(b), float(c)


@contextlib.contextmanager
def run_of(config: RunConfig, data: TrainingData, optimizer: type[Muon] | None) -> Iterator[Run]:
    """A new model, its optimizers and its batches."""
    fast = load_speedups(plain=False)
    seed_everything(config.seed)
    model = make_model(model_config({name: getattr(config, name) for name in SHAPE}))
    if fast:
        fast.speed_up_training(model)
    model = move_model(model, config.device).train()
    optimizers = make_optimizers(model, config)
    if optimizer is not None:
        (group,) = optimizers[0].param_groups
        optimizers[0] = optimizer(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
    rows, val_batches = NextToken(config, data).make_rows()
    batches = Batches(rows, config.batch_size)
    try:
        yield Run(model, optimizers, batches, val_batches[config.dataset])
    finally:
        batches.close()


def train(config: RunConfig, data: TrainingData, optimizer: type[Muon] | None) -> float:
    """Train a model as train.py does, without its files; returns the validation loss."""
    objective, scaler = NextToken(config, data), torch.amp.GradScaler("cpu", enabled=False)
    with run_of(config, data, optimizer) as run:
        for iteration in range(config.max_iters):
            set_rates(run.optimizers, config, schedule(iteration, config))
            forward_backward(run.model, config, objective, run.batches.next())
            clip_gradients(run.model, run.optimizers, scaler, config.grad_clip)
            for each in run.optimizers:
                each.step()
            run.model.zero_grad(set_to_none=True)
        return evaluate(run.model, run.val_batches, config)


def table(losses: dict[tuple[str, int], list[float]]) -> list[str]:
    """A line for each variant and number of iterations: the mean of the seeds' losses, and their range."""
    lines = [f"{'variant':<16}{'iterations':>11}{'mean':>8}{'lowest':>8}{'highest':>8}{'seeds':>6}"]
    for (variant, iterations), found in losses.items():
        mean = f"{statistics.mean(found):8.3f}{min(found):8.3f}{max(found):8.3f}"
        lines.append(f"{variant:<16}{iterations:>11}{mean}{len(found):>6}")
    return lines


def main() -> None:
    options = parse_options(CompareOptions, __doc__)
    if options.json is not None:
        require_target("json", options.json)
    device = choose_device(options.device)
    data = open_data(options.dataset, options.data_dir)
    losses: dict[tuple[str, int], list[float]] = {}
    for seed in options.seeds:
        for variant in options.variants:
            changes, optimizer = VARIANTS[variant]
            for max_iters in options.max_iters:
                given = {name: getattr(options, name) for name in SHARED} | {"max_iters": max_iters, "seed": seed}
                given |= {"compile": False, "gradient_accumulation_steps": 1, **changes}
                config = make_config(TrainOptions(**given), given, device, data.facts)
                started = time.perf_counter()
                loss = train(config, data, optimizer)
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
