"""generation/text_stream.py: the pieces add up to the decoded text, and end before a stop text."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from generation.text_stream import TextStream
from setup_tokenizer import N_VOCAB, encode_text, get_extended_tokenizer

ENC = get_extended_tokenizer()

# Whole characters of all lengths, combining marks, joined emoji, and single bytes that are not UTF-8.
PIECES = st.one_of(
    st.text(max_size=5).map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from(["👩‍👩‍👧‍👦", "日本語", "e\u0301", "ｈ", "🏳️‍🌈", "नमस्ते", "\u200d", "\r\n"]).map(str.encode),
    st.binary(min_size=1, max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12))
def test_the_joined_pieces_are_the_whole_text(pieces):
    ids = [ENC.encode_single_token(bytes([byte])) for piece in pieces for byte in piece]  # a token per byte
    if all(_is_text(piece) for piece in pieces):
        ids = encode_text(b"".join(pieces).decode())
    stream = TextStream(ENC)
    parts = [stream.feed(token) for token in ids]
    assert "".join(parts) + stream.finish() == ENC.decode(ids)
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in ENC.decode(ids)


def _is_text(piece: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        piece.decode()
        return True
    return False


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, N_VOCAB - 1), max_size=30))
def test_any_ids_stream_to_what_they_decode_to(ids):
    stream = TextStream(ENC)
    assert "".join([stream.feed(token) for token in ids]) + stream.finish() == ENC.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text("ab é", max_size=30), st.lists(st.text("ab é", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_a_stop_text_wherever_tokens_end(text, stops):
    expected = text
    for end in range(1, len(text) + 1):  # the first stop text to be complete, the longest of those that end there
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            expected = text[: end - max(complete)]
            break
    for ids in (encode_text(text), [ENC.encode_single_token(bytes([byte])) for byte in text.encode()]):
        stream, shown = TextStream(ENC, stops), ""
        for token in ids:
            shown += stream.feed(token)
            if stream.stopped:
                break
        shown += stream.finish()
        assert shown == expected
        assert stream.stopped == any(stop in text for stop in stops)


def test_text_that_cannot_become_a_stop_text_is_returned_at_once():
    stream = TextStream(ENC, ["\n\nEnd"])
    assert [stream.feed(token) for token in encode_text("One two")] == ["One", " two"]
    assert stream.feed(ENC.encode_single_token("\n")) == ""
    assert stream.feed(ENC.encode_single_token("x")) == "\nx"
