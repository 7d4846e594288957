"""A prepared data set's .json and .bin files: the description comes back as it was, and bad files are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from data.dataset import DatasetInfo, check_name, open_dataset, read_info, short_splits
from tests.tiny import prepare, write_dataset

# --- the name ---


def test_a_name_is_one_word_that_is_neither_an_option_nor_a_path():
    for name in ("mine", "7", "fineweb-edu", "A_b"):
        check_name(name)
    for name in ("", "-x", "_x", "a b", "a.b", "../a", "a/b", "a=1", "a,b", "a+b", "ä", "mine\n"):
        with pytest.raises(ValueError, match="the name of a data set consists of"):
            check_name(name)
    check_name("tales-tokenizer", "tokenizer")
    with pytest.raises(ValueError, match=r"tales-tokenizer.json would be the file of a tokenizer; use a name"):
        check_name("tales-tokenizer")


# --- the description ---

FULL = {
    **{"name": "mine", "format": "chat", "source": "a test", "licence": "MIT", "non_commercial": False},
    **{"tokenizer": "gpt2_chatml", "n_vocab": 50259, "dtype": "uint16", "seed": 7, "options": {"limit": None}},
    "input_digest": None,
    "splits": {
        split: {
            **{"documents": 2, "tokens": 9, "text_bytes": 30},
            "files": [{"file": f"mine-{split}.bin", "tokens": 9, "sha256": "ab"}],
        }
        for split in ("train", "val")
    },
    "report": {"read": 4},
}
BARE = {"name": "bare", "format": "text", "tokenizer": "gpt2_chatml", "n_vocab": 50259}
BARE["splits"] = {
    split: {"tokens": 9, "files": [{"file": f"bare-{split}.bin", "sha256": "ab"}]} for split in ("train", "val")
}


@pytest.mark.parametrize(
    "content", [FULL, {**FULL, "report_files": ["mine.md"], "from_the_future": [1]}, BARE, {**BARE, "licence": "none"}]
)
def test_a_description_comes_back_as_it_was(content):
    info = DatasetInfo.from_json(content)
    assert info.to_json() == content and list(info.to_json())[:2] == ["name", "format"]
    assert DatasetInfo.from_json(info.to_json()) == info


def test_a_missing_description_is_none(tmp_path):
    assert read_info(tmp_path, "mine") is None


# --- opening ---


@pytest.fixture
def data(tmp_path):
    return prepare(tmp_path / "data")


def rewrite(data: Path, **changes) -> None:
    path = data / "text.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put(data: Path, split: str, content: bytes, keep_sha256: bool = False) -> None:
    """Another content for a split's file, with the right digest in the .json unless told."""
    (data / f"text-{split}.bin").write_bytes(content)
    if not keep_sha256:
        splits = json.loads((data / "text.json").read_text())["splits"]
        splits[split]["files"][0]["sha256"] = hashlib.sha256(content).hexdigest()
        rewrite(data, splits=splits)


def test_a_prepared_data_set_opens(data):
    streams, info = open_dataset(data, "text")
    assert (len(streams["train"]), len(streams["val"])) == (600, 150)
    assert info.format == "text" and info.splits["train"].tokens == 600


def test_shards_open_as_one_stream(data):
    write_dataset(data, "many", "chat", 500, seed=3, n_shards=3)
    write_dataset(data, "one", "chat", 500, seed=3)
    many, one = (open_dataset(data, name)[0] for name in ("many", "one"))
    assert len(many["train"].paths) == 3
    assert (many["train"].read(0, 500) == one["train"].read(0, 500)).all()


def test_files_without_a_json_are_looked_at(data, capsys):
    prepare(data, "chat")
    for name in ("text", "chat"):
        (data / f"{name}.json").unlink()
        _, info = open_dataset(data, name)
        assert info.format == name and info.n_vocab == 50259
        file = data / f"{name}-train.bin"
        assert info.splits["train"].files[0].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert f"read as {name}" in capsys.readouterr().out


NOT_AGAIN = r"; prepare (the data|it) again with: python prepare_with_extended_tokenizer.py --input FILE --name text"


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty" + NOT_AGAIN),
        (b"\x01\x00\x02", "has an odd number of bytes" + r".*" + NOT_AGAIN),
        (
            np.array([1, 50259, 2] * 40, "<u2").tobytes(),
            r"contains the id 50259, but the vocabulary ends at 50258" + NOT_AGAIN,
        ),
    ],
    ids=["empty", "odd", "id"],
)
@pytest.mark.parametrize("with_json", [True, False])
def test_bad_files_are_refused(data, split, content, sentence, with_json):
    put(data, split, content)
    if not with_json:
        (data / "text.json").unlink()
    with pytest.raises(UserError, match=f"text-{split}.bin {sentence}") as error:
        open_dataset(data, "text")
    assert "\n" not in str(error.value)


def test_a_file_that_does_not_match_its_json_is_refused(data):
    content = bytearray((data / "text-val.bin").read_bytes())
    content[0] ^= 1
    put(data, "val", bytes(content), keep_sha256=True)
    with pytest.raises(UserError, match=r"text-val.bin does not match the sha256 in text.json" + NOT_AGAIN):
        open_dataset(data, "text")


def test_a_missing_file_names_the_command_and_what_is_there(data):
    with pytest.raises(
        UserError, match=r"story-train.bin not found; run: python data/prepare-story.py .*already prepared: text"
    ):
        open_dataset(data, "story")
    (data / "text-val.bin").unlink()
    with pytest.raises(UserError, match=r"text-val.bin not found; run: python prepare_with_extended_tokenizer.py"):
        open_dataset(data, "text")
    with pytest.raises(UserError, match="nothing is prepared yet"):
        open_dataset(data / "nowhere", "chitchat")


def test_another_tokenizer_is_refused(data):
    rewrite(data, tokenizer="cl100k_base_chatml")
    with pytest.raises(
        UserError,
        match=r"cl100k_base_chatml-tokenizer.json, the tokenizer of text, not found; copy it there, or prepare",
    ):
        open_dataset(data, "text")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"splits": {}}', '{"splits": {"train": {"files": []}}, "format": "text"}', "\udcff"],
)
def test_a_damaged_json_is_refused(data, content):
    (data / "text.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"text.json is damaged" + NOT_AGAIN):
        open_dataset(data, "text")


@pytest.mark.parametrize(
    "key", ["name", "format", "tokenizer", "n_vocab", "splits", "splits.val", "splits.train.files"]
)
def test_a_json_without_an_entry_is_damaged(data, key):
    facts = json.loads((data / "text.json").read_text())
    *outer, last = key.split(".")
    inner = facts
    for name in outer:
        inner = inner[name]
    del inner[last]
    (data / "text.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"text.json is damaged"):
        open_dataset(data, "text")


def test_a_split_shorter_than_a_row_is_mentioned_and_one_token_is_refused(data):
    streams, _ = open_dataset(data, "text")
    assert short_splits(streams, 149) == []
    (sentence,) = short_splits(streams, 150)
    assert sentence.startswith("text-val.bin contains 150 tokens, too few for a row of 150 and its last target; the")
    assert "validation loss" in sentence
    put(data, "val", np.array([7], "<u2").tobytes())
    with pytest.raises(UserError, match=r"text-val.bin contains a single token, so there is nothing to predict; add"):
        short_splits(open_dataset(data, "text")[0], 16)
