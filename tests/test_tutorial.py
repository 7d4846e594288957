"""The tutorial's commands run in order and print what it shows; the names and pictures that it mentions exist.

The commands run unchanged in a copy of the project, except for STAND_INS, which replace what would take minutes or need
a download. Nothing else is left out, and a stand-in that no command needs is an error.
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
MAX_PICTURE_BYTES = 150_000
SHAPE = "--n_layer 3 --n_head 2 --n_embd 16 --block_size 64 --batch_size 2 --eval_interval 4 --log_interval 1"

# Patterns in the tutorial's commands, and what the test runs instead.
STAND_INS = {
    r"prepare-chitchat\.py --conversations 5000": "prepare-chitchat.py --conversations 300",
    r"prepare-chitchat\.py --tokenizer talk": "prepare-chitchat.py --tokenizer talk --conversations 300",
    r"python data/prepare-story\.py": "python data/prepare-story.py --input stories.txt",  # it downloads 2.2 GB
    r"python data/prepare-tales\.py": "python data/prepare-tales.py --stories 300",
    r"--vocab_size 1024\b": "--vocab_size 600",
    r"--preset tiny --block_size 512 --batch_size 8\b": SHAPE,
    r"--preset tiny\b": SHAPE,
    r"block_size=512\b": "block_size=128",
    r"train\.py --dataset story\b": f"train.py --dataset story {SHAPE}",
    r"--max_iters (1500|300|100)\b": "--max_iters 4",
    r"--max_iters 2000\b": "--max_iters 6",
    r"chat_eval\.py \S+": r"\g<0> --limit 1",  # a model that has not learned to end its replies takes minutes
    r"\b(chitchat|page|story|tales|own)(1500|300|100)\b": r"\g<1>4",
}
STORIES = "".join(
    f"Once upon a time there was a {animal} who had {n} shells. It gave one away and was glad.\n<|endoftext|>\n"
    for n in range(2, 32)
    for animal in ("cat", "dog", "hen", "fox")
)


class Block(NamedTuple):
    language: str
    text: str


def blocks() -> list[Block]:
    """The fenced blocks of the tutorial, in order."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", tutorial(), re.DOTALL | re.MULTILINE)]


