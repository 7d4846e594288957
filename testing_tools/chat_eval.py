"""Measure how well a model chats: 40 openers that need a fitting reply, and 50 names to remember for one turn.

    python testing_tools/chat_eval.py models/chitchat1700.pt --verbose

Prints every failure with its reason, then a table with the score for each kind of opener and for the names. The
questions in chat_eval_questions.json are fixed, and none of the openers and names is in the chitchat data set. Replies
are decoded greedily, so a model always gets the same score.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import option, parse_options, run_script
from common.device import choose_device, choose_dtype, device_option, dtype_option
from common.files import atomic_write
from data.chitchat.templates import assistant_words, words_of
from setup_tokenizer import GPT2, IM_END, Tokenizer

if TYPE_CHECKING:
    from model import GPT

QUESTIONS_FILE = Path(__file__).with_name("chat_eval_questions.json")
MAX_REPLY_TOKENS = 60
MAX_REPLY_WORDS = 40

# Messages -> the reply as text, with `<|im_end|>` at its end if the assistant ended it.
Reply = Callable[[list[dict[str, str]]], str]


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    checkpoint: str = option(None, "the checkpoint to evaluate", positional=True, nargs=None)
    device: str | None = device_option(None)
    dtype: str | None = dtype_option(None)
    json: str | None = option(None, "also write scores and all replies to this file", metavar="FILE")
    verbose: bool = option(False, "print every reply, not only the failures")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question and its reply; `fault` says why the reply counts as wrong, None if it is right."""

    category: str
    question: str
    reply: str
    fault: str | None


def load_questions() -> dict:
    """The fixed questions."""
    return json.loads(QUESTIONS_FILE.read_text(encoding="utf-8"))


def openers(questions: Mapping) -> list[tuple[str, str, tuple[str, ...]]]:
    """All openers as (category, text, patterns that a fitting reply must not match)."""
    found = []
    for category, group in questions["openers"].items():
        for question in group["questions"]:
            own = question if isinstance(question, dict) else {"text": question, "never": []}
            found.append((category, own["text"], (*group["never"], *own["never"])))
    return found


def introductions(questions: Mapping) -> list[tuple[str, str]]:
    """All names with the line that introduces each; the phrasings alternate."""
    phrasings = questions["introductions"]
    return [(name, phrasings[i % len(phrasings)].format(name=name)) for i, name in enumerate(questions["names"])]


def form_fault(reply: str) -> str | None:
    """Why a reply is wrong regardless of the question (unfinished, empty, too long, repetitive), or None."""
    if not reply.endswith(IM_END):
        return f"not ended with {IM_END}"
    words = words_of(reply.removesuffix(IM_END))
    if not words:
        return "empty"
    if "\n" in reply.strip() or IM_END in reply.removesuffix(IM_END):
        return "more than one line"
    if len(words) > MAX_REPLY_WORDS:
        return f"more than {MAX_REPLY_WORDS} words"
    if any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2)):
        return "repeats a word three times"
    return None


def opener_fault(reply: str, fits: tuple[str, ...], never: tuple[str, ...], known: frozenset[str]) -> str | None:
    """Why `reply` does not fit an opener, or None if it does.

    It must match a pattern of `fits` and none of `never`, and use only words that the assistant uses in the data
    (`known`), so that an invented word or a name that nobody gave is a fault.
    """
    if fault := form_fault(reply):
        return fault
    text = reply.removesuffix(IM_END).replace("’", "'")
    if unknown := [word for word in words_of(text) if word not in known]:
        return f"unexpected word {unknown[0]!r}"
    if matched := [pattern for pattern in never if re.search(pattern, text, re.IGNORECASE)]:
        return f"unfitting: matches {matched[0]}"
    if not any(re.search(pattern, text, re.IGNORECASE) for pattern in fits):
        return "not a reply to this kind of opener"
    return None


def name_fault(reply: str, name: str) -> str | None:
    """Why `reply` does not contain exactly that name, or None if it does."""
    if fault := form_fault(reply):
        return fault
    return None if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", reply) else "another name, or none"


def evaluate(reply: Reply, questions: Mapping | None = None) -> list[Answer]:
    """Ask an assistant all questions.

    For the names, the first message introduces the user, the assistant answers in its own words, and is then asked for
    the name.
    """
    questions = questions or load_questions()
    known = assistant_words()
    answers = []
    for category, question, never in openers(questions):
        text = reply([{"role": "user", "content": question}])
        fits = questions["openers"][category]["fits"]
        answers.append(Answer(category, question, text, opener_fault(text, fits, never, known)))
    for name, introduction in introductions(questions):
        messages = [{"role": "user", "content": introduction}]
        messages.append({"role": "assistant", "content": reply(messages).removesuffix(IM_END)})
        messages.append({"role": "user", "content": questions["recall"]})
        text = reply(messages)
        question = f"{introduction} / {messages[1]['content']} / {questions['recall']}"
        answers.append(Answer("name", question, text, name_fault(text, name)))
    return answers


def scores(answers: list[Answer]) -> dict[str, dict[str, int]]:
    """The number of questions and of right replies by category, and for all openers together."""
    table: dict[str, dict[str, int]] = {}
    for answer in answers:
        for category in (answer.category, "openers" if answer.category != "name" else "names"):
            row = table.setdefault(category, {"right": 0, "asked": 0})
            row["right"] += answer.fault is None
            row["asked"] += 1
    del table["name"]
    return table


def print_report(answers: list[Answer], verbose: bool) -> None:
    """Print the failures (all replies with `verbose`), then the table of scores."""
    shown = [answer for answer in answers if verbose or answer.fault]
    for answer in shown:
        print(f"{'wrong' if answer.fault else 'right'}  {answer.category}: {answer.question}")
        print(f"       -> {answer.reply.removesuffix(IM_END)}{f'   ({answer.fault})' if answer.fault else ''}")
    print(f"\n{'kind':<14}{'right':>6}{'asked':>7}")
    table = scores(answers)
    for category in sorted(table, key=lambda name: name in ("openers", "names")):
        print(f"{category:<14}{table[category]['right']:>6}{table[category]['asked']:>7}")
    fitting, names = table["openers"], table["names"]
    print(f"\nfitting replies: {fitting['right']} of {fitting['asked']}")
    print(f"names remembered: {names['right']} of {names['asked']} ({100 * names['right'] / names['asked']:.0f} %)")


def model_reply(model: GPT, tokenizer: Tokenizer = GPT2) -> Reply:
    """A model as an assistant that always takes the likeliest token, up to and including `<|im_end|>`."""
    from generation.decoding import generate, new_cache
    from generation.sampling import GREEDY

    cache = new_cache(model)  # keeps the keys and values of the conversation between the turns

    def reply(messages: list[dict[str, str]]) -> str:
        prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)
        stop_ids = (tokenizer.im_end, tokenizer.endoftext)
        steps = generate(model, [prompt], MAX_REPLY_TOKENS, GREEDY, stop_ids=stop_ids, cache=cache)
        return tokenizer.enc.decode([int(ids[0]) for ids in steps])

    return reply


def main() -> None:
    options = parse_options(EvalOptions, __doc__)
    from exchange.loading import load_model

    device = choose_device(options.device)
    model, info = load_model(options.checkpoint, device, choose_dtype(options.dtype, device))
    if info.get("format") != "chat":
        print(f"note: {options.checkpoint} was trained on {info.get('dataset')}, which contains no conversations")
    answers = evaluate(model_reply(model, Tokenizer.from_info(info, options.checkpoint)))
    print_report(answers, options.verbose)
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
