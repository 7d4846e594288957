"""A new user's way: prepare a small file of one's own, then run the printed commands as they are."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ANIMALS = ("cat", "hen", "fox")
SENTENCES = [f"On day {day} the {animal} found {day % 4 + 2} shells." for day in range(6) for animal in ANIMALS]
TALKS = [("Where is the key?", "Behind the blue door."), ("Who bakes the bread?", "Emil bakes it at night.")]
# The printed command with a model that trains in a second.
SMALL = "--n_layer 1 --n_head 1 --n_embd 16 --max_iters 2 --batch_size 2 --eval_iters 1 --device cpu --no-compile"


def write_input(folder: Path, kind: str) -> str:
    if kind == "text":
        (folder / "notes.txt").write_text("\n\n".join(SENTENCES), encoding="utf-8")
        return "notes.txt"
    lines = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in TALKS]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return "talks.jsonl"


@pytest.fixture
def run(tmp_path: Path, python: str) -> Callable[..., str]:
    """A function from a script and its arguments to what it prints."""

    def run(script: str, *arguments: str, answer: str = "") -> str:
        command = [python, str(ROOT / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, input=answer, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def printed_command(output: str) -> list[str]:
    """The words of the command that a script's last line ends with, from the script on."""
    words = shlex.split(output.strip().splitlines()[-1].partition("next: ")[2])
    assert words[0] == "python", output
    return words[1:]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_printed_commands_lead_from_a_small_file_to_a_reply(run, tmp_path, kind):
    source = write_input(tmp_path, kind)
    output = run("prepare_with_extended_tokenizer.py", "--input", source, "--output_dir", "data")
    assert "warning: validation holds" in output and "training: 100 iterations, " in output
    train, *arguments = printed_command(output)
    assert arguments == shlex.split("--dataset mine --preset tiny --max_iters 100 --data_dir data")
    output = run(train, *arguments, *SMALL.split())
    assert "note: mine-val.bin contains " in output and "iter 2/2 (epoch " in output
    gen, *arguments = printed_command(output)
    assert arguments == ["models/mine2.pt", *(["--chat"] if kind == "chat" else [])]
    assert run(gen, *arguments, "--max_tokens", "3", "--device", "cpu", answer="Hello!\n")
