"""prepare-all.py passes its options on to the scripts, and each prepare script has --tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.cli import options_of, parse_options

ROOT = Path(__file__).resolve().parent.parent

sys.path.append(str(ROOT / "testing_tools"))
from make_options_page import load_script, options_class  # noqa: E402

FOLDER_SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "data").glob("prepare-*.py"))
PREPARE_SCRIPTS = [*FOLDER_SCRIPTS, "prepare_with_extended_tokenizer.py"]
prepare_all = load_script("data/prepare-all.py")


def options_for(script: str, words: list[str]):
    """What a script makes of a command line."""
    return parse_options(options_class(script, load_script(script)), "", words)


def options_of_each(*words: str) -> dict:
    """Data set -> the options with which `prepare-all.py` runs its script, as that script reads them."""
    options = options_for("data/prepare-all.py", list(words))
    commands = {name: prepare_all.script_command(name, options) for name in prepare_all.SCRIPTS}
    return {
        name: options_for(Path(path).resolve().relative_to(ROOT).as_posix(), arguments)
        for name, (path, *arguments) in commands.items()
    }


def test_prepare_all_passes_its_options_on_to_every_script():
    words = ("--tokenizer", "tales", "--output_dir", "out", "--limit", "20", "--force")
    for name, options in options_of_each(*words).items():
        passed = (options.tokenizer, options.output_dir, options.limit, options.force)
        assert passed == ("tales", "out", 20, True), name


def test_without_options_prepare_all_leaves_the_defaults_of_the_scripts():
    for name, options in options_of_each().items():
        limit = 100_000 if name == "education" else None
        assert (options.tokenizer, options.output_dir, options.limit, options.force) == (None, None, limit, False), name


@pytest.mark.parametrize("script", PREPARE_SCRIPTS)
def test_every_prepare_script_has_a_tokenizer_except_the_one_for_published_ids(script):
    has_option = "tokenizer" in options_of(options_class(script, load_script(script)))
    assert has_option == (script != "data/prepare-fineweb.py")
