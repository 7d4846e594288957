"""Generate feedback on a model's replies for experiments: corrections into pirate speech, or shorter replies.

    python testing_tools/make_preferences.py models/chitchat1500.pt --style pirate --output pirate.jsonl
    python testing_tools/make_preferences.py models/chitchat1500.pt --style short --output short.jsonl

- pirate: the model's likeliest reply to a greeting, a thank-you, a farewell or "How are you?" from chitchat's generator
  is corrected into what a pirate would say, by the rules of `corrections.py`. With --system "Answer like a pirate.",
  that system message comes before the prompt.
- short: of several sampled replies to the first message of a conversation of chitchat's training split, the shortest
  corrects the longest. With --first_sentence, the shortest is cut after its first sentence.

The seed draws the prompts. None of them is an opener of chat_eval.py or a held-out prompt of measure_teaching.py.

Each line has the layout of the chat page's feedback: `messages` up to and including the reply, and `correction`. Then:

    python data/prepare-preferences.py --input pirate.jsonl --name pirate-pairs --tokenizer talk         # for DPO
    python prepare_with_extended_tokenizer.py --input pirate.jsonl --name pirate --tokenizer talk        # fine-tuning
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from corrections import opening_prompts, pirate_corrections, replies, short_corrections, take, training_prompts

from common.cli import option, parse_options, run_script
from common.device import choose_device, choose_dtype, device_option, dtype_option
from common.files import atomic_write

COUNTS = {"pirate": 30, "short": 200}


@dataclasses.dataclass(frozen=True)
class MakeOptions:
    checkpoint: str = option(None, "the model whose replies are corrected", positional=True, nargs=None)
    style: str = option("pirate", "what the corrections prefer", choices=tuple(COUNTS))
    count: int | None = option(None, "number of corrections (default: 30, or 200 short ones)", at_least=1, metavar="N")
    output: str | None = option(None, "file to write (default: STYLE.jsonl)", metavar="FILE")
    system: str | None = option(None, "pirate: system message before each prompt", metavar="TEXT")
    data_dir: str = option("data", "folder of the prepared data", metavar="DIR")
    samples: int = option(8, "short: replies to each prompt", at_least=2, metavar="N")
    first_sentence: bool = option(False, "short: cut the shortest reply after its first sentence")
    temperature: float = option(0.7, "short: temperature of the replies", above=0, metavar="X")
    seed: int = option(1337, "seed of the prompts and of the sampled replies", at_least=0, below=2**63, metavar="N")
    device: str | None = device_option(None)
    dtype: str | None = dtype_option(None)


def main() -> None:
    options = parse_options(MakeOptions, __doc__)
    import torch

    from exchange.loading import load_model, tokenizer_of
    from generation.sampling import GREEDY, Sampling

    device = choose_device(options.device)
    model, info = load_model(options.checkpoint, device, choose_dtype(options.dtype, device))
    tokenizer = tokenizer_of(options.checkpoint, info, model)
    count = options.count or COUNTS[options.style]
    if options.style == "pirate":
        answer = functools.partial(replies, model, tokenizer, GREEDY, None, system=options.system)
        prompts = opening_prompts(options.data_dir, options.seed, 2 * count)
        corrections = pirate_corrections(answer, tokenizer, prompts, options.system)
    else:
        generator = torch.Generator(device).manual_seed(options.seed)
        answer = functools.partial(replies, model, tokenizer, Sampling(options.temperature), generator)
        prompts = training_prompts(options.data_dir, options.seed)
        corrections = short_corrections(answer, tokenizer, prompts, options.samples, options.first_sentence)
    output = options.output or f"{options.style}.jsonl"
    taken = take(corrections, count)
    with atomic_write(output, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in taken)
    for each in taken[:5]:
        prompt, reply = (message["content"] for message in each["messages"][-2:])
        print(f"{prompt}\n  - {reply}\n  + {each['correction']}")
    print(f"{len(taken)} corrections in {output}")


if __name__ == "__main__":
    run_script(main)
