"""Prepare tales: short stories about a wish, a problem and a helper, generated locally without a download.

    python data/prepare-tales.py

prints:

    tales: made by data/tales from data/tales-phrases.json
    licence: MIT
    train: 28,532 documents, 5,975,799 tokens in tales-train.bin
    val: 1,468 documents, 309,098 tokens in tales-val.bin

The stories are simpler and more uniform than TinyStories (data/prepare-story.py). A small model with a small vocabulary
(data/train-tokenizer.py, docs/vocabulary.md) learns to tell such stories on a CPU. Then run:
python train.py --dataset tales
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import UserError, option, parse_options, run_script
from data.advice import print_advice
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare
from data.tales.long import generate
from data.tales.phrases import source_files

DATASET = Dataset("tales", "text", "made by data/tales from data/tales-phrases.json", "MIT")


@dataclasses.dataclass(frozen=True)
class TalesOptions(PrepareOptions):
    stories: int = option(30_000, "number of distinct stories to generate", at_least=2, metavar="N", group="data")


def main() -> None:
    options = parse_options(TalesOptions, __doc__)
    if options.input:
        raise UserError(
            "prepare-tales.py generates its stories and reads no --input; "
            "for stories of your own run: python prepare_with_extended_tokenizer.py --input FILE --name NAME"
        )
    # The generator's own files count as the input, so that the data is prepared again when they change.
    info = prepare(DATASET, options, Corpus(generate(options.stories, options.seed), files=source_files()))
    print(f"\nA story:\n\n{next(generate(1, options.seed))}")
    print_advice(info, options.output_dir)


if __name__ == "__main__":
    run_script(main)
