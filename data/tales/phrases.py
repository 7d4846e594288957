"""The phrases of tales-phrases.json, and how a tale is filled with the values of its slots."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from data import templates
from data.templates import SLOT, PhraseBook, expand

BOOK = PhraseBook(Path(__file__).parent.with_name("tales-phrases.json"))


def choose(phrases: Sequence[str], rng: random.Random) -> str:
    """A random text of one of the templates; slots are left as they are."""
    return expand(BOOK.parse(rng.choice(phrases)), rng)


def choose_values(rng: random.Random, *choices: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A random text for each slot; later choices replace earlier ones of the same name."""
    merged = {slot: phrases for some in choices for slot, phrases in some.items()}
    return {slot: choose(phrases, rng) for slot, phrases in merged.items()}


def fill(text: str, values: Mapping[str, str]) -> str:
    """`text` with the values of its slots, and of the slots in those; a slot without a value is left as it is.

    >>> fill("the {hat}", {"hat": "{colour} hat", "colour": "red"})
    'the red hat'
    """
    while any(slot in values for slot in SLOT.findall(text)):
        text = SLOT.sub(lambda match: values.get(match[1], match[0]), text)
    return text


def with_articles(text: str) -> str:
    """`text` with "an" before a vowel.

    >>> with_articles("a orange hat")
    'an orange hat'
    """
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def names(kind: str) -> list[str]:
    """The names of the file for "she" or "he"."""
    return BOOK.load()["names"][kind].split()


def source_files() -> list[Path]:
    """The files that, with the seed, decide the tales."""
    return [BOOK.file, Path(templates.__file__), *sorted(Path(__file__).parent.glob("*.py"))]
