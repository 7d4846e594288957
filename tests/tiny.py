"""What the tests of training share: a tiny data set, a run in this process, and the comparison of two runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook

import train
from common.checkpoint import load_checkpoint
from common.speedups import load_speedups
from data.layouts.preferences import labelled_answers, preferences
from data.pipeline import Corpus, Dataset, PrepareOptions
from data.pipeline import prepare as prepare_files
from model import GPT
from training.metrics import read_metrics
from training.options import TrainOptions
from training.signals import StopSignal

sys.path.append(str(Path(train.__file__).parent / "testing_tools"))
from crash_test import differences
from random_data import write_dataset

__all__ = ["OPTIONS", "differences", "load_checkpoint", "losses", "prepare", "run", "same_as"]

OPTIONS = {
    "dataset": "text",
    **{"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "batch_size": 2, "max_iters": 10},
    **{"eval_interval": 4, "eval_iters": 2, "log_interval": 1},
    **{"dtype": "float32", "compile": False, "device": "cpu"},
}


def prepare(folder: Path, kind: str = "text", name: str | None = None, n_tokens: int = 600) -> Path:
    """A data set of random ids in `folder`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_dataset(folder, name or kind, kind, n_tokens, seed=1)
    return folder


def pair_records(n_pairs: int, seed: int = 0) -> list[dict]:
    """Preference records of random words in TRL's layout, with prompts and answers of different lengths."""
    rng = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(["red", "green", "blue", "hello", "you", "tree", "and"], int(rng.integers(1, most))))

    made = []
    for number in range(n_pairs):
        turns = [
            {"role": "user", "content": f"{words(6)} {number}"},
            {"role": "assistant", "content": words(4)},
            {"role": "user", "content": words(5)},
        ]
        made.append({"prompt": turns[: 3 - 2 * (number % 2)], "chosen": words(9), "rejected": f"no {words(9)}"})
    return made


def prepare_pairs(folder: Path, n_pairs: int, n_val: int = 10) -> list[list[dict]]:
    """A prepared data set "pairs" in `folder`; returns its pairs, those of validation last."""
    pairs = list(preferences(pair_records(n_pairs + n_val)))
    options = PrepareOptions(output_dir=str(folder), workers=1)
    prepare_files(Dataset("pairs", "preference", "made", "MIT"), options, Corpus(pairs[:n_pairs], pairs[n_pairs:]))
    return pairs


def label_records(n_labels: int, seed: int = 1) -> list[dict]:
    """Labelled answers in TRL's layout, all different, one good answer for two bad ones, each to its own prompt."""
    made = []
    for number, pair in enumerate(pair_records(n_labels, seed)):
        is_good = number % 3 == 0
        answer = pair["chosen" if is_good else "rejected"]
        made.append({"prompt": pair["prompt"], "completion": f"{answer} {number}", "label": is_good})
    return made


def prepare_labels(folder: Path, n_labels: int, n_val: int = 10) -> None:
    """A prepared data set "labels" in `folder`; the last answers of `label_records` are for validation."""
    labels = list(labelled_answers(label_records(n_labels + n_val)))
    options = PrepareOptions(output_dir=str(folder), workers=1)
    prepare_files(Dataset("labels", "label", "made", "MIT"), options, Corpus(labels[:n_labels], labels[n_labels:]))


def options_of_run(data_dir: Path, out_dir: Path, resume: bool | Path = False, **changes) -> tuple[TrainOptions, dict]:
    """A run's TrainOptions and the options given. A resumed run is given `changes` alone, as a user would."""
    folders = {"data_dir": str(data_dir), "out_dir": str(out_dir)}
    if resume is False:
        given = {**OPTIONS, **folders, **changes}
        return TrainOptions(**given), given
    given = {**folders, **changes, "resume": "" if resume is True else str(resume)}
    return TrainOptions(**{"dataset": "text", "max_iters": 10, **given}), given


def run(
    data_dir: Path,
    out_dir: Path,
    resume: bool | Path = False,
    *,
    stop_after: int | None = None,
    draw: Callable[..., object] = lambda *arguments: False,
    sample: Callable[..., None] = lambda *arguments: None,
    adjust: Callable[[train.Training], object] = lambda training: None,
    **changes,
) -> int:
    """Train in this process; returns the exit status.

    Without curves and samples, which take longer than the training here, unless they are passed. `stop_after` so many
    steps a signal asks the run to stop. `adjust` may change what has been built before training starts.
    """
    options, given = options_of_run(data_dir, out_dir, resume, **changes)
    fast = load_speedups(options.plain)
    planned = train.plan(options, given, fast)
    if planned is None:
        return 0
    training = train.build(planned, fast, draw, sample)
    adjust(training)
    return train.run_to_end(training, fast, StopSignal if stop_after is None else lambda: StopAfter(stop_after))


class StopAfter(StopSignal):
    """A signal that asks the run to stop after so many steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def __enter__(self) -> StopAfter:
        return self

    def __exit__(self, *exception) -> None:
        pass

    @property
    def number(self) -> int:
        self.steps -= 1
        return 0 if self.steps >= 0 else 2


@contextlib.contextmanager
def in_step(step: int | None, action: Callable) -> Iterator[None]:
    """Call `action(model, output)` in the forward pass of the given training step, counted from here; None: in each.

    It may raise, as a step may fail, or return another output.
    """
    count = 0

    def hook(module, arguments, output):
        nonlocal count
        if not (isinstance(module, GPT) and module.training and torch.is_grad_enabled()):
            return None
        count += 1
        return action(module, output) if step in (None, count) else None

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def fail(error: BaseException) -> Callable:
    """An action for `in_step` that raises."""

    def action(model, output):
        raise error

    return action


def failing_at(call: int, real: Callable) -> Callable:
    """`real`, except that the given call of it, counted from here, raises a RuntimeError."""
    calls = [0]

    def function(*arguments, **settings):
        calls[0] += 1
        if calls[0] == call:
            raise RuntimeError("a bug")
        return real(*arguments, **settings)

    return function


def losses(path: Path) -> list[tuple]:
    """What a run's log says beside times and speeds."""
    return [
        tuple(record.get(key) for key in ("iter_num", "loss", "val_loss", "learning_rate", "grad_norm", "tokens_seen"))
        for record in read_metrics(path)
    ]


def same_as(folder: Path, straight: Path) -> list[str]:
    """The differences between two runs that printed no samples."""
    folder.with_suffix(".txt").touch()
    return differences(folder, straight)
