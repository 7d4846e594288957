"""Measure what teaching has changed in models that chat: style, fitting replies, names, length, loss on chitchat.

    python testing_tools/measure_teaching.py models/chitchat1500.pt models/chitchat+pirate300.pt

prints a row per model:

- style: replies to the 40 openers of chat_eval.py that contain a pirate's word; with --system, after that system
  message, while everything else is measured without it
- openers, names, facts, beyond, tales: the scores of chat_eval.py
- length: the mean length of the replies to 100 first messages of chitchat's validation split, in tokens without
  `<|im_end|>`, and how many different replies there are; to_openers: the mean length of those to the 40 openers
- loss: that of what the assistant says in the beginning of chitchat's validation split, in nats per token

All replies are decoded greedily. No prompt is one of those that make_preferences.py uses.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chat_scores import SUMS, evaluate, load_questions, model_reply, openers, scores
from corrections import has_style, held_out_prompts, replies

from common.cli import option, parse_options, run_script
from common.device import choose_device, choose_dtype, device_option, dtype_option
from common.files import atomic_write
from data.dataset import open_dataset

if TYPE_CHECKING:
    from evaluation.splits import Split
    from model import GPT
    from setup_tokenizer import Tokenizer

Respond = Callable[..., list[list[int]]]  # (prompts, system=None) -> the ids of a reply to each prompt

COLUMNS = ("style", *SUMS, "length", "different", "to_openers", "loss")


@dataclasses.dataclass(frozen=True)
class MeasureOptions:
    checkpoints: tuple[str, ...] = option((), "the models", positional=True, nargs="+")
    system: str | None = option(None, "system message before the openers whose style is counted", metavar="TEXT")
    data_dir: str = option("data", "folder of the prepared data", metavar="DIR")
    limit: int | None = option(100_000, "measure the loss on about the first N tokens", at_least=1, metavar="N")
    json: str | None = option(None, "also write the numbers and all replies to this file", metavar="FILE")
    device: str | None = device_option(None)
    dtype: str | None = dtype_option(None)


def opener_texts() -> list[str]:
    """The openers of chat_eval.py."""
    return [text for _, text, _ in openers(load_questions())]


def likeliest_replies(model: GPT, tokenizer: Tokenizer) -> Respond:
    """The model with greedy decoding."""
    from generation.sampling import GREEDY

    return lambda prompts, system=None: replies(model, tokenizer, GREEDY, None, prompts, system)


def measure_openers(respond: Respond, tokenizer: Tokenizer, system: str | None) -> tuple[dict[str, str], float]:
    """What the replies to the openers show: those in the style as {opener: reply}, and their mean length in tokens.

    The style is that after the system message if there is one, the length that without it.
    """
    prompts = opener_texts()
    plain = respond(prompts)
    found = plain if system is None else respond(prompts, system)
    texts = map(tokenizer.enc.decode, found)
    styled = {prompt: text for prompt, text in zip(prompts, texts, strict=True) if has_style(text)}
    return styled, reply_lengths(plain, tokenizer)[0]


def reply_lengths(found: Sequence[Sequence[int]], tokenizer: Tokenizer) -> tuple[float, int]:
    """The mean length of replies in tokens without `<|im_end|>`, and the number of different replies."""
    lengths = [len(ids) - ids.count(tokenizer.im_end) for ids in found]
    return statistics.mean(lengths), len(set(map(tuple, found)))


def chitchat_loss(model: GPT, split: Split, device: str, dtype: str) -> float:
    """The loss of what the assistant says, in nats per token, as evaluate.py measures it."""
    from evaluation.scoring import score, summarize

    losses, is_right = score(model, split, model.config.block_size // 2, device=device, dtype=dtype)
    return summarize(split, split.main_scope, losses, is_right)["loss"]


def measure(path: str, options: MeasureOptions, device: str) -> dict[str, Any]:
    """The numbers of COLUMNS for a model, and its answers."""
    from evaluation.splits import read_split
    from exchange.loading import load_model, tokenizer_of

    dtype = choose_dtype(options.dtype, device)
    model, info = load_model(path, device)
    tokenizer = tokenizer_of(path, info, model)
    streams, _ = open_dataset(Path(options.data_dir), "chitchat")
    split = read_split("chitchat", streams["val"], True, options.limit, tokenizer)
    respond = likeliest_replies(model, tokenizer)
    styled, to_openers = measure_openers(respond, tokenizer, options.system)
    answers = evaluate(model_reply(model, tokenizer))
    right = {name: row["right"] for name, row in scores(answers).items()}
    length, different = reply_lengths(respond(held_out_prompts(options.data_dir)), tokenizer)
    return {
        "checkpoint": path,
        "style": len(styled),
        **{name: right[name] for name in SUMS},
        "length": length,
        "different": different,
        "to_openers": to_openers,
        "loss": chitchat_loss(model, split, device, dtype),
        "styled": styled,
        "answers": [dataclasses.asdict(answer) for answer in answers],
    }


def main() -> None:
    options = parse_options(MeasureOptions, __doc__)
    device = choose_device(options.device)
    width = max(map(len, options.checkpoints))
    print(f"{'':<{width}} " + "".join(f"{name:>12}" for name in COLUMNS))
    measured = []
    for path in options.checkpoints:
        row = measure(path, options, device)
        measured.append(row)
        numbers = (f"{row[name]:.4f}" if name == "loss" else f"{row[name]:.4g}" for name in COLUMNS)
        print(f"{path:<{width}} " + "".join(f"{number:>12}" for number in numbers), flush=True)
    if options.json:
        with atomic_write(options.json, "w", encoding="utf-8") as file:
            json.dump(measured, file, ensure_ascii=False, indent=1)


if __name__ == "__main__":
    run_script(main)
