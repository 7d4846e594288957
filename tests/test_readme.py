"""What the README and the pages in docs/ say exists: commands, options, defaults, files, links and Python examples."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
MAX_README_LINES = 200
# Files that Python examples of the docs open: what the pages say about them, made small.
FILES_OF_EXAMPLES = {
    "dolly-subset.jsonl": '{"instruction": "Why?", "response": "' + "Because. " * 40 + '"}\n',
    "stories.txt": "<|endoftext|>".join(f"The cat saw {n} dogs and ran home.\n" for n in range(200)),
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fenced(page: Path, language: str) -> list[str]:
    """The text of a page's fenced blocks in a language; blocks inside a list may be indented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text_of(page), re.DOTALL | re.MULTILINE)
    return [block for _, block in found]


def command_lines(page: Path) -> list[str]:
    """The command lines of a page: its bash blocks, with continued lines joined, and `python ...` in its tables."""
    lines = [line for block in fenced(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    rows = [line for line in text_of(page).splitlines() if line.startswith("|")]
    cells = [code for row in rows for code in re.findall(r"`((?:python|torchrun|make) [^`]+)`", row)]
    return [re.split(r"\s#\s", line)[0].strip() for line in lines + cells if line.strip()]


def python_commands(page: Path) -> list[list[str]]:
    """Every `python script ...` and `torchrun ... script ...` of a page, as words from the script on."""
    commands = []
    for line in command_lines(page):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        for is_separator, part in itertools.groupby(lexer, key=lambda word: word[:1] in set("|&;<>()")):
            words = [] if is_separator else list(part)
            script = next((index for index, word in enumerate(words) if word.endswith(".py")), 0)
            if any(re.search(r"(^|/)(python|torchrun)$", word) for word in words[:script]):
                commands.append(words[script:])
    return commands


def table_rows(page: Path, section: str) -> list[list[str]]:
    """The cells of the rows of a section's first table."""
    lines = text_of(page).split(f"\n## {section}\n")[1].split("\n## ")[0].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|---"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 1 :])
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


@cache
def help_of(python: str, script: str) -> str:
    command = [python, *script.split(), "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


COMMANDS = {" ".join(words): words for page in PAGES for words in python_commands(page)}  # each command once


def test_the_readme_is_short_and_has_a_picture_and_commands():
    lines = text_of(README).splitlines()
    assert len(lines) <= MAX_README_LINES
    assert any(line.startswith("![") for line in lines[:20])
    assert len(python_commands(README)) >= 15


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_names_a_script_and_options_that_exist(python, command):
    script, *arguments = COMMANDS[command]
    assert (ROOT / script).is_file()
    options = [argument for argument in arguments if argument.startswith("--")]
    if script.endswith("benchmark.py") and arguments[:1] == ["serve"]:
        script += " serve"  # which has options of its own
    for option in options:
        assert re.search(rf"{re.escape(option)}\b", help_of(python, script)), f"{script} has no {option}"


@pytest.mark.parametrize("script", ["train.py", "gen.py", "evaluate.py", "export.py"])
def test_each_option_of_a_script_is_in_the_list_of_options(python, script):
    page = ROOT / "docs" / "options.md"
    options = set(re.findall(r"(?<![\w-])--(?!no-)\w+", help_of(python, script))) - {"--help"}
    assert len(options) >= 2
    assert not {option for option in options if f"`{option}" not in text_of(page)}


def test_make_targets_exist():
    makefile = text_of(ROOT / "Makefile")
    lines = [line for page in PAGES for line in command_lines(page)]
    targets = {target for line in lines for target in re.findall(r"^make (\w+)", line)}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_file_overview_is_complete_and_names_nothing_else():
    cells = table_rows(README, "File overview")
    listed = {name for first, _ in cells for name in re.findall(r"`([^`]+)`", first)}
    within = {f"data/{name}" for first, text in cells if first == "`data/`" for name in re.findall(r"`([^`]+)`", text)}
    scripts = {path.name for path in ROOT.glob("*.py")}
    rooms = {f"{path.parent.name}/" for path in ROOT.glob("[!.]*/*.py")}
    assert listed == scripts | rooms
    assert within == {f"data/{path.name}" for path in ROOT.glob("data/*-*.py")}


def test_every_tool_is_described():
    page = text_of(ROOT / "docs" / "evaluation.md")
    tools = [path for path in ROOT.glob("testing_tools/*.py") if "__main__" in text_of(path)]
    assert tools
    assert not [path.name for path in tools if f"testing_tools/{path.name}" not in page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_headings_and_files_of_each_page_exist(page):
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}
            assert heading in anchors, link
    for file in re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|c|h))`", text):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_examples_of_each_page_run(page, python, tmp_path):
    if page.name == "tutorial.md":
        pytest.skip("test_tutorial.py runs its blocks, in order")
    if page.name == "serving.md":
        pytest.skip("its example needs a server; tests/test_serve_api.py makes the same call")
    for name, content in FILES_OF_EXAMPLES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", text_of(page), re.DOTALL | re.MULTILINE)
    assert blocks or page != README
    for code, shown in blocks:
        if "datatrove" in code and importlib.util.find_spec("datatrove") is None:
            continue  # tests/test_engine_step.py makes the same call where datatrove is installed
        done = subprocess.run(
            [python, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if shown:
            assert done.stdout == shown
        check_shown_results(code)


def check_shown_results(code: str) -> None:
    """Compare each expression of an example with the comment in the line after it, where that is a list."""
    scope: dict = {}
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        source = ast.unparse(statement)
        below = lines[statement.end_lineno] if statement.end_lineno < len(lines) else ""
        if isinstance(statement, ast.Expr) and below.startswith("# ["):
            assert f"# {eval(source, scope)}" == below
        elif below.startswith("# ["):
            raise AssertionError(f"not an expression: {source}")
        elif re.search(r"^# \[", code, re.MULTILINE):  # only examples that show results are run here again
            exec(source, scope)
