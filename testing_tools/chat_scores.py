"""The questions of chat_eval.py, and what is wrong with a reply to one of them.

The questions are in chat_eval_questions.json. None of them is in the chitchat data set.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data.chitchat.templates import assistant_words, words_of
from data.tales.short import ENDING
from setup_tokenizer import GPT2, IM_END, Tokenizer

if TYPE_CHECKING:
    from generation.decoding import DecodeStep
    from model import GPT

QUESTIONS_FILE = Path(__file__).with_name("chat_eval_questions.json")
MAX_REPLY_TOKENS, MAX_TALE_TOKENS = 60, 200
MAX_REPLY_WORDS, MAX_TALE_WORDS = 40, 80
TURNS = 8  # user messages of the conversations with names and facts
FACT_TURN = 2  # the user message that tells the fact
N_TALES = 20
RELATIVES = {"Mom", "Dad", "Grandma", "Grandpa"}  # other capitalized words that a tale may have
SUMS = ("openers", "names", "facts", "beyond", "tales", "first_tales")

# (messages, max_tokens=MAX_REPLY_TOKENS) -> the reply as text, with `<|im_end|>` at its end if the assistant ended it.
Reply = Callable[..., str]


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


def openers(questions: Mapping, limit: int | None = None) -> list[tuple[str, str, tuple[str, ...]]]:
    """All openers, or the first `limit` of each category: (category, text, patterns that no fitting reply matches)."""
    found = []
    for category, group in questions["openers"].items():
        for question in group["questions"][:limit]:
            own = question if isinstance(question, dict) else {"text": question, "never": []}
            found.append((category, own["text"], (*group["never"], *own["never"])))
    return found


def introductions(questions: Mapping) -> list[tuple[str, str]]:
    """All names with the line that introduces each; the phrasings alternate."""
    phrasings = questions["introductions"]
    return [(name, phrasings[i % len(phrasings)].format(name=name)) for i, name in enumerate(questions["names"])]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A user's message; the reply must contain `expected`, unless that is None."""

    text: str
    category: str = ""
    expected: str | None = None


def conversations(questions: Mapping) -> list[list[Turn]]:
    """The conversations of TURNS turns, one per name. Each of the first 40 also tells a fact and asks for it."""
    facts = [(kind, fact, value) for kind, fact in questions["facts"].items() for value in fact["values"]]
    fillers = questions["fillers"]
    made = []
    for number, (name, introduction) in enumerate(introductions(questions)):
        turns = [Turn(fillers[(3 * number + turn) % len(fillers)]) for turn in range(TURNS)]
        turns[0] = Turn(introduction)
        last = TURNS - 1
        if number < len(facts):
            kind, fact, value = facts[number]
            asked = FACT_TURN + 2 + number % 4
            turns[FACT_TURN] = Turn(fact["tell"].format(value=value))
            turns[asked] = Turn(fact["ask"], f"fact: {kind}", value)
            last -= asked == last
        turns[last] = Turn(questions["recall"], "name", name)
        made.append(turns)
    return made


def form_fault(reply: str, max_words: int = MAX_REPLY_WORDS) -> str | None:
    """Why a reply is wrong regardless of the question (unfinished, empty, too long, repetitive), or None."""
    if not reply.endswith(IM_END):
        return f"not ended with {IM_END}"
    words = words_of(reply.removesuffix(IM_END))
    if not words:
        return "empty"
    if "\n" in reply.strip() or IM_END in reply.removesuffix(IM_END):
        return "more than one line"
    if len(words) > max_words:
        return f"more than {max_words} words"
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


def value_fault(reply: str, value: str) -> str | None:
    """Why `reply` does not contain exactly that name or other value, or None if it does."""
    if fault := form_fault(reply):
        return fault
    return None if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reply) else f"not {value!r}"


def beyond_fault(reply: str, fits: str, offers: str, known: frozenset[str]) -> str | None:
    """Why `reply` does not admit (`fits`) that a question is too hard and say what else to do (`offers`), or None."""
    if fault := form_fault(reply):
        return fault
    if unknown := [word for word in words_of(reply.removesuffix(IM_END)) if word not in known]:
        return f"unexpected word {unknown[0]!r}"
    if not re.search(fits, reply, re.IGNORECASE):
        return "does not admit that it does not know"
    return None if re.search(offers, reply, re.IGNORECASE) else "does not say what it can do"


