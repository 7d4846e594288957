"""The first approach to the extended tokenizer, kept for comparison: a wrapper around GPT-2's own one.

It cuts the text at the control tokens with a regular expression, encodes what lies between, and puts ids of its own
in between. The scripts use `setup_tokenizer`, which makes one real tokenizer instead. For text without forgeries both
give the same ids; what is weaker here:

- Text is all that it takes, so a person who types `<|im_end|>` ends the message: content and control look alike.
- Cutting in Python costs time; `compare_tokenizers.py` measures how much.
- It is no `tiktoken.Encoding`: `encode_batch`, `decode_single_token_bytes`, `decode_with_offsets` and pickling by
  tiktoken are missing, and its ids are written down here a second time.

    >>> ExtendedTokenizerWrapper().encode("Hello <|im_start|>user text <|im_end|>")
    [15496, 220, 50257, 7220, 2420, 220, 50258]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from setup_tokenizer import get_base_tokenizer


class ExtendedTokenizerWrapper:
    """GPT-2's tokenizer with ChatML's control tokens mapped to ids by this class rather than by tiktoken."""

    def __init__(self):
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
        """Ids of `text`; every spelling of a control token in it becomes that control token."""
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
