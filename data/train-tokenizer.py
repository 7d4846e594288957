"""Learn a tokenizer from your own text: a byte-level BPE vocabulary of the size that you choose.

    python data/train-tokenizer.py --input stories.txt --vocab_size 4096 --name tales
    python data/train-tokenizer.py --input articles/ --vocab_size 16384 --pattern multilingual --name world

Reads what prepare_with_extended_tokenizer.py reads: text, web pages, books, records and conversations, of which it
takes the contents of the messages. `--vocab_size` counts every id: the 256 bytes, the merges and the three control
tokens, `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`, which are the last ids. Writes data/NAME-tokenizer.json, which
Hugging Face's tokenizers and transformers can load, too. The same files give the same tokenizer, byte for byte.
docs/vocabulary.md explains how a vocabulary is learned and when one of your own is worth it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import parse_options, run_script
from data.tokenizer_training import TrainTokenizerOptions, train_tokenizer


def main() -> None:
    train_tokenizer(parse_options(TrainTokenizerOptions, __doc__))


if __name__ == "__main__":
    run_script(main)