def tale_fault(reply: str, hero: str | None = None) -> str | None:
    """Why `reply` is not a whole tale about `hero`, or None.

    The hero must occur at least twice, and no other name. Within sentences, only names and RELATIVES are capitalized.
    Without a `hero`, it is the first name in the tale.
    """
    if fault := form_fault(reply, MAX_TALE_WORDS):
        return fault
    text = reply.removesuffix(IM_END).strip()
    if not text.endswith(ENDING):
        return f"does not end with {ENDING!r}"
    inside = re.findall(r"(?<=[\w,;] )[^\W\d_]{2,}", text)  # words that begin no sentence, without "I"
    names = [word for word in inside if word[0].isupper() and word not in RELATIVES]
    hero = hero or next(iter(names), "")
    if re.findall(r"[^\W\d_]+", text).count(hero) < 2:
        return "does not keep the hero"
    if re.search(r"(.)\1\1", hero):
        return f"{hero} is not a name"
    others = [name for name in names if name != hero]
    return f"has another name, {others[0]}" if others else None


def evaluate(reply: Reply, questions: Mapping | None = None, limit: int | None = None) -> list[Answer]:
    """Ask an assistant all questions; in the conversations it reads its own earlier replies.

    With `limit`, only the first so many of each kind of opener, conversations, each kind of question beyond small talk,
    and both kinds of tales.
    """
    questions = questions or load_questions()
    known = assistant_words()
    answers = []
    for category, question, never in openers(questions, limit):
        text = reply([user_says(question)])
        fits = questions["openers"][category]["fits"]
        answers.append(Answer(category, question, text, opener_fault(text, fits, never, known)))
    for turns in conversations(questions)[:limit]:
        answers += hold_conversation(reply, turns)
    beyond = questions["beyond"]
    for category, question in [(name, text) for name, group in beyond["questions"].items() for text in group[:limit]]:
        text = reply([user_says(question)])
        fault = beyond_fault(text, beyond["fits"], beyond["offers"], known)
        answers.append(Answer(f"beyond: {category}", question, text, fault))
    for number, (name, introduction) in enumerate(introductions(questions)[:N_TALES][:limit]):
        messages = [user_says(introduction)]
        messages += [assistant_says(reply(messages)), user_says(questions["tales"][number % len(questions["tales"])])]
        text = reply(messages, MAX_TALE_TOKENS)
        answers.append(Answer("tale", f"{introduction} / {messages[-1]['content']}", text, tale_fault(text, name)))
    for question in questions["tales"][:limit]:
        text = reply([user_says(question)], MAX_TALE_TOKENS)
        answers.append(Answer("first tale", question, text, tale_fault(text)))
    return answers


def hold_conversation(reply: Reply, turns: list[Turn]) -> list[Answer]:
    """Hold a conversation; returns the answers to its questions."""
    messages, answers = [], []
    for number, turn in enumerate(turns):
        messages.append(user_says(turn.text))
        text = reply(messages)
        messages.append(assistant_says(text))
        if turn.expected is not None:
            told = next(earlier.text for earlier in turns if turn.expected in earlier.text)
            question = f"{told} / {turn.text} (turn {number + 1})"
            answers.append(Answer(turn.category, question, text, value_fault(text, turn.expected)))
    return answers


def user_says(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant_says(reply: str) -> dict[str, str]:
    return {"role": "assistant", "content": reply.removesuffix(IM_END)}


def sum_of(category: str) -> str:
    """The member of SUMS to which the answers of a category are added."""
    kind = category.partition(":")[0]
    sums = {"name": "names", "fact": "facts", "beyond": "beyond", "tale": "tales", "first tale": "first_tales"}
    return sums.get(kind, "openers")


def scores(answers: list[Answer]) -> dict[str, dict[str, int]]:
    """The number of questions and of right replies by category, and for each of SUMS."""
    table: dict[str, dict[str, int]] = {}
    for answer in answers:
        for category in (answer.category, sum_of(answer.category)):
            row = table.setdefault(category, {"right": 0, "asked": 0})
            row["right"] += answer.fault is None
            row["asked"] += 1
    return {name: row for name, row in table.items() if name not in ("name", "tale", "first tale")}


def model_reply(model: GPT, tokenizer: Tokenizer = GPT2, decode: DecodeStep | None = None) -> Reply:
    """A model as an assistant that always takes the likeliest token, up to and including `<|im_end|>`."""
    from generation.decoding import decode_step, generate, new_cache
    from generation.sampling import GREEDY

    cache = new_cache(model)  # keeps the keys and values of the conversation between the turns

    def reply(messages: list[dict[str, str]], max_tokens: int = MAX_REPLY_TOKENS) -> str:
        prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)
        stop_ids = (tokenizer.im_end, tokenizer.endoftext)
        steps = generate(
            model, [prompt], max_tokens, GREEDY, stop_ids=stop_ids, cache=cache, decode=decode or decode_step
        )
        return tokenizer.enc.decode([int(ids[0]) for ids in steps])

    return reply
