"""Look at how a text is tokenized: each piece with its id, and whether decoding gives the text back.

    python testing_tools/quick_test.py "Hello <|im_start|>user text <|im_end|>"
    python testing_tools/quick_test.py --control "Hello <|im_start|>user text <|im_end|>"

Expect one line a piece. Without `--control` a control token's spelling is ordinary text, as in a document.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import option, parse_options, run_script
from setup_tokenizer import (
    encode_text,
    encode_with_extended_tokenizer,
    get_extended_tokenizer,
    token_text,
)


@dataclass(frozen=True)
class QuickTestOptions:
    text: str = option("Hello, how are you today? I'm fine.", "the text to encode", positional=True)
    control: bool = option(False, "let <|im_start|>, <|im_end|> and <|endoftext|> be control tokens")


def main() -> int:
    options = parse_options(QuickTestOptions, __doc__)
    ids = encode_with_extended_tokenizer(options.text) if options.control else encode_text(options.text)
    for token in ids:
        print(f"{token:>6}  [{token_text(token)}]")
    decoded = get_extended_tokenizer().decode(ids)
    same = decoded == options.text
    print(f"{len(options.text)} characters, {len(ids)} tokens; decoded again: {'the same' if same else repr(decoded)}")
    return 0 if same else 1


if __name__ == "__main__":
    run_script(main)
