"""Prepare chitchat: greetings, small talk, facts to remember and tales, generated locally without a download.

    python data/prepare-chitchat.py

prints:

    chitchat: made by data/chitchat from data/chitchat-phrases.json
    licence: MIT
    train: 57,083 documents, 7,297,061 tokens in chitchat-train.bin
    val: 2,917 documents, 375,436 tokens in chitchat-val.bin

The conversations teach a tiny model to greet, to thank, to say goodbye, to remember a name or another fact that it was
told several turns before, to tell a short tale about the user, and to admit what it does not know. Then run: python
train.py --dataset chitchat
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import UserError, option, parse_options, run_script
from data.advice import print_advice
from data.chitchat.talks import generate, source_files
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare
from setup_tokenizer import render_chat

DATASET = Dataset("chitchat", "chat", "made by data/chitchat from data/chitchat-phrases.json", "MIT")


@dataclasses.dataclass(frozen=True)
class ChitchatOptions(PrepareOptions):
    conversations: int = option(
        60_000, "number of distinct conversations to generate", at_least=2, metavar="N", group="data"
    )


def main() -> None:
    options = parse_options(ChitchatOptions, __doc__)
    if options.input:
        raise UserError(
            "prepare-chitchat.py generates its conversations and reads no --input; "
            "for conversations of your own run: python prepare_with_extended_tokenizer.py --input FILE --name NAME"
        )
    # The generator's own files count as the input, so that the data is prepared again when they change.
    conversations = generate(options.conversations, options.seed)
    info = prepare(DATASET, options, Corpus(conversations, files=source_files()))
    print(f"\nA conversation:\n\n{render_chat(next(generate(1, options.seed)))}")
    print_advice(info, options.output_dir)


if __name__ == "__main__":
    run_script(main)
