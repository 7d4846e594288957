"""Re-encode token ids with another tokenizer, so that models with different vocabularies can be compared."""

from __future__ import annotations

import itertools

import numpy as np

from setup_tokenizer import ROLES, Tokenizer


def reencode(
    ids: np.ndarray, is_trained: np.ndarray, is_chat: bool, old: Tokenizer, new: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Convert ids (N,), and flags (N,) that say which ones are trained, to another tokenizer; returns both as (M,).

    The first id is an `<|endoftext|>`, as after a document. A last document without its `<|endoftext|>` has none in the
    result either.
    """
    ends = [*np.flatnonzero(ids == old.endoftext).tolist(), len(ids)]
    encoded: list[int] = [new.endoftext]
    trained: list[bool] = [bool(is_trained[0])]
    for start, end in itertools.pairwise(ends):
        document = slice(start + 1, end)
        encode = _encode_messages if is_chat else _encode_text
        new_ids, flags = encode(ids[document], is_trained[document], old, new)
        encoded += new_ids
        trained += flags
        if end < len(ids):
            encoded.append(new.endoftext)
            trained.append(bool(is_trained[end]))
    return np.array(encoded, dtype=np.int64), np.array(trained, dtype=bool)


def _text_of(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of ids, without the bytes of a character that is cut off at the end."""
    return tokenizer.enc.decode(ids.tolist(), errors="ignore")


def _encode_text(
    ids: np.ndarray, is_trained: np.ndarray, old: Tokenizer, new: Tokenizer
) -> tuple[list[int], list[bool]]:
    new_ids = new.encode_text(_text_of(ids, old))
    return new_ids, [True] * len(new_ids)


def _encode_messages(
    ids: np.ndarray, is_trained: np.ndarray, old: Tokenizer, new: Tokenizer
) -> tuple[list[int], list[bool]]:
    """A conversation's ids. Whether a message is trained is decided by its last id, `<|im_end|>` or the last one."""
    encoded: list[int] = []
    trained: list[bool] = []
    spans = old.message_spans(ids)
    for role, start, end, is_closed in zip(spans.role, spans.start, spans.end, spans.is_closed, strict=True):
        text = _text_of(ids[start + 1 : end - int(is_closed)], old)
        message = {"role": ROLES[role], "content": text.partition("\n")[2]}
        new_ids = new.encode_chat([message])
        if not is_closed:  # the conversation is cut off
            new_ids = new_ids[:-2]
        encoded += new_ids
        trained += [bool(is_trained[end - 1])] * len(new_ids)
    return encoded, trained
