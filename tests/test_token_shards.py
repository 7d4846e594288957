"""Published shards of GPT-2's tokens: checked, used without a copy, and the same text as our own .bin files."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from data.dataset import open_dataset, read_info
from data.pipeline import Dataset
from data.published import YARDSTICK_TOKENS, divide_shards, prepare_shards
from data.readers.shards import HEADER_BYTES, check_shard, document_start, read_shard_documents, shard_tokens
from data.token_stream import TokenStream
from setup_tokenizer import ENDOFTEXT_ID, get_extended_tokenizer
from tests.test_prepare_story import inline  # noqa: F401
from tests.token_shards import HEADER, ids_before, shard_bytes, write_shards
from training.rows import TextRows
from training.targets import document_numbers

ROOT = Path(__file__).resolve().parent.parent
OWN = "prepare_with_extended_tokenizer.py"
DATASET = Dataset("web", "text", "made", "none")
TEXTS = [f"Story {n} of “Tom” and his {n * n} cats. {'They played. ' * (n % 7)}" for n in range(60)]


def joined(streams, split: str) -> list[int]:
    return streams[split].read(0, len(streams[split])).tolist()


# --- one shard ---


FAULTS = {
    "begins with 7, but a shard of GPT-2's tokens begins with 20240520": shard_bytes([1, 2], (7, 1)),
    "has 0 bytes": b"",
    "has 3 bytes": b"abc",
    "begins with 1701603686": b"fileext",
    "is truncated within its header, after 800 bytes": shard_bytes([1, 2])[:800],
    "is a shard of version 7": shard_bytes([1, 2], (HEADER[0], 7)),
    "promises 0 tokens": shard_bytes([]),
    "has 1,030 bytes, but its header promises 4 tokens in 1,032": shard_bytes([1, 2, 3, 4])[:-2],
    "has 1,034 bytes, but its header promises 4 tokens in 1,032": shard_bytes([1, 2, 3, 4, 5], n_tokens=4),
    "contains the id 50257, but GPT-2's vocabulary ends at 50256": shard_bytes([1, 50257, 3]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_that_is_damaged_or_not_gpt2s_is_refused(tmp_path, fault):
    path = tmp_path / "a.bin"
    path.write_bytes(FAULTS[fault])
    with pytest.raises(UserError, match=fault.replace(".", r"\.")) as error:
        check_shard(path)
    assert ";" in str(error.value), "it says what to do"


def test_a_shard_is_counted_as_its_text_is(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(content := shard_bytes(ids := ids_before(TEXTS)))
    shard = check_shard(path)
    assert shard_tokens(path) == shard.tokens == len(ids)
    assert shard.documents == len(TEXTS)
    assert shard.text_bytes == len("".join(TEXTS).encode())
    assert shard.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("read_tokens", [3, 1 << 20])
def test_the_documents_of_a_shard_are_read_back(tmp_path, read_tokens):
    path = tmp_path / "a.bin"
    ids = ids_before(TEXTS)
    path.write_bytes(shard_bytes(ids))
    assert list(read_shard_documents(path, read_tokens)) == TEXTS
    path.write_bytes(shard_bytes(ids[5:-5]))  # it begins and ends within a document
    enc = get_extended_tokenizer()
    first, last = enc.encode_ordinary(TEXTS[0])[4:], enc.encode_ordinary(TEXTS[-1])[:-5]
    assert list(read_shard_documents(path, read_tokens)) == [enc.decode(first), *TEXTS[1:-1], enc.decode(last)]


def test_a_document_start_is_found(tmp_path):
    path = tmp_path / "a.bin"
    ids = np.array(ids_before(TEXTS))
    path.write_bytes(shard_bytes(ids))
    starts = np.flatnonzero(ids == ENDOFTEXT_ID)
    for position in (0, 1, 100, starts[-1], starts[-1] + 1):
        expected = next((start for start in starts if start >= position), len(ids))
        assert document_start(path, int(position)) == expected


# --- a data set of shards ---


def test_shards_are_one_stream_without_a_copy(tmp_path):
    train, val = ids_before(TEXTS[:50]), ids_before(TEXTS[50:])
    val_path, *train_paths = write_shards(tmp_path / "shards", train, val)
    assert divide_shards([val_path, *train_paths]) == (train_paths, val_path)
    info = prepare_shards(DATASET, tmp_path, train_paths, val_path, yardstick="{tokens} tokens")
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "web.json", ".web.lock"}
    streams, found = open_dataset(tmp_path, "web")
    assert joined(streams, "train") == train and joined(streams, "val") == val
    assert found == info == read_info(tmp_path, "web")
    assert info.splits["train"].documents == 50 and info.splits["val"].documents == 10
    assert info.yardstick == f"{len(val) - 1} tokens"
    # Inside the output folder, paths are relative: the folder can be moved.
    (tmp_path / "shards").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"shards/fineweb_train_000001\.bin not found"):
        open_dataset(tmp_path, "web")


def test_a_shard_that_changes_later_is_noticed(tmp_path):
    val_path, *train_paths = write_shards(tmp_path / "a", ids_before(TEXTS[:50]), ids_before(TEXTS[50:]))
    prepare_shards(DATASET, tmp_path / "a", train_paths, val_path)
    content = bytearray(train_paths[1].read_bytes())
    content[HEADER_BYTES + 8] ^= 1
    train_paths[1].write_bytes(content)
    with pytest.raises(UserError, match="does not match the sha256"):
        open_dataset(tmp_path / "a", "web")


def test_validation_is_the_beginning_of_its_shard_as_the_yardstick_has_it(tmp_path):
    n_tokens = YARDSTICK_TOKENS + 100
    _, train_path = write_shards(tmp_path, ids_before(TEXTS), [1], n_train=1)
    val_path = tmp_path / "fineweb_val_000000.bin"
    with val_path.open("wb") as file:
        file.write(shard_bytes([], n_tokens=n_tokens))
        file.truncate(HEADER_BYTES + 2 * n_tokens)  # zeros that take no room
    info = prepare_shards(DATASET, tmp_path, [train_path], val_path)
    streams, _ = open_dataset(tmp_path, "web")
    assert len(streams["val"]) == info.splits["val"].tokens == YARDSTICK_TOKENS + 1
    assert TextRows(streams["val"], 1024, seed=1).start_epoch(0) == YARDSTICK_TOKENS // 1024


def test_without_a_validation_shard_the_end_of_the_last_one_is_for_validation(tmp_path):
    ids = ids_before(TEXTS)
    _, *train_paths = write_shards(tmp_path, ids, [1], n_train=2)
    info = prepare_shards(DATASET, tmp_path, train_paths, val_fraction=0.2)
    streams, _ = open_dataset(tmp_path, "web")
    assert joined(streams, "train") + joined(streams, "val") == ids, "nothing is lost, nothing is in both"
    assert joined(streams, "val")[0] == ENDOFTEXT_ID
    assert 0.1 < info.splits["val"].tokens / len(ids) <= 0.2


def test_two_validation_shards_are_refused(tmp_path):
    paths = [tmp_path / name for name in ("a_val_1.bin", "a_val_2.bin", "a_train_1.bin")]
    with pytest.raises(UserError, match=r"a_val_1\.bin and .*a_val_2\.bin are both named like validation shards"):
        divide_shards(paths)
    assert divide_shards([tmp_path / "interval.bin"]) == ([tmp_path / "interval.bin"], None)


def test_a_part_of_a_file_is_read_like_a_file_of_its_own(tmp_path):
    ids = np.arange(50)
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(6) + ids.astype("<u2").tobytes())
    stream = TokenStream([tmp_path / "a", tmp_path / "b"], parts=[(6, 50), (26, 5)])
    assert stream.read(0, len(stream)).tolist() == [*range(50), *range(10, 15)]
    assert stream.positions_of(12).tolist() == [12, 52]


# --- document boundaries ---


def test_shards_and_our_own_files_are_the_same_sequence_of_documents(tmp_path, inline):
    """`<|endoftext|>` before or after each document: joined, only the first and the last id differ."""
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n<|endoftext|>\n" for text in TEXTS), encoding="utf-8")
    inline(OWN, "--input", "texts.txt", "--name", "mine", "--output_dir", ".", "--val_fraction", "0.1")
    ours = [np.fromfile(f"mine-{split}.bin", dtype="<u2").tolist() for split in ("train", "val")]
    for ids in ours:
        texts = get_extended_tokenizer().decode(ids).split("<|endoftext|>")[:-1]
        assert ids_before(texts) == [ENDOFTEXT_ID, *ids[:-1]]
        # A document mask gives each document its own number and begins it with the <|endoftext|> before it.
        numbers = document_numbers(np.array([ids_before(texts)]))[0]
        assert numbers[0] == 1 and numbers[-1] == len(texts)
        of_ours = document_numbers(np.array([ids]))[0]
        assert (of_ours[:-1] + 1 == numbers[1:]).all(), "the same documents in either order"


# --- prepare_with_extended_tokenizer.py ---


def test_own_shards_are_recognized_and_used_where_they_are(tmp_path, inline, capsys):
    write_shards(tmp_path / "shards", ids_before(TEXTS[:50]), ids_before(TEXTS[50:]))
    (tmp_path / "shards" / "weights.bin").write_bytes(b"something else")
    inline(OWN, "--input", "shards", "--name", "mine", "--output_dir", ".")
    output = capsys.readouterr().out
    assert "fineweb_train_000001.bin: tokens (a shard of " in output
    assert "left out: shards/weights.bin begins with" in output
    assert TEXTS[0][:20] in output, "a sample"
    assert not list(tmp_path.glob("*.bin")), "no copy"
    streams, info = open_dataset(tmp_path, "mine")
    assert joined(streams, "train") == ids_before(TEXTS[:50]) and info.licence == "not stated (--licence)"
    with pytest.raises(UserError, match="mine consists of published token ids"):
        inline(OWN, "--dataset", "mine", "--output_dir", ".")


def test_options_that_select_documents_prepare_the_text_of_shards(tmp_path, inline):
    (tmp_path / "a.bin").write_bytes(shard_bytes(ids_before(TEXTS)))
    inline(OWN, "--input", "a.bin", "--name", "mine", "--output_dir", ".", "--limit", "30")
    info = json.loads((tmp_path / "mine.json").read_text("utf-8"))
    assert sum(split["documents"] for split in info["splits"].values()) == 30
    ids = np.concatenate([np.fromfile(f"mine-{split}.bin", dtype="<u2") for split in ("train", "val")])
    found = get_extended_tokenizer().decode(ids.tolist()).split("<|endoftext|>")[:-1]
    assert sorted(found) == sorted(text.strip() for text in TEXTS[:30])


def test_shards_and_text_are_prepared_separately(tmp_path, inline):
    (tmp_path / "a.bin").write_bytes(shard_bytes(ids_before(TEXTS)))
    (tmp_path / "b.txt").write_text("A text.", encoding="utf-8")
    with pytest.raises(UserError, match=r"some are text \(b\.txt\) and some are token ids \(a\.bin\)"):
        inline(OWN, "--input", "a.bin", "b.txt", "--output_dir", ".")


# --- evaluate.py and train.py ---


def test_the_published_order_trains_and_is_measured_as_the_yardstick_says(tmp_path, monkeypatch, capsys):
    import torch

    from exchange.loading import load_model
    from tests.tiny import run

    val_path, *train_paths = write_shards(tmp_path, ids_before(TEXTS[:40]), val := ids_before(TEXTS[40:]))
    prepare_shards(DATASET, tmp_path, train_paths, val_path, yardstick="the first {tokens} tokens")
    run(tmp_path, tmp_path / "models", dataset="web", max_iters=4)
    model, _ = load_model(str(checkpoint := tmp_path / "models" / "web4.pt"), "cpu")
    capsys.readouterr()
    words = [str(checkpoint), "--data_dir", str(tmp_path), "--json", "a.json", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "evaluate.py"))["main"]()
    assert f"to compare: the first {len(val) - 1} tokens" in capsys.readouterr().out
    # Windows that do not overlap, each target once, as llm.c's evaluation reads the shard.
    losses = []
    for start in range(0, len(val) - 1, 16):
        ids = torch.tensor([val[start : start + 17]])
        logits = model.logits(model.hidden(ids[:, :-1]))[0]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    result = json.loads(Path("a.json").read_text("utf-8"))["datasets"]["web"]["results"][0]
    assert result["stride"] == result["block_size"] == 16
    assert result["all"]["tokens"] == len(losses) == len(val) - 1
    assert result["all"]["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
