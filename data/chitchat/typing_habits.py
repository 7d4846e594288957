"""What people do to a text when they type it: case, punctuation, fillers and typing errors."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from data.chitchat.templates import load_phrases


def type_like_a_person(text: str, rng: random.Random) -> str:
    """`text` with other case, punctuation, fillers and typing errors; slots are left as they are."""
    noise = load_phrases()["noise"]
    if rng.random() < 0.35:  # two sentences instead of one
        stop = rng.choice(".!")
        text = re.sub(r", ([a-zA-Z])", lambda match: f"{stop} {match[1].upper()}", text)
    if rng.random() < 0.06:
        text = rng.choice(noise["before"]) + text
    if rng.random() < 0.06:
        text = _mistype(text, rng)
    is_question = text.endswith("?")
    text = text.removesuffix("?")
    if not text.endswith("}"):
        text = text[:1].upper() + text[1:] if rng.random() < 0.7 else text
    elif not text.startswith("{"):
        text = text[:1].upper() + text[1:] if rng.random() < 0.8 else text
    style = rng.random()
    if style < 0.1:
        text = _outside_slots(str.lower, text)
    elif style < 0.12:
        text = _outside_slots(str.upper, text)
    if "'" in text:
        text = text.replace("'", rng.choices(["'", "", "’"], [85, 10, 5])[0])
    if rng.random() < 0.03:
        return text + rng.choice(noise["after"])
    if is_question:
        return text + rng.choices(["?", "", "??", "?!"], [80, 16, 3, 1])[0]
    return text + rng.choices([".", "!", "", "...", "!!"], [42, 23, 30, 3, 2])[0]


def _outside_slots(change: Callable[[str], str], text: str) -> str:
    """`change` applied to the text between the slots."""
    return "".join(part if part.startswith("{") else change(part) for part in re.split(r"(\{\w+\})", text))


def _mistype(text: str, rng: random.Random) -> str:
    """`text` with one letter of a longer word swapped, left out or doubled."""
    words = list(re.finditer(r"(?<![\w{])[A-Za-z]{4,}(?![\w}'])", text))
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    here, after = text[at], text[at + 1]
    return text[:at] + rng.choice([after + here, after, here + here + after]) + text[at + 2 :]
