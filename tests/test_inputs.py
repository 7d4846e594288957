"""Which files --input names: folders with other things in them, clones of the hub, and code."""

from __future__ import annotations

import json
import re

import pytest

from common.cli import UserError
from data.readers.inputs import input_files, parse_suffixes
from data.readers.recognize import recognize_files
from data.readers.records import read_records
from prepare_with_extended_tokenizer import ExtendedOptions

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
CARD = "---\nlicense: mit\n---\n# A card\n"


@pytest.fixture
def folder(tmp_path):
    def write(**files):
        for name, content in files.items():
            path = tmp_path / name.replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


def names(files) -> list[str]:
    return [file.name for file in files]


def test_files_of_unknown_kind_are_left_out_and_printed(folder, capsys):
    path = folder(a__txt="Text", b__png=b"\x89PNG\0", c__py="x = 1\n", d__py="y = 2\n", e__txt="", Makefile="all:\n")
    assert names(input_files([path], has_suffix_option=True)) == ["a.txt"]
    printed = capsys.readouterr().out
    assert "4 files of unknown kind (2 .py, 1 .png, Makefile); read them as text with --suffix .py\n" in printed or (
        "4 files of unknown kind (2 .py, Makefile, 1 .png); read them as text with --suffix .py\n" in printed
    )
    assert "1 empty file (e.txt)" in printed
    with pytest.raises(UserError, match=r"4 files of unknown kind .* which --strict refuses"):
        input_files([path], strict=True)
    assert names(input_files([path], extra_suffixes=parse_suffixes(["py"]))) == ["a.txt", "c.py", "d.py"]


def test_a_folder_of_code_names_the_option_that_reads_it(folder):
    path = folder(init__py="", main__py="print()\n")
    with pytest.raises(
        UserError, match=r"but 2 files of unknown kind \(2 \.py\).*; read them as text with --suffix \.py"
    ):
        input_files([path], has_suffix_option=True)
    with pytest.raises(UserError, match=r"main\.py is of unknown kind.*--suffix \.py"):
        input_files([path / "main.py"], has_suffix_option=True)
    assert names(input_files([path / "main.py"], extra_suffixes=(".py",))) == ["main.py"]


def test_a_clone_of_the_hub_is_read_without_its_descriptions(folder, capsys):
    path = folder(
        README__md=CARD, dataset_info__json="{}", __gitattributes="*.parquet", LICENSE__txt="MIT", data__jsonl="{}\n"
    )
    assert names(input_files([path])) == ["data.jsonl"]
    printed = capsys.readouterr().out
    assert ".gitattributes (hidden)" in printed
    assert "LICENSE.txt, README.md, dataset_info.json (a description, not data)" in printed
    assert names(input_files([path / "README.md"])) == ["README.md"]  # named on its own, it is text


def test_a_readme_among_texts_is_text_unless_it_is_a_card(folder):
    path = folder(README__md="# Notes\n", a__txt="Text")
    assert names(input_files([path])) == ["README.md", "a.txt"]
    folder(README__md=CARD)
    assert names(input_files([path])) == ["a.txt"]


def test_json_that_is_not_data_does_not_refuse_the_rest_of_a_folder(folder, capsys):
    path = folder(a__jsonl=json.dumps(CHAT) + "\n", settings__json='{"tab": 4}')
    files = input_files([path])
    assert names(found.path for found in recognize_files(files, [str(path)])) == ["a.jsonl"]
    assert "left out: " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"settings\.json contains neither chat nor a text field"):
        recognize_files(files, [str(path)], strict=True)
    with pytest.raises(UserError, match=r"settings\.json contains neither"):
        recognize_files(files, [str(path / "a.jsonl"), str(path / "settings.json")])
    with pytest.raises(UserError, match=r"settings\.json contains neither"):
        recognize_files(input_files([path / "settings.json"]))
    folder(settings__json="[1]", a__jsonl='{"tab": 4}')
    with pytest.raises(UserError, match=rf"no file in {re.escape(str(path))} contains text or known conversations"):
        recognize_files(files, [str(path)])


@pytest.mark.parametrize("word", ["", ".", "a b", "json", ".parquet", "gz", "a/b"])
def test_suffixes_that_cannot_be_read_as_text(word):
    with pytest.raises(ValueError, match="--suffix"):
        ExtendedOptions(suffix=(word,))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps([CHAT] * 3),
        json.dumps([CHAT] * 3, indent=1),
        "\n".join([json.dumps(CHAT, indent=2)] * 3),
        "".join([json.dumps(CHAT, indent="\t")] * 3),
        "\n".join([json.dumps(CHAT)] * 3),
        f"[\n{json.dumps(CHAT)},\n{json.dumps(CHAT)},\n{json.dumps(CHAT)}\n]",
    ],
    ids=["list", "pretty list", "pretty objects", "joined objects", "lines", "a record a line in a list"],
)
def test_a_jsonl_file_may_hold_what_a_json_file_may(folder, suffix, content):
    path = folder(a="") / f"a{suffix}"
    path.write_text(content)
    assert list(read_records(path)) == [CHAT] * 3


def test_one_broken_line_is_still_named(folder):
    path = folder(a__jsonl=f'{{"messages": \n{json.dumps(CHAT)}\n') / "a.jsonl"
    with pytest.raises(UserError, match="line 1: broken JSON"):
        list(read_records(path))
