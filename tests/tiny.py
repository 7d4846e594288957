"""What the tests of training share: a tiny data set, a run in this process, and the comparison of two runs."""

from __future__ import annotations

import sys
from pathlib import Path

import train
from common.checkpoint import load_checkpoint
from training.metrics import read_metrics
from training.parallel import ALONE, World

sys.path.append(str(Path(train.__file__).parent / "testing_tools"))
from crash_test import differences, write_dataset

__all__ = ["OPTIONS", "StopAfter", "differences", "load_checkpoint", "losses", "prepare", "run"]

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


def run(data_dir: Path, out_dir: Path, resume: bool | Path = False, world: World = ALONE, **changes) -> int:
    """Train in this process; returns the exit status. A resumed run is given `changes` alone, as a person would."""
    folders = {"data_dir": str(data_dir), "out_dir": str(out_dir)}
    if resume is False:
        given = {**OPTIONS, **folders, **changes}
        return train.train(train.TrainConfig(**given), given, world)
    given = {**folders, **changes, "resume": "" if resume is True else str(resume)}
    return train.train(train.TrainConfig(**{"dataset": "text", "max_iters": 10, **given}), given, world)


class StopAfter:
    """Stands in for run.StopSignal: asks the run to stop after so many steps."""

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


def losses(path: Path) -> list[tuple]:
    """What a run's log says beside times and speeds."""
    return [
        tuple(record.get(key) for key in ("iter_num", "loss", "val_loss", "learning_rate", "grad_norm", "tokens_seen"))
        for record in read_metrics(path)
    ]
