"""Encode many documents at once, in half the time of encoding one by one, with the same ids."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np
import tiktoken

from common.token_patterns import GPT2_PATTERN
from data.cleaning import replace_surrogates
from setup_tokenizer import (
    ASCII_SPACES,
    ENDOFTEXT,
    GPT2,
    MAX_SPACES,
    SPACES,
    SPECIAL_TOKENS,
    Tokenizer,
    render_chat,
)

# GPT-2's pattern looks ahead only to leave the last white-space character of a run to the following word, and takes the
# rest of the run as one piece. Once such pieces of two or more characters are cut out of the text, this pattern finds
# the same pieces, and without the lookahead it takes less than half the time.
_FAST_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"""
_CUT_OUT = "<|white space|>"  # marks where a piece was cut out
_LONG_PIECE = re.compile(rf"[{SPACES}]{{2,}}(?:(?=[{SPACES}])|(?={'|'.join(map(re.escape, SPECIAL_TOKENS))}|\Z))")
_WIDE_SPACE = re.compile(f"[{SPACES.removeprefix(ASCII_SPACES)}]")


def encode_documents(documents: Sequence[str | Sequence[Mapping]], tokenizer: Tokenizer = GPT2) -> np.ndarray:
    """Ids (N,) in uint32 of documents, each a text or a conversation, one after another, each with `<|endoftext|>`.

    The ids are those of the tokenizer's `encode_document` and `encode_chat(..., end_of_conversation=True)`. Raises
    ValueError as `check_messages` does.
    """
    if not documents:
        return np.zeros(0, dtype=np.uint32)
    texts = [document if isinstance(document, str) else render_chat(document) for document in documents]
    n_messages = sum(len(document) for document in documents if not isinstance(document, str))
    joined = ENDOFTEXT.join([*texts, ""])
    has_spelled_token = joined.count("|>") != len(texts) + 2 * n_messages  # some document spells a control token
    with_long_spaces = _with_long_spaces(texts, joined)
    if has_spelled_token or any(len(texts[index]) >= MAX_SPACES for index in with_long_spaces):
        return np.concatenate([np.array(_encode_one(document, tokenizer), dtype=np.uint32) for document in documents])
    if tokenizer.enc._pat_str != GPT2_PATTERN:
        return _encode_joined(joined, tokenizer.enc)
    enc = _fast_encoding(tokenizer)
    long_pieces: list[str] = []
    for index in with_long_spaces:
        long_pieces += _LONG_PIECE.findall(texts[index])
        texts[index] = _LONG_PIECE.sub(_CUT_OUT, texts[index])
    if not long_pieces:
        return _encode_joined(joined, enc)
    ids = _encode_joined(ENDOFTEXT.join([*texts, ""]), enc)
    first, *others = np.split(ids, np.flatnonzero(ids == tokenizer.n_vocab))
    ids_of = {piece: np.array(tokenizer.encode_text(piece), dtype=np.uint32) for piece in set(long_pieces)}
    parts = (part for piece, other in zip(long_pieces, others, strict=True) for part in (ids_of[piece], other[1:]))
    return np.concatenate([first, *parts])


def _encode_one(document: str | Sequence[Mapping], tokenizer: Tokenizer) -> list[int]:
    if isinstance(document, str):
        return tokenizer.encode_document(document)
    return tokenizer.encode_chat(document, end_of_conversation=True)


@functools.cache
def _fast_encoding(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """The tokenizer with the fast pattern, and one more id that marks what was cut out."""
    enc = tokenizer.enc
    return tiktoken.Encoding(
        f"{enc.name}_fast",
        pat_str=_FAST_PATTERN,
        mergeable_ranks=enc._mergeable_ranks,
        special_tokens={**enc._special_tokens, _CUT_OUT: enc.n_vocab},
    )


def _encode_joined(joined: str, enc: tiktoken.Encoding) -> np.ndarray:
    """Ids of texts, each followed by `<|endoftext|>`, whose other control tokens all come from `render_chat`.

    tiktoken splits at control tokens before it applies the pattern, so each text is encoded on its own.
    """
    control_tokens = enc.special_tokens_set
    try:
        return enc.encode_to_numpy(joined, allowed_special=control_tokens, disallowed_special=())
    except UnicodeEncodeError:  # an unpaired surrogate, which tiktoken's other methods replace in this way
        joined = replace_surrogates(joined)
        return enc.encode_to_numpy(joined, allowed_special=control_tokens, disallowed_special=())


def _with_long_spaces(texts: Sequence[str], joined: str) -> list[int]:
    """Indices of the texts in which white space may form a piece of two or more characters.

    `joined` is every text followed by `<|endoftext|>`. Its bytes are searched all at once, which takes a small
    fraction of a regular expression's time.
    """
    data = np.frombuffer(_utf8(joined), dtype=np.uint8)
    is_blank = data <= ord(" ")  # includes control characters, which do no harm
    pairs = np.flatnonzero(is_blank[:-1] & is_blank[1:])
    is_before_token = (data[pairs + 2] == ord("<")) & (data[pairs + 3] == ord("|"))
    starts_piece = pairs[is_blank[pairs + 2] | is_before_token]
    lengths = [len(text) if text.isascii() else len(_utf8(text)) for text in texts]
    ends = np.cumsum(np.array(lengths, dtype=np.int64) + len(ENDOFTEXT))
    found = np.searchsorted(ends, starts_piece, side="right").tolist()
    if not joined.isascii():
        found += [index for index, text in enumerate(texts) if not text.isascii() and _WIDE_SPACE.search(text)]
    return sorted(set(found))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
