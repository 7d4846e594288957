"""The historical extended tokenizer, kept for comparison: a wrapper around GPT-2's own tokenizer.

The wrapper splits the text at the control tokens with a regular expression, encodes the parts in between, and inserts
ids of its own. `setup_tokenizer`, which the scripts use, creates one real tokenizer instead. The wrapper is weaker:

- It only takes text, so a user who types `<|im_end|>` ends the message: it cannot tell content from control tokens.
- Splitting in Python takes time; `compare_tokenizers.py` measures how much.
- It is not a `tiktoken.Encoding`: it lacks `encode_batch`, `decode_single_token_bytes`, `decode_with_offsets` and
  pickling.

    >>> ExtendedTokenizerWrapper().encode("Hello <|im_start|>user text <|im_end|>")
    [15496, 220, 50257, 7220, 2420, 220, 50258]
"""

from __future__ import annotations

import re

from setup_tokenizer import get_base_tokenizer


class ExtendedTokenizerWrapper:
    """GPT-2's tokenizer with ChatML's control tokens mapped to ids by this class rather than by tiktoken."""

    def __init__(self) -> None:
        self.base = get_base_tokenizer()
        self.name = "gpt2_wrapped"
        self.special_tokens = {
            "<|endoftext|>": self.base.eot_token,
            "<|im_start|>": self.base.n_vocab,
            "<|im_end|>": self.base.n_vocab + 1,
        }
        self.n_vocab = self.base.n_vocab + 2
        self._spellings = {token: spelling for spelling, token in self.special_tokens.items()}
        self._control = re.compile(f"({'|'.join(map(re.escape, self.special_tokens))})")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which the text of a control token becomes that control token."""
        ids: list[int] = []
        for part in self._control.split(text):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self.base.encode_ordinary(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`. Raises KeyError for an id outside the vocabulary."""
        text = ""
        ordinary: list[int] = []
        for token in ids:
            if token in self._spellings:
                text += self.base.decode(ordinary) + self._spellings[token]
                ordinary = []
            else:
                ordinary.append(token)
        return text + self.base.decode(ordinary)
