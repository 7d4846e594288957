"""How documents are divided into train and validation: by tokens, whatever the number and sizes of the documents."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import UserError
from data.dataset import read_info
from data.documents import read_prepared
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare
from data.splitting import choose_by_size, cut_conversation, cut_text, is_fair, split_by_opening

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["quiet", "bread", "north", "river", "letter", "cloud", "seven", "garden", "lamp", "stone", "copper"]


def paragraphs(n_characters: int, seed: int = 0, gap: str = "\n\n") -> str:
    """A text of about so many characters: sentences of eight words, five to a paragraph."""
    rng = np.random.default_rng(seed)
    sentences = [" ".join(rng.choice(WORDS, 8)).capitalize() + "." for _ in range(n_characters // 50 + 1)]
    blocks = [" ".join(sentences[start : start + 5]) for start in range(0, len(sentences), 5)]
    return gap.join(blocks)


def divided(folder: Path, documents: list, val_fraction: float = 0.05, **changes) -> dict[str, list]:
    """The documents of each split, prepared."""
    kind = "text" if isinstance(documents[0], str) else "chat"
    options = PrepareOptions(output_dir=str(folder), workers=1, val_fraction=val_fraction, force=True, **changes)
    info = prepare(Dataset("mine", kind, "a test", "MIT"), options, Corpus(documents))
    return {split: list(read_prepared(folder, info, split)) for split in ("train", "val")}


def stories(count: int) -> list[str]:
    return [paragraphs(2_000, n) for n in range(count)]


def share(folder: Path) -> float:
    splits = read_info(folder, "mine").splits
    return splits["val"].tokens / (splits["val"].tokens + splits["train"].tokens)


SHAPES = {
    "one text of 1 kB": [1_000],
    "one text of 1 MB": [1_000_000],
    "two texts": [70_000, 70_000],
    "a book and a note": [400_000, 900],
    "three chapters": [50_000, 60_000, 70_000],
    "ten texts": [3_000 + 700 * n for n in range(10)],
    "one huge and many tiny": [2_000_000, *[60 + n % 90 for n in range(2_000)]],
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_validation_holds_its_share_of_the_tokens(tmp_path, capsys, shape, seed):
    texts = [paragraphs(size, index) for index, size in enumerate(SHAPES[shape])]
    found = divided(tmp_path, texts, seed=seed)
    assert 0.025 <= share(tmp_path) <= 0.1
    assert "warning" not in capsys.readouterr().out
    words = sorted(" ".join(found["train"] + found["val"]).split())
    assert words == sorted(" ".join(dict.fromkeys(texts)).split()), "no word is lost, cut or doubled"
    whole = set(texts)
    cut = [text for text in found["train"] + found["val"] if text not in whole]
    assert len(cut) in (0, 2), "at most one document is cut"
    report = read_info(tmp_path, "mine").report
    assert report.get("divided between train and validation", 0) == len(cut) // 2
    assert report["read"] == len(texts)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(40, 30_000), min_size=1, max_size=12),
    st.sampled_from([0.01, 0.05, 0.2, 0.5, 0.9]),
    st.sampled_from(["\n\n", "\n", " "]),
    st.randoms(use_true_random=False),
)
def test_the_share_is_right_or_a_sentence_says_why_not(tmp_path_factory, sizes, val_fraction, gap, random):
    folder = tmp_path_factory.mktemp("out")
    texts = list(dict.fromkeys(paragraphs(size, index, gap) for index, size in enumerate(sizes)))
    command = [*texts, *random.choices(texts, k=3)]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            found = divided(folder, command, val_fraction)
        except UserError as error:
            assert "too few to divide" in str(error)
            return
        shuffled = random.sample(command, len(command))
        again = divided(folder, shuffled, val_fraction)
    warned = re.search(r"warning: validation holds [\d.]+% of the tokens, not ", output.getvalue())
    assert is_fair_share(share(folder), val_fraction) or warned
    assert {split: sorted(texts) for split, texts in found.items()} == {
        split: sorted(texts) for split, texts in again.items()
    }, "order and repeats do not matter"
    assert sorted(" ".join(found["train"] + found["val"]).split()) == sorted(" ".join(texts).split())
    if min(sizes) > 3_000:
        assert not warned, "texts of a few hundred tokens can always be cut"


def is_fair_share(found: float, wanted: float) -> bool:
    return wanted / 2 <= found <= 2 * wanted and found < 1


def test_many_documents_are_divided_by_their_digests_as_before(tmp_path):
    texts = [f"Story {n}. Once there were {n * n} cats." for n in range(3_000)]
    found = divided(tmp_path, texts)
    # The rule of the pipeline's versions 1 and 2: a document's digest is below the fraction.
    key = (1337).to_bytes(8, "little")
    digests = {
        text: hashlib.blake2b(f"{text}\n<|endoftext|>\n".encode(), digest_size=16, key=key).digest() for text in texts
    }
    expected = [text for text in texts if int.from_bytes(digests[text][:8], "little") < int(0.05 * 2**64)]
    assert found["val"] == expected and len(expected) > 100


def talk(n_exchanges: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {"role": ("user", "assistant")[turn % 2], "content": " ".join(rng.choice(WORDS, 6))}
        for turn in range(2 * n_exchanges)
    ]


def test_two_long_conversations_are_divided_at_a_question(tmp_path, capsys):
    talks = [talk(80, 1), talk(90, 2)]
    found = divided(tmp_path, talks)
    assert 0.025 <= share(tmp_path) <= 0.1
    assert "warning" not in capsys.readouterr().out
    assert all(messages[0]["role"] == "user" for split in found.values() for messages in split)
    head = next(messages for messages in found["train"] if messages not in talks)
    assert [*head, *found["val"][0]] in talks


def test_two_short_conversations_are_not_cut_and_that_is_said(tmp_path, capsys):
    found = divided(tmp_path, [talk(2, 1), talk(2, 2)])
    assert {len(found["train"]), len(found["val"])} == {1}
    assert "conversations of fewer than 10 questions are not cut" in capsys.readouterr().out


def test_shards_and_weights_survive_a_second_division(tmp_path):
    talks = [talk(60, seed) for seed in range(3)]
    for messages in talks:
        messages[5]["weight"] = 0
        messages[-1]["weight"] = 0
    divided(tmp_path / "whole", talks)
    found = divided(tmp_path / "shards", talks, shard_tokens=200)
    info = read_info(tmp_path / "shards", "mine")
    assert len(info.splits["train"].files) > 2
    assert not (tmp_path / "shards" / "undivided").exists()
    zeros = {split: sum("weight" in each for m in found[split] for each in m) for split in found}
    assert {split: len(info.splits[split].untrained) for split in found} == zeros
    assert sum(zeros.values()) == 6
    for split in found:
        ids = np.concatenate([np.fromfile(tmp_path / "shards" / f.file, "<u2") for f in info.splits[split].files])
        assert ids.tolist() == np.fromfile(tmp_path / "whole" / f"mine-{split}.bin", "<u2").tolist()


def test_memory_does_not_grow_with_a_corpus_that_is_divided_again(tmp_path):
    def source():
        yield "\n\n".join(["One huge document. " * 100] * 400)  # 0.8 MB
        for number in range(20_000):
            yield f"{number} is a number. " * 20

    options = PrepareOptions(output_dir=str(tmp_path), workers=1, val_fraction=0.0005)
    prepare(Dataset("warm", "text", "a test", "MIT"), options, Corpus(stories(3)))
    tracemalloc.start()
    prepare(Dataset("mine", "text", "a test", "MIT"), options, Corpus(source()))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.00025 <= share(tmp_path) <= 0.001
    assert peak_bytes < 64 << 20


# --- where a text is cut ---


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("aa bb.\n\ncc dd.\n\nee ff.", ("aa bb.\n\ncc dd.", "ee ff.")),
        ("aa bb. cc dd.\nee ff.", ("aa bb. cc dd.", "ee ff.")),
        ("aa bb. cc dd. ee ff.", ("aa bb. cc dd.", "ee ff.")),
        ("他们来了。我们走吧。好。", ("他们来了。", "我们走吧。好。")),
        ("aa bb cc dd ee ff", ("aa bb cc dd", "ee ff")),
        ("aabbccddeeffgghh", None),
    ],
)
def test_a_text_is_cut_at_the_best_boundary_and_never_in_a_word(text, parts):
    assert cut_text(text, 5, 1, 8) == parts


def test_sizes_are_chosen_in_order_and_passed_over_if_too_large():
    assert choose_by_size([500, 40, 30, 400, 30], 0.1) == [1, 2, 4]
    assert choose_by_size([500, 500], 0.05) == []
    assert is_fair(50, 1000, 0.05) and not is_fair(101, 1000, 0.05) and not is_fair(24, 1000, 0.05)


def test_both_parts_of_a_conversation_have_an_answer_to_learn_from():
    messages = talk(12)
    messages[-1]["weight"] = 0
    head, tail = cut_conversation(messages, [10] * 24, 5)
    assert head + tail == messages
    assert any(each["role"] == "assistant" and "weight" not in each for each in tail)


def test_paths_with_the_same_opening_are_divided_by_size(tmp_path):
    talks = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a " * n}] for n in range(1, 200)]
    talks.append([{"role": "user", "content": "huge"}, {"role": "assistant", "content": "a " * 200_000}])
    for seed in range(8):
        train, val = split_by_opening(talks, 0.04, seed)
        n_val, n_all = (sum(len(m["content"]) for t in each for m in t) for each in (val, talks))
        assert is_fair(n_val, n_all, 0.04), (seed, n_val / n_all)
        assert len(train) + len(val) == len(talks)


def test_the_script_says_what_it_did(tmp_path):
    (tmp_path / "book.txt").write_text(paragraphs(70_000))
    (tmp_path / "note.jsonl").write_text(json.dumps({"text": paragraphs(500, 9)}))
    command = [sys.executable, ROOT / "prepare_with_extended_tokenizer.py", "--name", "mine", "--workers", "1"]
    command += ["--output_dir", tmp_path / "out", "--input", tmp_path / "book.txt", tmp_path / "note.jsonl"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "  read: 3, kept: 3\n" in done.stdout
    assert 0.025 <= share(tmp_path / "out") <= 0.1
