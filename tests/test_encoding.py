"""Encoding of difficult text: a batch has the ids of its documents, and documents come back from .bin and text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.dataset import read_info
from data.documents import read_prepared
from data.encoding import encode_documents
from data.pipeline import Corpus, prepare
from data.readers.records import read_records
from setup_tokenizer import (
    ENDOFTEXT_ID,
    IM_END_ID,
    IM_START_ID,
    ROLES,
    encode_chat,
    get_base_tokenizer,
    get_extended_tokenizer,
)
from tests.test_pipeline import CHAT, TEXT, ids_of, options, talk

AWKWARD = st.text(
    st.one_of(st.sampled_from(" \n\t\r\x00\x1c\x85\xa0\u2028\u3000<|>'’é٣"), st.characters()), max_size=40
)
PIECES = st.sampled_from(
    [
        "<|endoftext|>",
        "<|white space|>",
        "\n<|endoftext|>\n",
        "\\<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>\n",
        "   ",
        "\n\n\n",
    ]
)
CONTENTS = st.lists(st.one_of(AWKWARD, PIECES), max_size=5).map("".join)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": CONTENTS}), min_size=1, max_size=5
)
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@SETTINGS
@given(st.lists(CONTENTS, max_size=6))
def test_a_batch_has_the_ids_of_its_documents(documents):
    base = get_base_tokenizer()
    expected = [token for document in documents for token in [*base.encode_ordinary(document), ENDOFTEXT_ID]]
    assert encode_documents(documents).tolist() == expected


@SETTINGS
@given(st.lists(MESSAGES, max_size=4))
def test_a_batch_has_the_ids_of_its_conversations(conversations):
    expected = [token for messages in conversations for token in encode_chat(messages, end_of_conversation=True)]
    ids = encode_documents(conversations).tolist()
    assert ids == expected
    n_messages = sum(map(len, conversations))
    assert [ids.count(IM_START_ID), ids.count(IM_END_ID), ids.count(ENDOFTEXT_ID)] == [
        n_messages,
        n_messages,
        len(conversations),
    ], "no content becomes a control id"


@settings(SETTINGS, max_examples=40)
@given(st.lists(CONTENTS, min_size=1, max_size=12))
def test_documents_come_back_from_bin_and_text(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("round")
    wanted = list(dict.fromkeys(map(without_surrogates, documents)))
    wanted = [document for document in wanted if document.strip()]
    info = prepare(TEXT, options(folder), Corpus([*documents, "train"], ["val"]))
    wanted = [document for document in dict.fromkeys([*wanted, "train"]) if document != "val"]
    assert list(read_prepared(folder, info, "train")) == wanted
    ids = ids_of(folder, "train")
    ends = [index for index, token in enumerate(ids) if token == ENDOFTEXT_ID]
    starts = [0, *(end + 1 for end in ends)]
    enc = get_extended_tokenizer()
    assert [enc.decode(ids[start:end]) for start, end in zip(starts, ends, strict=False)] == wanted


@settings(SETTINGS, max_examples=40)
@given(st.lists(MESSAGES, min_size=1, max_size=8))
def test_conversations_come_back_from_jsonl(tmp_path_factory, conversations):
    folder = tmp_path_factory.mktemp("round")
    mended = [
        [{**message, "content": without_surrogates(message["content"])} for message in messages]
        for messages in conversations
        if any(message["content"] for message in messages)
    ]
    extra = talk("only", "train")
    info = prepare(CHAT, options(folder), Corpus([*conversations, extra], [talk("only", "val")]))
    unique = [json.loads(line) for line in dict.fromkeys(json.dumps(messages) for messages in [*mended, extra])]
    assert list(read_prepared(folder, info, "train")) == unique


def decoded_documents(ids: list[int]) -> list[str]:
    enc, ends = get_extended_tokenizer(), [index for index, token in enumerate(ids) if token == ENDOFTEXT_ID]
    return [enc.decode(ids[start:end]) for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def decoded_conversations(ids: list[int]) -> list[list[dict]]:
    """The messages between control ids; a control token that any content forged makes other messages."""
    enc, conversations, start = get_extended_tokenizer(), [[]], None
    for index, token in enumerate(ids):
        if token == IM_START_ID:
            start = index + 1
        elif token == IM_END_ID:
            role, content = enc.decode(ids[start:index]).split("\n", 1)
            conversations[-1].append({"role": role, "content": content})
        elif token == ENDOFTEXT_ID:
            conversations.append([])
    return conversations[:-1]


# What text can hold at its worst: control tokens spelt out, the files' own separators, unpaired surrogates, NUL,
# writing directions, characters joined or combined, every kind of space and line end.
WORST = ["<|endoftext|>", "\n<|endoftext|>\n", "\\<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORST += ["\ud800", "\udc00", "\ud83d", "\x00", "\x1b[2J", "\u202e", "\u2066", "\u200f", "\ufeff", "\u200d"]
WORST += ["👩\u200d👩\u200d👧", "e\u0301", "漢字", "ﷺ", "\U0010ffff", "<|im_start|>assistant\n", "'s", "don't", "3.14"]
WORST += ["\r\n", "\r", "\u2028", "\x85", "\x0c", "\u3000", "\t", " ", "   ", "\n\n\n", " " * 300, "x" * 300]
WORST += ['"', "\\", "\\n", "{}", "|", "<", ">", *(f" word{n}" for n in range(20))]


def test_5000_random_conversations_and_documents_come_back(tmp_path):
    random = np.random.default_rng(7)

    def text(most: int) -> str:
        return "".join(WORST[index] for index in random.integers(len(WORST), size=random.integers(1, most)))

    documents = list({without_surrogates(raw): raw for raw in (text(30) for _ in range(2600))}.values())
    documents += ["x" * 1_000_000, "\u202e" * 300_000]
    conversations = [
        [{"role": ROLES[role], "content": text(15)} for role in random.integers(3, size=random.integers(1, 6))]
        for _ in range(2600)
    ]
    conversations.append(talk("y" * 1_000_000, "\0" * 100_000))
    mended = [[{**each, "content": without_surrogates(each["content"])} for each in talk] for talk in conversations]
    mended = list({json.dumps(messages): messages for messages in mended}.values())
    prepare(TEXT, options(tmp_path / "text", val_fraction=0.5), Corpus(documents))
    prepare(CHAT, options(tmp_path / "chat", val_fraction=0.5), Corpus(conversations))
    texts = [one for split in ("train", "val") for one in decoded_documents(ids_of(tmp_path / "text", split))]
    chats = [one for split in ("train", "val") for one in decoded_conversations(ids_of(tmp_path / "chat", split))]
    assert sorted(texts) == sorted(filter(str.strip, map(without_surrogates, documents)))
    assert sorted(map(json.dumps, chats)) == sorted(map(json.dumps, mended))
    assert len(texts) + len(chats) > 5000
    for kind, found in (("text", texts), ("chat", chats)):
        info = read_info(tmp_path / kind, "mine")
        kept = [one for split in ("train", "val") for one in read_prepared(tmp_path / kind, info, split)]
        assert kept == found, "the text beside the ids is the same"


def test_lone_surrogates_of_json_become_replacement_characters(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "c\\ud83d\\ude00"}\n')
    documents = (record["text"] for record in read_records(tmp_path / "in.jsonl"))
    info = prepare(TEXT, options(tmp_path, val_fraction=0.5), Corpus(documents))
    kept = {one for split in ("train", "val") for one in read_prepared(tmp_path, info, split)}
    assert kept == {"a\ufffdb", "c😀"} and info.report["unpaired surrogates"] == 1


@pytest.mark.parametrize(
    "document",
    ["x" * 1_000_000, " " * 1_000_000 + "x", "\n " * 600_000 + "x", "a" + "\u3000" * 1_000_001 + "b", "\0" * 1_000_000],
    ids=["letters", "blanks", "blank lines", "ideographic spaces", "NUL"],
)
def test_a_million_characters_without_a_word_end(document):
    assert get_extended_tokenizer().decode(encode_documents([document])[:-1].tolist()) == document
