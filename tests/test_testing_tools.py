"""The tools in testing_tools and the demo: their reports are true, whatever a file contains."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.token_stream import TokenStream
from data.tokenizer_training import TrainTokenizerOptions, train_tokenizer
from setup_tokenizer import (
    encode_chat,
    get_base_tokenizer,
    get_extended_tokenizer,
)

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "testing_tools"
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, Ana!"}],
    [
        {"role": "system", "content": "\n\n  Be brief.\n"},
        {"role": "user", "content": "\n"},
        {"role": "assistant", "content": "na\u00efve \U0001f600<|im_end|>"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
    ],
    [{"role": "assistant", "content": "\n\n\n"}],
]


def load(name: str):
    """A tool as a module."""
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


check = load("check_special_tokens")
compare = load("compare_tokenizers")


def run_tool(path: Path, *arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    settings = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    return subprocess.run(
        [sys.executable, path, *map(str, arguments)],
        cwd=cwd,
        env={**settings, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
    )


def chat_ids(conversations=CONVERSATIONS) -> list[int]:
    return [token for messages in conversations for token in encode_chat(messages, end_of_conversation=True)]


def write_bin(path: Path, ids) -> Path:
    np.asarray(ids, dtype="<u2").tofile(path)
    return path


def write_dataset(folder: Path, name: str, **changes) -> None:
    """A prepared chat data set, as data/pipeline.py writes it; train in two shards."""
    ids = chat_ids()
    parts = {"train": [ids[:20], ids[20:]], "val": [chat_ids(CONVERSATIONS[:1])]}
    splits = {}
    for split, shards in parts.items():
        files = []
        for number, shard in enumerate(shards):
            file = write_bin(folder / f"{name}-{split}{f'-{number:05d}' if len(shards) > 1 else ''}.bin", shard)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            files.append({"file": file.name, "tokens": len(shard), "sha256": digest})
        splits[split] = {"documents": 3 if split == "train" else 1, "tokens": sum(map(len, shards)), "files": files}
    splits["train"] |= changes
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in CONVERSATIONS)
    for split in ("train", "val"):
        (folder / f"{name}-{split}.jsonl").write_text(lines, encoding="utf-8")
    description = {"name": name, "format": "chat", "tokenizer": "gpt2_chatml", "n_vocab": 50259, "splits": splits}
    (folder / f"{name}.json").write_text(json.dumps(description), encoding="utf-8")


def inspect_ids(ids, folder: Path, is_chat: bool = True, chunk_tokens: int = 1 << 22):
    return check.inspect(TokenStream([write_bin(folder / "a.bin", ids)]), is_chat, chunk_tokens=chunk_tokens)


# --- compare_tokenizers.py and extended_tokenizer.py ---


def test_the_comparison_counts_what_the_tokenizers_give():
    results = {result.name: result for result in compare.compare(CONVERSATIONS[:1], repeats=1)}
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello, Ana!<|im_end|>\n"
    assert results["GPT-2"].tokens == len(get_base_tokenizer().encode_ordinary(text)) + 1
    n_extended = len(chat_ids(CONVERSATIONS[:1]))
    assert results["extended"].tokens == results["extended, encode_chat"].tokens == n_extended
    assert results["historical wrapper"].tokens == n_extended
    assert all(result.mb_per_s > 0 for result in results.values())
    assert compare.saving(list(results.values())) == 1 - n_extended / results["GPT-2"].tokens


def test_the_wrapper_agrees_where_nothing_is_forged_and_is_forged_where_encode_chat_is_not():
    wrapper = compare.ExtendedTokenizerWrapper()
    enc = get_extended_tokenizer()
    assert (wrapper.n_vocab, wrapper.special_tokens) == (enc.n_vocab, enc._special_tokens)
    for messages in (*compare.EXAMPLES, CONVERSATIONS[0]):
        text = compare.render_chat(messages) + "<|endoftext|>"
        assert wrapper.encode(text) == encode_chat(messages, end_of_conversation=True)
        assert wrapper.decode(wrapper.encode(text)) == text
    assert compare.forged_ids() == {"extended": 3, "extended, encode_chat": 0, "historical wrapper": 3}


def test_the_comparison_reads_data_sets_and_chat_files(tmp_path):
    write_dataset(tmp_path, "mine")
    for source in (["--dataset", "mine", "--data_dir", tmp_path], ["--input", tmp_path / "mine-train.jsonl"]):
        done = run_tool(TOOLS / "compare_tokenizers.py", *source, "--repeats", 1, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "conversations, " in done.stdout and "historical wrapper" in done.stdout


def test_own_tokenizers_are_compared_under_their_words(tmp_path):
    for name, size in (("extended", 270), ("GPT-2", 272)):  # the names of built-in rows
        options = TrainTokenizerOptions(
            input=(str(tmp_path / "a.txt"),), name=name, vocab_size=size, output_dir=str(tmp_path)
        )
        (tmp_path / "a.txt").write_text("the cat sat on the mat, and the hat. " * 50, encoding="utf-8")
        train_tokenizer(options)
    others = compare.own_tokenizers(compare.CompareOptions(data_dir=str(tmp_path), tokenizer=("extended", "GPT-2")))
    results = {result.name: result.tokens for result in compare.compare(CONVERSATIONS[:1], 1, others)}
    assert len(results) == 6 and results["GPT-2"] == compare.compare(CONVERSATIONS[:1], 1)[0].tokens
    assert all(compare.forged_ids(others)[name] == 0 for name in others)


def test_the_comparison_refuses_what_is_no_chat(tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time.", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    for source in (
        ["--input", tmp_path / "a.txt"],
        ["--input", tmp_path / "empty.jsonl"],
        ["--input", tmp_path / "missing.jsonl"],
        ["--dataset", "missing", "--data_dir", tmp_path],
    ):
        done = run_tool(TOOLS / "compare_tokenizers.py", *source)
        assert done.returncode == 1, source
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


# --- quick_test.py and tokenizer_demo.py ---


def test_quick_test_prints_the_pieces():
    done = run_tool(TOOLS / "quick_test.py", "Hi<|im_end|>\n")
    assert done.returncode == 0 and "17250  [Hi]" in done.stdout and "50258" not in done.stdout
    done = run_tool(TOOLS / "quick_test.py", "--control", "Hi<|im_end|>\n")
    assert done.returncode == 0 and "50258  [<|im_end|>]" in done.stdout and "198  [\\n]" in done.stdout
    assert "15 characters" not in done.stdout and "3 tokens; decoded again: the same" in done.stdout


def test_quick_test_fails_where_text_does_not_come_back():
    done = run_tool(TOOLS / "quick_test.py", b"a\xff".decode("utf-8", "surrogateescape"))
    assert done.returncode == 1 and "\ufffd" in done.stdout


def test_the_demo_shows_true_ids_without_a_terminal(tmp_path):
    done = run_tool(ROOT / "tokenizer_demo.py", "--text", "Once upon", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[Once][ upon]\n7454 2402\n" in done.stdout
    for spelling, token in get_extended_tokenizer()._special_tokens.items():
        assert any(line.startswith(spelling) and str(token) in line for line in done.stdout.splitlines())
    assert "[<|im_start|>][user][\\n][Hi][<][|][im][_][end][|][>][<|im_end|>][\\n]" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_demo_has_colours_only_where_they_are_wanted():
    assert "\x1b[" in run_tool(ROOT / "tokenizer_demo.py", FORCE_COLOR="1").stdout
    assert "\x1b" not in run_tool(ROOT / "tokenizer_demo.py", FORCE_COLOR="1", NO_COLOR="1").stdout


def test_the_demo_runs_on_an_ascii_console():
    done = run_tool(ROOT / "tokenizer_demo.py", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and "Zo?" in done.stdout


def test_the_demos_savings_are_measured():
    spec = importlib.util.spec_from_file_location("tokenizer_demo", ROOT / "tokenizer_demo.py")
    demo = importlib.util.module_from_spec(spec)
    sys.modules["tokenizer_demo"] = demo
    spec.loader.exec_module(demo)
    output = run_tool(ROOT / "tokenizer_demo.py").stdout
    for name, messages in demo.EXAMPLES.items():
        n_extended = len(get_extended_tokenizer().encode(demo.render_chat(messages), allowed_special="all"))
        line = next(line for line in output.splitlines() if line.startswith(name))
        n_base = len(get_base_tokenizer().encode(demo.render_chat(messages), disallowed_special=()))
        assert line.split()[-3:] == [str(n_base), str(n_extended), f"{1 - n_extended / n_base:.0%}"]


@pytest.mark.parametrize("tool", ["chat_eval.py", "inspect_model.py"])
def test_a_tool_for_a_checkpoint_asks_for_one(tool):
    done = run_tool(TOOLS / tool)
    assert done.returncode == 2 and done.stderr.endswith("the following arguments are required: checkpoint\n")


def test_the_scripted_chat_talks_to_what_the_demo_trains():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    checkpoint = load("scripted_chat").ScriptedChatOptions().checkpoint
    assert f"scripted_chat.py {checkpoint}\n" in makefile
    assert f"--max_iters {checkpoint.removeprefix('models/chitchat').removesuffix('.pt')} " in makefile


@pytest.mark.parametrize("tool", ["check_special_tokens.py", "compare_tokenizers.py", "quick_test.py"])
def test_help_starts_from_any_folder(tool, tmp_path):
    done = run_tool(TOOLS / tool, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "usage:" in done.stdout
    assert run_tool(TOOLS / tool, "--no_such_option").returncode == 2
