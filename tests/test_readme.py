"""What the README says exists: its commands parse, its options are all there, its files are in the folder."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from gen import GenOptions
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def bash_lines() -> list[str]:
    """The command lines of the README's bash blocks, without comments."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    return [line.split("  #")[0].split(" # ")[0].strip() for line in lines if line.strip()]


def python_commands() -> list[list[str]]:
    """Every `python script ...` of the README, as words from the script on."""
    commands = []
    for line in bash_lines():
        for part in re.split(r"&&|\|", line):
            words = shlex.split(part, comments=True)
            if words and words[0].endswith("python") and len(words) > 1 and words[1].endswith(".py"):
                commands.append(words[1:])
    return commands


def table_rows(section: str) -> list[tuple]:
    """The rows of a section's first table: the names in backticks of the first cell, then the other cells as text."""
    lines = README.split(f"\n## {section}\n")[1].split("\n## ")[0].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|---"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 1 :])
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    return [(re.findall("`([^`]+)`", first), *others) for first, *others in rows]


@cache
def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_readme_has_commands():
    assert len(python_commands()) >= 15


@pytest.mark.parametrize("words", python_commands(), ids=" ".join)
def test_each_command_names_a_script_and_options_that_exist(words):
    script, *arguments = words
    assert (ROOT / script).is_file()
    options = [argument for argument in arguments if argument.startswith("--")]
    for option in options:
        assert re.search(rf"{re.escape(option)}\b", help_of(script)), f"{script} has no {option}"


@pytest.mark.parametrize("script", ["train.py", "gen.py"])
def test_each_option_of_a_script_is_in_the_readme(script):
    options = set(re.findall(r"(?<![\w-])--(?!no-)\w+", help_of(script))) - {"--help"}
    assert len(options) > 15
    missing = {option for option in options if f"`{option}" not in README}
    assert not missing


@pytest.mark.parametrize(("section", "options"), [("Training options", TrainConfig), ("Generating", GenOptions)])
def test_each_default_is_in_the_readme(section, options):
    fields = {field.name: field for field in dataclasses.fields(options) if field.metadata}
    rows = {names[0].removeprefix("--").partition("/")[0]: default for names, default, _ in table_rows(section)}
    assert rows.keys() == fields.keys()
    for name, field in fields.items():
        if field.default is None:  # chosen later, which the help says
            chosen = re.search(r" \(default: ([^)]*)\)", field.metadata["option"].help)
            assert rows[name] == (chosen[1] if chosen else ""), name
        elif field.default:
            assert rows[name] == f"`{field.default}`", name
        else:
            assert rows[name] == "", name


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(bash_lines()), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_file_overview_is_complete_and_names_nothing_else():
    listed = set()
    for paths, text in table_rows("File overview"):
        listed |= set(paths)
        if paths[0].endswith("/"):
            listed |= {paths[0] + name for name in re.findall(r"`([\w-]+\.\w+)`", text)}
    assert not {path for path in listed if not (ROOT / path).exists()}
    folders = (".", "data", "testing_tools", "training", "generation", "exchange", "common", "fast")
    found = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).glob("*.py")}
    assert not found - listed


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
