"""Show with an example how the historical extended tokenizer, a wrapper, extends GPT-2's tokenizer.

    python testing_tools/extended_tokenizer.py
    python testing_tools/extended_tokenizer.py "Hello <|im_start|>user text <|im_end|>"

Prints the tokens that the wrapper adds, the ids of a text, and whether `setup_tokenizer` gives the same ids. The
wrapper is in wrapped_tokenizer.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wrapped_tokenizer import ExtendedTokenizerWrapper

from common.cli import option, parse_options, run_script
from setup_tokenizer import encode_with_extended_tokenizer, token_text


@dataclass(frozen=True)
class WrapperOptions:
    """The text to tokenize."""

    text: str = option("Hello <|im_start|>user text <|im_end|>", "the text to tokenize", positional=True)


def main() -> int:
    options = parse_options(WrapperOptions, __doc__)
    wrapper = ExtendedTokenizerWrapper()
    print(f"GPT-2's tokenizer has the ids 0 to {wrapper.base.n_vocab - 1}. The wrapper splits a text at these tokens:")
    for spelling, token in wrapper.special_tokens.items():
        pieces = wrapper.base.encode(spelling, allowed_special="all")
        new = "GPT-2's own" if len(pieces) == 1 else f"new; GPT-2's tokenizer needs {len(pieces)} tokens for it"
        print(f"  {spelling:<14} id {token}  ({new})")
    ids = wrapper.encode(options.text)
    print(f"\nExample: {options.text}")
    for token in ids:
        print(f"  {token:>6}  [{token_text(token)}]")
    same = ids == encode_with_extended_tokenizer(options.text)
    print(f"setup_tokenizer's tokenizer, which the scripts use, gives {'the same' if same else 'OTHER'} ids.")
    return 0 if same else 1


if __name__ == "__main__":
    run_script(main)
