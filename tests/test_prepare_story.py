"""The scripts for stories, DailyDialog and one's own files: what they make of every input, and their sentences."""

from __future__ import annotations

import gzip
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from setup_tokenizer import get_extended_tokenizer

ROOT = Path(__file__).resolve().parent.parent
OWN = "prepare_with_extended_tokenizer.py"
STORIES = "".join(f"Story {n} of â€œTomâ€ and {n * n} cats.\n<|endoftext|>\n" for n in range(40))


def dialogue(n: int) -> str:
    return f"Hi , I ' m number {n} . __eou__ Good.Let ’ s go ! __eou__\n"


@pytest.fixture
def inline(monkeypatch, tmp_path):
    """Runs a script within this process, in `tmp_path`, which is quicker."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run_inline(script: str, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / script))["main"]()

    return run_inline


def described(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def decoded(folder: Path, name: str, split: str) -> str:
    return get_extended_tokenizer().decode(np.fromfile(folder / f"{name}-{split}.bin", dtype="<u2").tolist())


def zipped(members: dict[str, bytes | str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("script", ["data/prepare-story.py", "data/prepare-dailydialog.py", OWN])
def test_a_script_runs_from_any_folder_and_a_fault_is_one_sentence(tmp_path, script):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, ROOT / script, "--input", "bad.txt", "--output_dir", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: bad.txt not found; check the path given to --input\n"


# --- stories ---


def test_one_file_of_stories_is_divided(tmp_path, inline, capsys):
    (tmp_path / "stories.txt").write_text(STORIES, "utf-8")
    inline("data/prepare-story.py", "--input", "stories.txt", "--output_dir", "out")
    assert "licence: CDLA-Sharing-1.0" in capsys.readouterr().out
    description = described(tmp_path / "out", "story")
    assert [description["splits"][split]["documents"] for split in ("train", "val")] == [38, 2]
    assert description["report"]["changed by fix_mojibake"] == 40
    text = decoded(tmp_path / "out", "story", "train")
    assert text.count("<|endoftext|>") == 38 and "of “Tom” and" in text
    inline("data/prepare-story.py", "--input", "stories.txt", "--output_dir", "out")
    assert "already prepared" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("a-valid.txt", "b-train.txt"), ("first.txt", "second.txt")])
def test_train_and_validation_files_are_told_apart(tmp_path, inline, names):
    train, val = sorted(names, key=lambda name: "val" in name)
    (tmp_path / train).write_text(STORIES, "utf-8")
    (tmp_path / val).write_text("One day.\n<|endoftext|>\nStory 3 of “Tom” and 9 cats.\n<|endoftext|>\n", "utf-8")
    inline("data/prepare-story.py", "--input", *names, "--output_dir", "out")
    assert decoded(tmp_path / "out", "story", "val").startswith("One day.<|endoftext|>")
    assert described(tmp_path / "out", "story")["report"]["train documents also in validation"] == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "bad.txt not found"),
        (b"", "is empty"),
        (b"\n<|endoftext|>\n \n<|endoftext|>\n", "empty"),
        (b"Once upon\xff a time.\n<|endoftext|>\n", "not UTF-8 at byte 9"),
    ],
)
def test_bad_stories_change_nothing(tmp_path, inline, content, sentence):
    (tmp_path / "good.txt").write_text(STORIES, "utf-8")
    inline("data/prepare-story.py", "--input", "good.txt", "--output_dir", "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("story*")}
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        inline("data/prepare-story.py", "--input", "bad.txt", "--output_dir", "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("story*")} == before
    assert not (tmp_path / "out" / ".story.tmp").exists()


# --- DailyDialog ---


def corpus_members() -> dict[str, str]:
    train = "".join(dialogue(n) for n in [*range(30), 3])
    return {
        "train": zipped({"train/dialogues_train.txt": train, "train/dialogues_act_train.txt": "1 2\n"}),
        "validation": zipped({"validation/dialogues_validation.txt": "".join(map(dialogue, [5, 100, 101]))}),
        "test": zipped({"test/dialogues_test.txt": dialogue(500)}),
    }


@pytest.mark.parametrize("shape", ["outer archive", "inner archives", "folder", "texts"])
def test_dailydialog_keeps_its_splits_in_every_shape(tmp_path, inline, capsys, shape):
    members = corpus_members()
    inputs = []
    if shape == "outer archive":
        inner = {f"ijcnlp_dailydialog/{name}.zip": content for name, content in members.items()}
        whole = {"ijcnlp_dailydialog/dialogues_text.txt": dialogue(999)}
        (tmp_path / "ijcnlp_dailydialog.zip").write_bytes(zipped({**inner, **whole}))
        inputs = ["ijcnlp_dailydialog.zip"]
    elif shape == "inner archives":
        for name in ("validation", "train"):
            (tmp_path / f"{name}.zip").write_bytes(members[name])
            inputs.append(f"{name}.zip")
    else:
        for content in members.values():
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                archive.extractall(tmp_path / "folder")
        inputs = ["folder"]
        if shape == "texts":
            inputs = ["folder/train/dialogues_train.txt", "folder/validation/dialogues_validation.txt"]
    inline("data/prepare-dailydialog.py", "--input", *inputs, "--output_dir", "out")
    assert "CC BY-NC-SA 4.0 (non-commercial use only)" in capsys.readouterr().out
    description = described(tmp_path / "out", "dailydialog")
    assert [description["splits"][split]["documents"] for split in ("train", "val")] == [29, 3]
    assert description["report"]["duplicates"] == 1
    assert description["report"]["train documents also in validation"] == 1
    assert description["non_commercial"] is True
    expected = "<|im_start|>user\nHi, I'm number 0.<|im_end|>\n<|im_start|>assistant\nGood. Let's go!<|im_end|>\n"
    assert decoded(tmp_path / "out", "dailydialog", "train").startswith(f"{expected}<|endoftext|>")


def test_a_folder_of_dailydialog_is_searched_as_other_folders_are(tmp_path, inline):
    members = corpus_members()
    folder = tmp_path / "folder"
    (folder / "packed.zip").mkdir(parents=True)  # a folder by such a name is no archive
    (folder / "TRAIN.ZIP").write_bytes(members["train"])
    (folder / "packed.zip" / "Dialogues_Validation.txt.gz").write_bytes(gzip.compress(dialogue(100).encode()))
    (folder / "._validation.zip").write_bytes(b"what another system leaves behind")
    (folder / "readme.txt").write_text("No dialogue.\n")
    inline("data/prepare-dailydialog.py", "--input", "folder", "--output_dir", "out")
    splits = described(tmp_path / "out", "dailydialog")["splits"]
    assert [splits[split]["documents"] for split in ("train", "val")] == [30, 1]


def test_a_folder_without_dailydialog_is_refused(tmp_path, inline):
    (tmp_path / "folder").mkdir()
    for name, sentence in (("a.csv", "contains no file of a known kind"), ("readme.txt", "contains no dialogues_")):
        (tmp_path / "folder" / name).write_text("No dialogue.\n")
        with pytest.raises(UserError, match=sentence):
            inline("data/prepare-dailydialog.py", "--input", "folder", "--output_dir", "out")


def test_one_split_of_dailydialog_alone_is_divided(tmp_path, inline):
    (tmp_path / "dialogues_validation.txt").write_text("".join(map(dialogue, range(20))), "utf-8")
    inline("data/prepare-dailydialog.py", "--input", "dialogues_validation.txt", "--output_dir", "out")
    splits = described(tmp_path / "out", "dailydialog")["splits"]
    assert [splits[split]["documents"] for split in ("train", "val")] == [19, 1]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.zip", zipped({"../dialogues_train.txt": dialogue(1)}), "leaves the folder"),
        ("x.zip", zipped({"readme.txt": "none"}), "contains no dialogues_"),
        ("x.zip", b"PK no archive", "not a complete zip archive"),
        ("x.txt", b"Hi \xff __eou__\n", "not UTF-8 at byte 3"),
        ("x.txt", b"Just some text.\n", "not a DailyDialog text"),
        ("x.txt", b"", "is empty"),
        ("x.csv", b"a,b", "unknown kind"),
    ],
)
def test_bad_dailydialog_input_is_one_sentence(tmp_path, inline, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        inline("data/prepare-dailydialog.py", "--input", name, "--output_dir", "out")
    assert not list(tmp_path.glob("out/dailydialog*"))


# --- one's own files ---


def test_own_text_is_shown_and_then_prepared(tmp_path, inline, capsys):
    (tmp_path / "notes.md").write_text("# Notes\n\nFirst thought.\n\nSecond thought, much longer.\n", "utf-8")
    inline(OWN, "--input", "notes.md", "--output_dir", "out", "--dry_run")
    output = capsys.readouterr().out
    assert "notes.md: text" in output and "First thought." in output
    assert not list(tmp_path.glob("out/mine*"))
    inline(OWN, "--input", "notes.md", "--output_dir", "out", "--val_fraction", "0.3")
    both = decoded(tmp_path / "out", "mine", "train") + decoded(tmp_path / "out", "mine", "val")
    assert both == "# Notes\n\nFirst thought.<|endoftext|>Second thought, much longer.<|endoftext|>"


def test_own_chat_is_prepared_and_encoded_again(tmp_path, inline, capsys):
    lines = [{"instruction": f"Say {n}", "context": "", "response": f"{n}!"} for n in range(20)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    arguments = ("--output_dir", "out", "--name", "talk", "--licence", "CC0")
    inline(OWN, "--input", "chat.jsonl", *arguments)
    output = capsys.readouterr().out
    assert "chat (dolly)" in output and "python train.py --dataset talk" in output
    first = described(tmp_path / "out", "talk")
    assert (first["format"], first["licence"]) == ("chat", "CC0")
    # <|im_start|> and <|im_end|> are 7 tokens each in the base encoding: of 4 control tokens 24 are saved.
    n_tokens = first["splits"]["train"]["tokens"]
    n_base = n_tokens + 19 * 24
    assert f"{n_base:,} with the base tokenizer, {n_tokens:,} with the extended one" in output
    assert f"{1 - n_tokens / n_base:.1%} fewer" in output
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("talk*")}
    inline(OWN, "--dataset", "all", "--output_dir", "out")
    assert "fewer" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("talk*")} == before


def test_encoding_all_again_passes_over_what_is_damaged_and_says_so(tmp_path, inline, capsys):
    for name in ("first", "second"):
        (tmp_path / "notes.txt").write_text("\n<|endoftext|>\n".join(f"{name} note {n}." for n in range(30)), "utf-8")
        inline(OWN, "--input", "notes.txt", "--name", name, "--output_dir", "out")
    for name in ("knowledge-topics.json", "knowledge-prompts.json", "chitchat-phrases.json", "tales-phrases.json"):
        shutil.copy(ROOT / "data" / name, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*") if path.is_file()}
    (tmp_path / "out" / "first-train.txt").write_text("no separator")
    (tmp_path / "out" / "second-train.bin").unlink()
    with pytest.raises(UserError, match=r"1 of 2 data sets were not encoded again; run: python .* --name first$"):
        inline(OWN, "--dataset", "all", "--output_dir", "out")
    assert "first not encoded again: " in capsys.readouterr().err
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*") if path.is_file()}
    assert after == before | {"first-train.txt": b"no separator"}, "the other one is made again from its text"


@pytest.mark.parametrize("choice", [["--limit", "2"], ["--max_document_tokens", "9"], ["--near_dedup"]])
@pytest.mark.parametrize("wanted", ["story", "all"])
def test_encoding_again_loses_no_document(tmp_path, inline, choice, wanted):
    (tmp_path / "stories.txt").write_text(STORIES, "utf-8")
    inline("data/prepare-story.py", "--input", "stories.txt", "--output_dir", "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("story*")}
    with pytest.raises(UserError, match="give them to the script that prepares the data set from its source"):
        inline(OWN, "--dataset", wanted, *choice, "--output_dir", "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("story*")} == before


@pytest.mark.parametrize(
    ("files", "arguments", "sentence"),
    [
        ({}, ["--input", "no.txt"], "no.txt not found"),
        ({"a.jsonl": '{"text": "x"}\n{"text": \n'}, ["--input", "a.jsonl"], "line 2"),
        ({"a.txt": "x", "b.jsonl": '{"messages": []}\n'}, ["--input", "a.txt", "b.jsonl"], "prepare them separately"),
        ({"a.txt": "x"}, ["--input", "a.txt", "--dataset", "story"], "cannot be combined"),
        ({}, ["--dataset", "story"], "run: python data/prepare-story.py$"),
        ({}, ["--dataset", "notes"], "run: python prepare_with_extended_tokenizer.py --input FILE --name notes$"),
        ({}, ["--dataset", "all"], "no prepared data set"),
        ({}, [], "nothing to prepare; name files with --input PATH, or prepared data with --dataset NAME"),
    ],
)
def test_own_input_that_cannot_be_used(tmp_path, inline, files, arguments, sentence):
    for name, content in files.items():
        (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(UserError, match=sentence):
        inline(OWN, *arguments, "--output_dir", "out")


def test_without_options_the_own_script_shows_its_help_and_prepares_nothing(tmp_path, inline, capsys):
    with pytest.raises(SystemExit) as stopped:
        inline(OWN)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ") and "--input PATH" in shown and "--dataset NAME" in shown
    assert list(tmp_path.iterdir()) == []
