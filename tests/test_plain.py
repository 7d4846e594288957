"""Without fast/, and with --plain, every script works and computes the same."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from common.checkpoint import load_checkpoint
from tests.forked_python import CAN_FORK, forked_python
from training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
STORIES = "".join(
    f"Once upon a time there was a {animal} who had {n} shells.\n<|endoftext|>\n"
    for n in range(2, 12)
    for animal in ("cat", "dog", "hen", "fox")
)
TRAIN = (
    "train.py --n_layer 1 --n_head 1 --n_embd 8 --block_size 16 --batch_size 2 --max_iters 4 "
    "--eval_interval 4 --eval_iters 1 --log_interval 1 --device cpu --dtype float32 --no-compile"
)
GEN = "gen.py models/story4.pt --prompt Once --max_tokens 5 --seed 1 --device cpu --dtype float32"
EVALUATE = "evaluate.py models/story4.pt --limit 100 --device cpu --dtype float32"

# Each script also says whether it imported the package fast.
PRELUDE = """
import atexit, sys
import matplotlib.pyplot, numpy, tiktoken, torch, torch._dynamo
torch.set_num_threads(1)
atexit.register(lambda: print("fast" in sys.modules))
"""


class Result(NamedTuple):
    status: int
    text: str
    imported_fast: bool


class Runs(NamedTuple):
    """What the commands printed, and the folders in which they left their files."""

    results: dict[str, Result]
    hidden: Path
    plain: Path
    fast: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """All commands: in a copy of the project without fast/, then in the project itself with --plain and without."""
    if not CAN_FORK:
        pytest.skip("needs Linux")
    hidden, plain, fast = (tmp_path_factory.mktemp(name) for name in ("hidden", "plain", "fast"))
    for room in {path.parent for path in ROOT.glob("*/*.py")} - {ROOT / "fast", ROOT / "tests"}:
        for path in [*ROOT.glob("*.py"), *room.rglob("*.py")]:
            target = hidden / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (hidden / "stories.txt").write_text(STORIES, encoding="utf-8")
    data = f"--data_dir {hidden / 'data'}"
    commands = {
        "prepare": (hidden, hidden, "data/prepare-story.py --input stories.txt --workers 1"),
        "train": (hidden, hidden, TRAIN),
        "gen": (hidden, hidden, GEN),
        "chat": (hidden, hidden, "gen.py models/story4.pt --chat --prompt Hi --max_tokens 3 --device cpu"),
        "evaluate": (hidden, hidden, EVALUATE),
        "export": (hidden, hidden, "export.py models/story4.pt exported"),
        "resume": (hidden, hidden, "train.py --resume models/story4.pt --max_iters 6"),
        "train --plain": (ROOT, plain, f"{TRAIN} {data} --plain"),
        "gen --plain": (ROOT, plain, f"{GEN} --plain"),
        "evaluate --plain": (ROOT, plain, f"{EVALUATE} {data} --plain"),
        "train fast": (ROOT, fast, f"{TRAIN} {data}"),
    }
    # With OMP_WAIT_POLICY no script starts itself again because the machine is busy.
    environment = {"CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg", "PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    results = {}
    with forked_python(tmp_path_factory.mktemp("python"), PRELUDE, **environment) as python:
        for name, (folder, cwd, command) in commands.items():
            script, *arguments = command.split()
            done = subprocess.run(
                [python, str(folder / script), *arguments],
                cwd=cwd,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            text, _, imported_fast = done.stdout.rstrip().rpartition("\n")
            results[name] = Result(done.returncode, text, imported_fast == "True")
    return Runs(results, hidden, plain, fast)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "models" / "story4.pt")["model"]


def losses(folder: Path) -> list[float]:
    records = read_metrics(folder / "models" / "story4.jsonl")
    return [record[key] for record in records for key in ("loss", "val_loss") if key in record]


def test_every_script_works_without_the_folder_fast(runs):
    for name, (status, text, imported_fast) in runs.results.items():
        assert status == 0, f"{name}: {text}"
        assert imported_fast == (name == "train fast"), name
    results = {name: result.text for name, result in runs.results.items()}
    assert "iter 4: validation loss" in results["train"] and "resume: " in results["resume"]
    assert results["gen"].splitlines()[-1].startswith("Once") and "not on chat data" in results["chat"]
    assert (runs.hidden / "models" / "story6.pt").is_file() and (runs.hidden / "exported" / "config.json").is_file()


def test_plain_trains_the_same_weights_as_without_the_folder(runs):
    plain, hidden = weights(runs.plain), weights(runs.hidden)
    assert plain.keys() == hidden.keys() and all(torch.equal(plain[key], hidden[key]) for key in plain)


@pytest.mark.parametrize("script", ["gen", "evaluate"])
def test_plain_prints_the_same_as_without_the_folder(runs, script):
    plain, hidden = (re.sub(r" +[\d,]+$", "", runs.results[name].text) for name in (f"{script} --plain", script))
    assert plain == hidden, "up to the last number, which is evaluate.py's speed"


def test_fast_training_has_the_losses_of_plain_training(runs):
    assert losses(runs.fast) == pytest.approx(losses(runs.plain), rel=1e-5) and len(losses(runs.plain)) >= 5
    assert weights(runs.fast).keys() == weights(runs.plain).keys()
