"""Show how a text is tokenized: each piece with its id, and whether decoding returns the same text.

    python testing_tools/quick_test.py "Hello <|im_start|>user text <|im_end|>"
    python testing_tools/quick_test.py --control "Hello <|im_start|>user text <|im_end|>"

Prints one line per piece. Without `--control`, the text `<|im_end|>` is ordinary text, as it is in a document.
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
    control: bool = option(False, "treat <|im_start|>, <|im_end|> and <|endoftext|> as control tokens")


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
