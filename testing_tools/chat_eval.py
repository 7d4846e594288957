"""Measure how well a model chats, with fixed questions that are not in the chitchat data set.

    python testing_tools/chat_eval.py models/talk.pt --verbose

- openers: 40 opening messages, each of which needs a fitting reply
- names: 50 names, told at the beginning of a conversation of 8 turns and asked for at its end
- facts: 40 facts (a pet, a town, a colour), told in these conversations and asked for two to five turns later
- beyond: 40 questions beyond small talk, which need an honest reply that says what the model can do
- tales: 20 requests for a story, which must end properly and keep its hero, the user
- first_tales: 5 requests for a story as the first message; the hero may have any name

Prints every failure with its reason, then a table of scores. Replies are decoded greedily, so a model always gets the
same scores. The questions are in chat_eval_questions.json.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chat_scores import SUMS, Answer, evaluate, load_questions, model_reply, scores, sum_of

from common.cli import check_options, option, parse_options, run_script
from common.device import choose_device, choose_dtype, device_option, dtype_option, plain_option
from common.files import atomic_write
from common.speedups import load_speedups
from setup_tokenizer import IM_END, Tokenizer


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """What to ask, and what to print."""

    checkpoint: str = option(None, "the checkpoint to evaluate", positional=True, nargs=None)
    device: str | None = device_option(None)
    dtype: str | None = dtype_option(None)
    plain: bool = plain_option(None)
    json: str | None = option(None, "also write scores and all replies to this file", metavar="FILE")
    verbose: bool = option(False, "print every reply, not only the failures")
    limit: int | None = option(None, "ask only the first N questions of each kind", at_least=1, metavar="N")
    summary: bool = option(False, "print only the scores")

    def __post_init__(self) -> None:
        check_options(self)


def print_replies(answers: list[Answer], verbose: bool) -> None:
    """Print the failures, or all replies with `verbose`."""
    for answer in (answer for answer in answers if verbose or answer.fault):
        print(f"{'wrong' if answer.fault else 'right'}  {answer.category}: {answer.question}")
        print(f"       -> {answer.reply.removesuffix(IM_END)}{f'   ({answer.fault})' if answer.fault else ''}")
    print()


def print_scores(answers: list[Answer], questions: Mapping, names: Collection[str] | None = None) -> None:
    """Print the table of scores, of all kinds or those of `names`, and how varied the honest replies are."""
    print(f"{'kind':<20}{'right':>6}{'asked':>7}")
    table = {name: row for name, row in scores(answers).items() if names is None or name in names}
    for category in sorted(table, key=lambda name: SUMS.index(name) if name in SUMS else -1):
        print(f"{category:<20}{table[category]['right']:>6}{table[category]['asked']:>7}")
    admits = re.compile(questions["beyond"]["fits"], re.IGNORECASE)
    honest = {answer.reply for answer in answers if sum_of(answer.category) == "beyond" and not answer.fault}
    n_shy = sum(bool(admits.search(answer.reply)) for answer in answers if sum_of(answer.category) == "openers")
    print(f"\nhonest replies beyond small talk: {len(honest)} different ones, and {n_shy} to openers")


def main() -> None:
    options = parse_options(EvalOptions, __doc__)
    fast = load_speedups(options.plain)
    if fast:
        fast.keep_freed_memory()  # before the first tensor is allocated
    from exchange.loading import load_model

    device = choose_device(options.device)
    model, info = load_model(options.checkpoint, device, choose_dtype(options.dtype, device))
    if info.get("format") != "chat":
        print(f"note: {options.checkpoint} was trained on {info.get('dataset')}, which contains no conversations")
    decode = fast.speed_up_generation(model).decode if fast else None
    answers = evaluate(model_reply(model, Tokenizer.from_info(info, options.checkpoint), decode), limit=options.limit)
    if not options.summary:
        print_replies(answers, options.verbose)
    print_scores(answers, load_questions(), SUMS if options.summary else None)
    if options.json:
        content = {
            "checkpoint": options.checkpoint,
            "scores": scores(answers),
            "answers": [dataclasses.asdict(answer) for answer in answers],
        }
        with atomic_write(options.json, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)


if __name__ == "__main__":
    run_script(main)