def tutorial() -> str:
    return TUTORIAL.read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every command of the bash blocks."""
    return [line for block in blocks() if block.language == "bash" for line in lines_of(block)]


def lines_of(block: Block) -> list[str]:
    """The commands of a bash block; a backslash continues one on the next line."""
    return [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]


def small(text: str) -> str:
    """A command or a Python block after replacing what STAND_INS names.

    >>> small("python gen.py models/chitchat1500.pt")
    'python gen.py models/chitchat4.pt'
    """
    for pattern, replacement in STAND_INS.items():
        text = re.sub(pattern, replacement, text)
    return text


def masked(line: str) -> str:
    """A line of output in which all numbers, progress bars, spaces and precisions are the same.

    >>> masked("iter  10/900 [##......] loss 10.6217") == masked("iter 2/4 [####....] loss 9.9")
    True
    """
    line = re.sub(r"\[[#.]+\]", "[bar]", re.sub(r"\bb?float(16|32)\b", "precision", line))
    return " ".join(re.sub(r"-?\d[\d,.:e+-]*", "0", line).split())


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory, python) -> Path:
    return copy_of_the_project(tmp_path_factory.mktemp("tutorial"), python)


def copy_of_the_project(folder: Path, python: str) -> Path:
    """A copy of the project without data and models in `folder`, with this `python`."""
    rooms = {path.parent.name for path in ROOT.glob("*/*.py")} | {"docs"}
    suffixes = (".py", ".md", ".c", ".h")
    files = [path for room in rooms for path in (ROOT / room).rglob("*") if path.suffix in suffixes]
    files += [*ROOT.glob("*.py"), *ROOT.glob("data/*-phrases.json")]
    files += [*ROOT.glob("testing_tools/*.json"), *ROOT.glob("docs/*.jsonl")]
    for path in files:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "stories.txt").write_text(STORIES, encoding="utf-8")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(python)
    return folder


def run(sandbox: Path, command: list[str]) -> str:
    """The output of a command that runs without a terminal, on the CPU, with this Python as `python`."""
    env = {**os.environ, "PATH": f"{sandbox / 'bin'}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=sandbox, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="the tutorial's commands are written for bash")
def test_the_commands_run_in_order_and_print_what_is_shown(sandbox):
    output, python_so_far = "", ""
    for block in blocks():
        if block.language == "bash":
            output = "".join(run(sandbox, ["bash", "-euo", "pipefail", "-c", small(line)]) for line in lines_of(block))
        elif block.language == "python":  # one session: later blocks use the names of earlier ones
            python_so_far += small(block.text)
            output = run(sandbox, ["python", "-c", python_so_far])
        elif block.language == "text":
            printed = {masked(line) for line in output.splitlines()}
            missing = [line for line in block.text.splitlines() if line != "..." and masked(line) not in printed]
            assert not missing, f"not in the output: {missing}\n\n{output}"


@pytest.mark.slow
def test_sections_2_to_4_print_exactly_what_they_show(tmp_path, python):
    """With all conversations, on which the numbers and the row depend; above there are only a few of them."""
    full = copy_of_the_project(tmp_path, python)
    pairs = list(itertools.pairwise(blocks()))
    prepare, shown = next((first, second) for first, second in pairs if "prepare-chitchat.py" in first.text)
    printed = run(full, ["bash", "-euo", "pipefail", "-c", prepare.text])
    assert set(shown.text.splitlines()) <= set(printed.splitlines())
    session, before = "", ""
    for code, shown in pairs:
        if code.language == "python":
            session += code.text
            before += shown.text
            assert run(full, ["python", "-c", session]) == before


def test_every_stand_in_is_needed_and_every_training_run_is_small():
    text = "\n".join([*commands(), *(block.text for block in blocks() if block.language == "python")])
    unused = [pattern for pattern in STAND_INS if not re.search(pattern, text)]
    assert not unused
    for command in commands():
        if "train.py" in command:
            assert re.search(r"--max_iters [46]\b", small(command)), f"no stand-in makes this short: {command}"


def test_the_tokens_shown_are_those_of_the_tokenizer(sandbox):
    command = next(command for command in commands() if "tokenizer_demo.py" in command)
    shown = blocks()[[block.text.strip() for block in blocks()].index(command) + 1].text
    assert shown.strip()
    assert set(shown.splitlines()) <= set(run(sandbox, ["bash", "-c", command]).splitlines())


def defined_names(path: Path) -> set[str]:
    """The functions, classes and methods (Class.method) that a file defines."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def test_the_lines_of_code_that_it_points_to_exist():
    name = r"`[A-Za-z_][\w.]*`"
    found = re.findall(rf"((?:{name}(?:,\s|\sand\s))*{name})\sin\s`([\w/-]+\.py)`", tutorial())
    assert len(found) >= 15
    for names, file in found:
        missing = set(re.findall(r"`([\w.]+)`", names)) - defined_names(ROOT / file)
        assert not missing, f"{file} has no {missing}"


def test_its_scripts_and_pictures_exist():
    """Links are checked by test_readme.py, for every page."""
    for file in re.findall(r"`([\w/-]+\.py)`", tutorial()):
        assert (ROOT / file).is_file(), file
    shown = {link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", tutorial()) if link.endswith(".png")}
    assert shown
    for link in shown:
        assert (TUTORIAL.parent / link).stat().st_size < MAX_PICTURE_BYTES
    pictures = {path.name for path in (TUTORIAL.parent / "pictures").glob("tutorial-*.png")}
    assert pictures == {Path(link).name for link in shown}
