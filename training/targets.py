"""Which tokens are targets, where documents begin, and their positions, derived from the ids of prepared data."""

from __future__ import annotations

import numpy as np

from setup_tokenizer import GPT2, N_VOCAB, ROLES, Tokenizer, control_ids

ROWS_PER_LONG_ROW = 16  # one in this many rows counts its positions from the start of the row


def assistant_targets(ids: np.ndarray, tokenizer: Tokenizer = GPT2) -> np.ndarray:
    """Which of the ids (N,) the assistant says: the contents of its messages and the `<|im_end|>` after each.

    True at position i means that id i is a target. It is False for `<|im_start|>`, for the role with its newline, and
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


def document_positions(ids: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The position (B, T) of each id of the rows (B, T) in its document, whose numbers are `documents` (B, T).

    Generation begins a conversation at position 0, so training does too. Late positions would then be learned only
    from long documents, so about one row in ROWS_PER_LONG_ROW counts from the start of the row. The sum of its ids
    decides which, so a row has the same positions in every batch.

    >>> document_positions(np.array([[7, 8, 50256, 9]]), np.array([[0, 0, 1, 1]]))
    array([[0, 1, 0, 1]])
    """
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    is_first = np.diff(documents, axis=1, prepend=-1) > 0
    is_first[ids.sum(axis=1) % ROWS_PER_LONG_ROW == 0] = False
    return positions - np.maximum.accumulate(positions * is_first, axis=1)
