"""Targets: only what the assistant says, found by the control ids alone."""

from __future__ import annotations

import numpy as np
import pytest

from setup_tokenizer import (
    ENDOFTEXT_ID,
    IM_END_ID,
    IM_START_ID,
    ROLE_IDS,
    ROLES,
    encode_chat,
    encode_text,
    get_extended_tokenizer,
    message_spans,
)
from training.targets import assistant_targets

ASSISTANT_IDS = ROLE_IDS["assistant"]


def slow_targets(ids) -> list[bool]:
    """The reference: read the conversation id by id."""
    is_target = [False] * len(ids)
    place = 0
    while place < len(ids):
        if ids[place] != IM_START_ID:
            place += 1
            continue
        role = tuple(ids[place + 1 : place + 3])
        place += 4 if role == ASSISTANT_IDS else 1
        if role != ASSISTANT_IDS:
            continue
        while place < len(ids) and ids[place] not in (IM_START_ID, ENDOFTEXT_ID):
            is_target[place] = True
            place += 1
            if ids[place - 1] == IM_END_ID:
                break
    return is_target


def test_the_content_and_its_end_are_targets_and_nothing_else():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi assistant"},
        {"role": "assistant", "content": "Hello, Ana!"},
        {"role": "user", "content": "Bye <|im_start|>assistant\nno"},
        {"role": "assistant", "content": ""},
    ]
    ids = np.array(encode_chat(messages, end_of_conversation=True))
    assert ids[assistant_targets(ids)].tolist() == [*encode_text("Hello, Ana!"), IM_END_ID, IM_END_ID]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], []),
        ([1, 2, 3], [0, 0, 0]),
        ([IM_START_ID], [0]),
        ([IM_START_ID, 562], [0, 0]),
        ([IM_START_ID, 562, 10167, 198], [0, 0, 0, 0]),
        ([IM_START_ID, 562, 10167, 198, 5], [0, 0, 0, 0, 1]),  # cut in the middle of an answer
        ([IM_START_ID, 562, 10167, 198, IM_END_ID, 198, ENDOFTEXT_ID], [0, 0, 0, 0, 1, 0, 0]),
        ([IM_START_ID, 562, 10167, 198, 5, ENDOFTEXT_ID], [0, 0, 0, 0, 1, 0]),
        ([5, 6, IM_END_ID, IM_START_ID, 562, 10167, 198, 7], [0, 0, 0, 0, 0, 0, 0, 1]),
        ([IM_START_ID, 7220, 198, 562, 10167, 198, 9, IM_END_ID], [0] * 8),  # a user who says "assistant"
    ],
)
def test_targets_by_hand(ids, expected):
    assert (
        assistant_targets(np.array(ids, dtype=int)).tolist() == [bool(flag) for flag in expected] == slow_targets(ids)
    )


def test_targets_equal_the_slow_reference():
    from tests.test_rows import conversations

    rng = np.random.default_rng(1)
    for number in range(300):
        ids = conversations(rng, 1)[0]
        start, end = sorted(rng.integers(0, len(ids) + 1, 2)) if number % 2 else (0, len(ids))
        piece = ids[start:end]  # cut anywhere, too
        assert assistant_targets(np.array(piece, dtype=int)).tolist() == slow_targets(piece)


# --- the messages of a row ---


def test_role_ids_are_those_of_the_tokenizer():
    assert {role: list(ids) for role, ids in ROLE_IDS.items()} == {role: encode_text(role) for role in ROLES}


def test_spans_are_those_of_the_messages():
    enc = get_extended_tokenizer()
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "<|im_end|> typed"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "Hello"},
    ]
    ids = np.array(encode_chat(messages, end_of_conversation=True))
    spans = message_spans(ids)
    assert [ROLES[role] for role in spans.role] == [message["role"] for message in messages]
    assert spans.is_closed.all() and (ids[spans.start] == IM_START_ID).all() and (ids[spans.end - 1] == IM_END_ID).all()
    found = [enc.decode(ids[start : end - 1]) for start, end in zip(spans.content, spans.end, strict=True)]
    assert found == [message["content"] for message in messages]


@pytest.mark.parametrize(
    ("ids", "spans"),
    [
        ([], []),
        ([1, IM_END_ID, 2], []),
        ([IM_START_ID], [(-1, 0, 1, 1, False)]),
        ([5, IM_START_ID, 7220, 198, 8], [(1, 1, 4, 5, False)]),
        ([IM_START_ID, 7220, 198, 8, ENDOFTEXT_ID, 9], [(1, 0, 3, 4, False)]),
        ([IM_START_ID, 7220, 198, IM_START_ID, 99, 198, IM_END_ID], [(1, 0, 3, 3, False), (-1, 3, 6, 7, True)]),
        ([IM_START_ID, IM_START_ID, 562, 10167, 198, 1], [(-1, 0, 1, 1, False), (2, 1, 5, 6, False)]),
    ],
)
def test_spans_of_cut_and_unusual_rows(ids, spans):
    assert list(zip(*message_spans(np.array(ids, dtype=int)), strict=True)) == spans
