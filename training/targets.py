"""Which tokens are targets, and where documents begin, derived from the control ids of prepared data."""

from __future__ import annotations

import numpy as np

from setup_tokenizer import GPT2, N_VOCAB, ROLES, Tokenizer, control_ids


def assistant_targets(ids: np.ndarray, tokenizer: Tokenizer = GPT2) -> np.ndarray:
    """Which of the ids (N,) the assistant says: the contents of its messages and the `<|im_end|>` after each.

    True at position i means that id i is a target. It is False for `<|im_start|>`, for the role with its line end, and
    for everything that other roles say.
    """
    ids = np.asarray(ids)
    messages = tokenizer.message_spans(ids)
    is_assistant = messages.role == ROLES.index("assistant")
    steps = np.zeros(len(ids) + 1, dtype=np.int8)  # +1 where a message's content begins, -1 after its end
    steps[messages.content[is_assistant]] += 1
    steps[messages.end[is_assistant]] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def document_numbers(ids: np.ndarray, n_vocab: int = N_VOCAB) -> np.ndarray:
    """The number of the document that each id of the rows (B, T) belongs to, counted from 0 in each row.

    A text begins with the `<|endoftext|>` that ends the previous one, and a conversation with its first
    `<|im_start|>`, because gen.py and evaluate.py also begin them in this way.

    >>> document_numbers(np.array([[7, 8, 50256, 9]]))
    array([[0, 0, 1, 1]])
    """
    endoftext, im_start, _ = control_ids(n_vocab)
    begins = (ids == endoftext).ravel()
    starts = np.flatnonzero(ids.ravel() == im_start)
    starts = starts[starts % ids.shape[1] > 0]  # the first id of a row belongs to document 0 in any case
    begins[starts] = begins[starts - 1]
    return np.cumsum(begins.reshape(ids.shape), axis=1)
