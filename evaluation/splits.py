"""Which tokens of a validation split are scored, in which context, and how many bytes of text they are.

Text is one stream: every token is scored exactly once, `<|endoftext|>` included. The first token follows an
`<|endoftext|>`: one that is added or, in published shards, the stream's own first id, which is then not scored. For a
model that was trained with --document_mask, each document has only its own context. Chat is scored per conversation:
its first token, `<|im_start|>`, is given, as in gen.py's chat; all others are scored, up to and including the final
`<|endoftext|>`.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from common.cli import UserError
from data.token_stream import TokenStream
from evaluation.reencoding import reencode
from setup_tokenizer import Tokenizer
from training.targets import assistant_targets

MIN_DOCUMENTS = 50  # with fewer, the bootstrap resamples blocks of tokens instead of documents
BLOCK_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Split:
    """A validation split: its ids (N + 1,), which of them are scored, and in which group each one counts.

    `ids` begins with the `<|endoftext|>` that is the context of the first token. Each span (start, end) is a range
    of positions that share a context. `counted` maps "all", and for chat "assistant", to the positions that count,
    (N + 1,) bool, and the bytes of text that they contain. `unit` (N + 1,) is what the bootstrap resamples: the index
    of each position's document or block. `bytes_at` (N + 1,) is the number of bytes of text at each position.
    """

    name: str
    ids: np.ndarray
    spans: list[tuple[int, int]]
    counted: dict[str, tuple[np.ndarray, int]]
    unit: np.ndarray
    unit_name: str
    bytes_at: np.ndarray

    @property
    def main_scope(self) -> str:
        """The scope that decides which model is better: the assistant's messages in chat, all tokens in text."""
        return next(iter(self.counted))

    def by_document(self) -> Split:
        """The same split of text, with each document in its own context, which begins with an `<|endoftext|>`."""
        ends = np.flatnonzero(self.ids[1:] == self.ids[0]) + 2
        if not len(ends) or ends[-1] < len(self.ids):
            ends = np.append(ends, len(self.ids))
        return dataclasses.replace(self, spans=list(itertools.pairwise([1, *ends.tolist()])))


def read_split(
    name: str, stream: TokenStream, is_chat: bool, limit: int | None = None, tokenizer: Tokenizer | None = None
) -> Split:
    """The first `limit` tokens of a split (None: all), ready to be scored; for chat, only whole conversations.

    With a `tokenizer` other than the stream's, the text is re-encoded. Raises UserError if nothing is left to score.
    """
    tokenizer = tokenizer or stream.tokenizer
    first = 0 if not is_chat and stream.read(0, 1)[0] == stream.tokenizer.endoftext and len(stream) > 1 else -1
    available = len(stream) - (first + 1)
    end = first + 1 + min(limit or available, available)
    ids, is_trained, is_whole = stream.read(first, end), stream.is_trained(first, end), end == len(stream)
    if tokenizer != stream.tokenizer:
        ids, is_trained = reencode(ids, is_trained, is_chat, stream.tokenizer, tokenizer)
    if is_chat:
        ids, spans = _whole_conversations(ids, tokenizer.endoftext, is_whole)
    else:
        spans = [(1, len(ids))]
    is_scored = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        is_scored[start:end] = True
    if not is_scored.any():
        raise UserError(f"{name}: --limit {limit} is shorter than the first conversation; use a larger --limit")
    unit, unit_name = _units(ids, tokenizer.endoftext, "conversations" if is_chat else "documents")
    bytes_at = _bytes_at(ids, is_chat, tokenizer)
    counted = {"all": (is_scored, int(bytes_at[1:].sum()))}
    if is_chat:  # the scope that matters most comes first
        is_assistant = assistant_targets(ids, tokenizer) & is_scored & is_trained[: len(ids)]
        counted = {"assistant": (is_assistant, int(id_bytes(tokenizer)[ids[is_assistant]].sum())), **counted}
    return Split(name, ids, spans, counted, unit, unit_name, bytes_at)


def _whole_conversations(
    ids: np.ndarray, endoftext: int, ends_the_stream: bool
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The ids up to the end of the last whole conversation, and the scored positions of each conversation."""
    ends = np.flatnonzero(ids == endoftext)[1:] + 1
    if ends_the_stream and (not len(ends) or ends[-1] < len(ids)):
        ends = np.append(ends, len(ids))  # the last conversation has no <|endoftext|>
    ids = ids[: ends[-1] if len(ends) else 1]
    starts = [1, *ends[:-1].tolist()]
    spans = [(start + 1, end) for start, end in zip(starts, ends.tolist(), strict=False) if end - start > 1]
    return ids, spans


def _units(ids: np.ndarray, endoftext: int, documents_name: str) -> tuple[np.ndarray, str]:
    """The index of each position's document, or of its block if there are few documents; and the name of the units."""
    document = np.cumsum(ids == endoftext) - (ids == endoftext)
    if document[-1] >= MIN_DOCUMENTS:
        return document, documents_name
    return np.arange(len(ids)) // BLOCK_TOKENS, f"blocks of {BLOCK_TOKENS} tokens"


def id_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """The number of bytes of text for each id, (n_vocab,); 0 for a control token."""
    sizes = [len(tokenizer.token_bytes(token)) for token in range(tokenizer.endoftext)]
    return np.array([*sizes, 0, 0, 0])


def _bytes_at(ids: np.ndarray, is_chat: bool, tokenizer: Tokenizer) -> np.ndarray:
    """The bytes of text at each position (N + 1,); in chat those of contents alone, without roles."""
    bytes_at = id_bytes(tokenizer)[ids]
    if not is_chat:
        return bytes_at
    messages = tokenizer.message_spans(ids)
    steps = np.zeros(len(ids) + 1, dtype=int)  # +1 where a content starts, -1 after it; control tokens have no bytes
    steps[messages.content] += 1
    steps[messages.end] -= 1
    in_content = np.cumsum(steps[:-1]) > 0
    # The token with the role's newline may also hold white space at the start of the content.
    shared = (bytes_at[messages.content - 1] - 1).clip(min=0)
    bytes_at = np.where(in_content, bytes_at, 0)
    bytes_at[messages.content - 1] += shared
    return bytes_at
