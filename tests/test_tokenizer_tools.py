"""The tools and the demo with a vocabulary of one's own; the oracle is Hugging Face's tokenizers with the same file."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from common.checkpoint import save_checkpoint
from data.tokenizer_training import TrainTokenizerOptions, train_tokenizer
from data.vocabularies import open_tokenizer
from exchange.tokenizer_files import tokenizer_json
from model import GPT, GPTConfig, padded_vocab_size
from setup_tokenizer import ENDOFTEXT, N_VOCAB, SPECIAL_TOKENS, render_chat
from tests.test_inspect import Page, inspect_model
from tests.test_testing_tools import compare

ROOT = Path(__file__).resolve().parent.parent
TEXT = "The cat sat on the mat, and the cafés of the town were open. Hello! How are you? Fine, thank you. " * 20
CHATS = [
    [{"role": "user", "content": f"Hello {n}, how are the cats?"}, {"role": "assistant", "content": f"Fine. 漢字 {n}"}]
    for n in range(5)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the tokenizers zebra (300 ids) and yak (270 ids), and the conversations chats.jsonl."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    for name, vocab_size, pattern in (("zebra", 300, "multilingual"), ("yak", 270, "gpt2")):
        settings = {"name": name, "vocab_size": vocab_size, "pattern": pattern, "output_dir": str(folder)}
        train_tokenizer(TrainTokenizerOptions(input=(str(folder / "text.txt"),), **settings))
    (folder / "zebra").mkdir()
    (folder / "zebra" / "tokenizer.json").write_bytes((folder / "zebra-tokenizer.json").read_bytes())
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in CHATS)
    (folder / "chats.jsonl").write_text(lines, "utf-8")
    return folder


def oracle(folder: Path, name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / f"{name}-tokenizer.json"))


def ids_of(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of a text in which the spellings of control tokens are control tokens."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def token(tokenizer: tokenizers.Tokenizer, id_: int) -> str:
    return tokenizer.decode([id_], skip_special_tokens=False)


# --- inspect_model.py ---


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_inspecting_a_model_shows_the_tokens_of_its_own_vocabulary(folder, tmp_path, capsys, kind):
    own, tokenizer = oracle(folder, "zebra"), open_tokenizer("zebra", folder)
    torch.manual_seed(0)
    sizes = {"block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**sizes, n_vocab=300, vocab_size=padded_vocab_size(300)))
    info = {"dataset": kind, "format": kind, "config": {}, "tokenizer": tokenizer.to_info()}
    save_checkpoint(tmp_path / "zebra9.pt", model, info)
    options = inspect_model.InspectOptions(
        str(tmp_path / "zebra9.pt"), "the cat and the town", max_tokens=0, top_k=1000, device="cpu"
    )
    _, page = inspect_model.inspect(options)

    prompt = f"{ENDOFTEXT}the cat and the town"
    if kind == "chat":
        prompt = render_chat([{"role": "user", "content": "the cat and the town"}], add_generation_prompt=True)
    shown = [text for _, _, text in Page(page.read_text("utf-8")).tokens]
    assert shown == [token(own, id_).replace("\n", "\\n") for id_ in ids_of(own, prompt)]

    rows = re.findall(r"^ *\d+ +(\d+) +\S+  ('.*'|\".*\")$", capsys.readouterr().out, re.MULTILINE)
    printed = {int(id_): ast.literal_eval(text) for id_, text in rows}
    assert sorted(printed) == list(range(300))
    expected = {id_: token(own, id_) for id_ in range(300)}
    complete = {id_: text for id_, text in expected.items() if text.isprintable() and "\ufffd" not in text}
    assert {*SPECIAL_TOKENS, " the"} <= set(complete.values())
    assert {id_: printed[id_] for id_ in complete} == complete


# --- tokenizer_demo.py ---


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_of_a_tokenizer", ROOT / "tokenizer_demo.py")
    module = sys.modules["demo_of_a_tokenizer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_shows_the_ids_and_tokens_of_a_vocabulary(folder, demo, monkeypatch, capsys):
    own = oracle(folder, "zebra")
    monkeypatch.chdir(folder)  # where the folder zebra contains its tokenizer.json
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["tokenizer_demo.py", "--text", "the cat sat", "--tokenizer", "zebra"])
    demo.main()
    text, controls, chat, forgery, saving = re.split(r"\n\d\. .*\n-+\n", capsys.readouterr().out)[1:]

    ids = ids_of(own, "the cat sat")
    assert len(ids) < len("the cat sat") and text.splitlines()[:2] == lines(own, ids)
    assert f"11 characters are {len(ids)} tokens" in text and "Decoded again: the cat sat" in text
    for spelling, id_ in zip(SPECIAL_TOKENS, (297, 298, 299), strict=True):
        assert re.search(rf"^{re.escape(spelling)} +{id_} ", controls, re.MULTILINE)
    assert "zebra" in controls.splitlines()[0]

    messages = [{"role": "user", "content": "Hi!"}]
    shown, numbers = lines(own, ids_of(own, render_chat(messages, add_generation_prompt=True)))
    assert f"As pieces: {shown}\nAs ids:    {numbers}\n" in chat
    assert "<|im_end|> (299)" in chat
    # What is typed is encoded without control tokens.
    content = json.loads((folder / "zebra-tokenizer.json").read_text("utf-8"))
    plain = tokenizers.Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))
    typed = ids_of(plain, "user\nHi<|im_end|>")
    shown, numbers = lines(own, [*ids_of(own, "<|im_start|>"), *typed, *ids_of(own, "<|im_end|>\n")])
    assert f"As pieces: {shown}\nAs ids:    {numbers}\n" in forgery and "id 299, occurs 1 time" in forgery

    for name, example in demo.EXAMPLES.items():
        row = next(line for line in saving.splitlines() if line.startswith(name))
        assert int(row.split()[-2]) == len(ids_of(own, render_chat(example)))


def lines(own: tokenizers.Tokenizer, ids: list[int]) -> list[str]:
    """Tokens in brackets, and their ids; of more than 24 ids, the middle ones are left out."""
    words = list(map(str, ids))
    words = words if len(words) <= 24 else [*words[:16], "...", *words[-7:]]
    return ["".join(f"[{token(own, id_)}]" for id_ in ids).replace("\n", "\\n"), " ".join(words)]


# --- compare_tokenizers.py ---


def test_the_comparison_prints_the_number_of_tokens_of_each_tokenizer(folder, monkeypatch, capsys):
    words = ("zebra", str(folder / "yak-tokenizer.json"))
    source = ["--input", str(folder / "chats.jsonl"), "--data_dir", str(folder)]
    monkeypatch.setattr(sys, "argv", ["compare_tokenizers.py", *source, "--repeats", "1", "--tokenizer", *words])
    compare.main()
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith("chats.jsonl: 5 conversations, 10 messages")

    extended = tokenizer_json(N_VOCAB)
    # GPT-2's own tokenizer has no control tokens for messages.
    base = {**extended, "added_tokens": [each for each in extended["added_tokens"] if each["content"] == ENDOFTEXT]}
    gpt2, chatml = (tokenizers.Tokenizer.from_str(json.dumps(content)) for content in (base, extended))
    theirs = {"GPT-2": gpt2, "extended": chatml, "extended, encode_chat": chatml, "historical wrapper": chatml}
    theirs |= {f"tokenizer {word}": oracle(folder, name) for word, name in zip(words, ("zebra", "yak"), strict=True)}
    texts = [render_chat(messages) + ENDOFTEXT for messages in CHATS]
    expected = {name: sum(len(ids_of(each, text)) for text in texts) for name, each in theirs.items()}
    assert len(set(expected.values())) == 4
    for (name, n_tokens), row in zip(expected.items(), rows[:-1], strict=True):
        saved = f"{1 - n_tokens / expected['GPT-2']:.1%}"
        assert row.startswith(f"{name} ") and row.removeprefix(name).split()[:2] == [f"{n_tokens:,}", saved]
