"""Tales of one line for a chat: a hero, a wish, a trouble, an animal that helps, and a happy end.

    >>> short_tale(random.Random(3), "Zorvan").startswith("Once upon a time, Zorvan wanted to")
    True

A very small model learns them, so there are few words, regular sentences and one kind of ending. The hero can be
anybody, so no pronoun refers to the hero.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from data import templates
from data.templates import SLOT, PhraseBook, expand

BOOK = PhraseBook(Path(__file__).parent.with_name("tales-phrases.json"))
ENDING = "The end."


def short_tale(rng: random.Random, hero: str | None = None) -> str:
    """A tale of six short sentences on one line, at most 60 words; the last sentence is `The end.`

    `hero` is any name, kept as it is; None stands for one of the names of the file. The hero is named two to four
    times, and the first sentence tells what the hero wanted.
    """
    short = BOOK.load()["short"]
    plot = rng.choice(short["plots"])
    trouble = rng.choice(plot["troubles"])
    lines = [
        _text(plot.get("openings", short["openings"]), rng),
        _text([trouble["trouble"]], rng),
        _text(plot.get("meetings", short["meetings"]), rng),
        _text([trouble["help"]], rng),
        _text(plot["endings"], rng),
    ]
    choices = {**short["values"], **plot["values"], **trouble.get("values", {})}
    values = {slot: rng.choice(texts) for slot, texts in choices.items()}
    values |= {"wish": _text(plot["wish"], rng), "helper": rng.choice(trouble["helpers"])}
    tale = with_articles(fill(" ".join((*lines, ENDING)), values))
    return tale.replace("{hero}", hero or rng.choice(hero_names()))


def hero_names() -> list[str]:
    """The names of the file."""
    return " ".join(BOOK.load()["names"].values()).split()


def fill(text: str, values: Mapping[str, str]) -> str:
    """`text` with the values of its slots, and of the slots in those; a slot without a value is left as it is."""
    while any(slot in values for slot in SLOT.findall(text)):
        text = SLOT.sub(lambda match: values.get(match[1], match[0]), text)
    return text


def with_articles(text: str) -> str:
    """`text` with "an" before a vowel: a orange hat -> an orange hat."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _text(templates: Sequence[str], rng: random.Random) -> str:
    return expand(BOOK.parse(rng.choice(templates)), rng)


def source_files() -> list[Path]:
    """The files that, with the seed, decide the tales."""
    return [BOOK.file, Path(templates.__file__), *sorted(Path(__file__).parent.glob("*.py"))]
