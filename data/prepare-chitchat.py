"""Prepare chitchat: greetings, introductions, thanks and small talk, made on the spot without a download.

    python data/prepare-chitchat.py

Writes data/chitchat-train.bin, chitchat-val.bin, their text as .jsonl and chitchat.json. Expect 60,000 conversations
and about 4.7 million tokens in a few seconds. The conversations are put together from the templates in
chitchat-phrases.json by chitchat.py; they teach a tiny model to greet, to thank, to take leave, and to remember a
name or another fact that it was told. Licence: MIT, as the project.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules, from any working directory

from common.cli import UserError, option, parse_options, run_script
from data import chitchat
from data.corpus import Dataset, PrepareOptions, prepare
from setup_tokenizer import render_chat

DATASET = Dataset("chitchat", "chat", "made by data/chitchat.py from data/chitchat-phrases.json", "MIT")


@dataclasses.dataclass(frozen=True)
class ChitchatOptions(PrepareOptions):
    conversations: int = option(60_000, "number of distinct conversations to make")

    def __post_init__(self):
        super().__post_init__()
        if self.conversations < 2:
            raise ValueError(f"conversations must be at least 2, not {self.conversations}")


def main() -> None:
    options = parse_options(ChitchatOptions, __doc__)
    if options.input:
        raise UserError(
            "prepare-chitchat.py makes its conversations itself and reads no --input; "
            "for conversations of your own run: python prepare_with_extended_tokenizer.py --input FILE --name NAME"
        )
    conversations = chitchat.generate(options.conversations, options.seed)
    # The generator's own files are the input: when they change, the data set is made again.
    prepare(DATASET, options, conversations, inputs=chitchat.SOURCE_FILES)
    print(f"\nA conversation:\n\n{render_chat(next(chitchat.generate(1, options.seed)))}")


if __name__ == "__main__":
    run_script(main)
