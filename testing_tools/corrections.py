"""Feedback without a person: prompts of small talk, a model's replies to them, and their corrections by rules.

`make_preferences.py` writes the corrections, and `measure_teaching.py` measures what they have taught.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chat_scores import form_fault, load_questions, openers, user_says

from common.cli import UserError
from data.chitchat.talks import Talk
from data.dataset import open_dataset
from data.documents import read_prepared

if TYPE_CHECKING:
    import torch

    from generation.sampling import Sampling
    from model import GPT
    from setup_tokenizer import Tokenizer

TOPICS = ("greeting", "how_are_you", "thanks", "farewell")
HELD_OUT_PROMPTS = 100
PROMPTS_AT_ONCE = 16
MAX_REPLY_TOKENS = 100

# What a pirate says instead, in this order; then "Arr, " comes first.
PIRATE = (
    (r"\b(hello|hi|hey)( there)?\b", "ahoy"),
    (r"\byou are\b|\byou're\b", "ye be"),
    (r"\bI am\b|\bI'm\b", "I be"),
    (r"\bis\b", "be"),
    (r"\bgoodbye\b", "fair winds"),
    (r"\byour\b", "yer"),
    (r"\byou\b", "ye"),
    (r"\bmy\b", "me"),
    (r"\bfriend\b", "matey"),
)
# A reply is in the style if it contains one of these words.
PIRATE_WORDS = frozenset(("arr", "ahoy", "ye", "yer", "matey"))

Answer = Callable[[Sequence[str]], list[list[int]]]  # from prompts to the ids of a reply to each


# --- prompts ---


def first_messages(data_dir: str | Path, split: str) -> list[str]:
    """The distinct first messages of chitchat's conversations without a system prompt, in the order of the file.

    Raises UserError if chitchat is not prepared.
    """
    _, info = open_dataset(Path(data_dir), "chitchat")
    conversations = (document for document in read_prepared(Path(data_dir), info, split) if isinstance(document, list))
    return list(dict.fromkeys(messages[0]["content"] for messages in conversations if messages[0]["role"] == "user"))


def held_out_prompts(data_dir: str | Path) -> list[str]:
    """The first messages of the validation split on which the length of replies is measured."""
    return first_messages(data_dir, "val")[:HELD_OUT_PROMPTS]


def measured_prompts(data_dir: str | Path) -> set[str]:
    """The openers of chat_eval.py and the held-out prompts, in lower case."""
    held_out = (*held_out_prompts(data_dir), *(text for _, text, _ in openers(load_questions())))
    return {text.casefold() for text in held_out}


def training_prompts(data_dir: str | Path, seed: int) -> list[str]:
    """First messages of the training split in the order of the seed, without those that are measured."""
    measured = measured_prompts(data_dir)
    prompts = [text for text in first_messages(data_dir, "train") if text.casefold() not in measured]
    random.Random(seed).shuffle(prompts)
    return prompts


def opening_prompts(data_dir: str | Path, seed: int, count: int) -> list[str]:
    """Opening messages from chitchat's generator, TOPICS in turn: distinct, and without those that are measured."""
    rng = random.Random(seed)
    taken = measured_prompts(data_dir)
    found: list[str] = []
    for topic in itertools.cycle(TOPICS):
        if len(found) == count:
            return found
        talk = Talk(rng)
        talk.play(topic)
        text = talk.messages[0]["content"]
        if text.casefold() not in taken:
            taken.add(text.casefold())
            found.append(text)
    raise AssertionError("a cycle has no end")


# --- replies ---


def asked(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """The messages that ask for a reply to `prompt`, after the system message if there is one."""
    return [*([{"role": "system", "content": system}] if system else []), user_says(prompt)]


def replies(
    model: GPT,
    tokenizer: Tokenizer,
    sampling: Sampling,
    generator: torch.Generator | None,
    prompts: Sequence[str],
    system: str | None = None,
) -> list[list[int]]:
    """The ids of a reply to each prompt, with its `<|im_end|>` unless it reached MAX_REPLY_TOKENS."""
    from generation.decoding import ENDED, generate

    rows = [tokenizer.encode_chat(asked(prompt, system), add_generation_prompt=True) for prompt in prompts]
    stop_ids = (tokenizer.im_end, tokenizer.endoftext)
    steps = generate(model, rows, MAX_REPLY_TOKENS, sampling, generator=generator, stop_ids=stop_ids)
    columns = [ids.tolist() for ids in steps]
    return [[token for token in row if token != ENDED] for row in zip(*columns, strict=True)]


def as_pirate(reply: str) -> str:
    """A reply in a pirate's words.

    >>> as_pirate("Hello! How are you, my friend?")
    'Arr, ahoy! How are ye, me matey?'
    """
    for pattern, word in PIRATE:
        reply = re.sub(pattern, functools.partial(_cased, word), reply, flags=re.IGNORECASE)
    begins_with_i = re.match(r"I\b", reply) is not None
    return f"Arr, {reply if begins_with_i else reply[:1].lower() + reply[1:]}"


def _cased(word: str, match: re.Match[str]) -> str:
    """`word`, capitalized if the word that it replaces is."""
    return word[0].upper() + word[1:] if match[0][0].isupper() else word


def has_style(reply: str) -> bool:
    """Whether a reply contains one of PIRATE_WORDS."""
    return not PIRATE_WORDS.isdisjoint(re.findall(r"[a-z]+", reply.lower()))


# --- feedback ---


def pirate_corrections(
    answer: Answer, tokenizer: Tokenizer, prompts: Sequence[str], system: str | None = None
) -> Iterator[dict]:
    """A correction of the reply to each prompt; prompts without a proper reply are left out."""
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        batch = prompts[start : start + PROMPTS_AT_ONCE]
        for prompt, ids in zip(batch, answer(batch), strict=True):
            if (reply := proper_text(tokenizer, ids)) is not None:
                yield event(asked(prompt, system), reply, as_pirate(reply))


def short_corrections(
    answer: Answer, tokenizer: Tokenizer, prompts: Sequence[str], samples: int, first_sentence: bool = False
) -> Iterator[dict]:
    """The shortest of several replies to each prompt as the correction of the longest; only of different lengths.

    With `first_sentence`, the shortest reply is cut after its first sentence.
    """
    for prompt in prompts:
        drawn = answer([prompt] * samples)
        texts = {text: len(ids) for ids in drawn if (text := proper_text(tokenizer, ids)) is not None}
        if not texts:
            continue
        longest, shortest = max(texts, key=texts.__getitem__), min(texts, key=texts.__getitem__)
        better = re.split(r"(?<=[.!?]) ", shortest)[0] if first_sentence else shortest
        if better != longest and texts[shortest] < texts[longest] + first_sentence:
            yield event(asked(prompt), longest, better)


def proper_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """The text of a reply, or None if it is unfinished or malformed."""
    text = tokenizer.enc.decode(list(ids))
    return None if form_fault(text) else text.removesuffix("<|im_end|>")


def event(messages: Sequence[dict[str, str]], reply: str, correction: str) -> dict:
    """A correction of the reply to `messages` in the layout of the chat page's feedback."""
    return {"messages": [*messages, {"role": "assistant", "content": reply}], "correction": correction}


def take(corrections: Iterator[dict], count: int) -> list[dict]:
    """The first `count` corrections. Raises UserError if there are fewer."""
    found = [correction for _, correction in zip(range(count), corrections, strict=False)]
    if len(found) < count:
        raise UserError(f"only {len(found)} of {count} replies could be corrected; use a smaller --count")
    return found
