"""Tales of 80 to 200 words with dialogue, for training on stories: a hero, a wish, a trouble, a helper, an ending.

    tale(random.Random(1337))

Each part comes from the templates under "long" in tales-phrases.json. Values are chosen once per tale, so the hero
keeps its name and pronouns, what is in the bag at the beginning is shared at the end, and the helper is in the ending.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import numpy as np

from data.dedup import DigestSet
from data.tales.phrases import BOOK, choose, choose_values, fill, names, with_articles

FEWEST_WORDS, MOST_WORDS = 80, 200
HUMAN_FRACTION = 0.75  # of the heroes
PARTS = ("trouble", "attempt", "said", "offer", "deed")  # of a trouble, each one template
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}


def tale(rng: random.Random) -> str:
    """A tale of FEWEST_WORDS to MOST_WORDS words in two to five paragraphs, separated by empty lines."""
    while True:
        text = _any_length(rng)
        if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS:
            return text


def _any_length(rng: random.Random) -> str:
    long = BOOK.load()["long"]
    plot = rng.choice(long["plots"])
    trouble = rng.choice(plot["troubles"])
    values = choose_values(rng, long["values"], plot["values"], trouble["values"])
    values |= {part: choose([trouble[part]], rng) for part in PARTS}
    values |= {"wish": choose(plot["wish"], rng), "result": choose(plot["result"], rng)}
    values["wish_said"] = values["wish"].replace("{his}", "my")
    values |= _people(rng, rng.choice(trouble["helpers"]))
    return with_articles(fill(values["shape"], values))


def _people(rng: random.Random, helper: str) -> dict[str, str]:
    """The slots for the hero and the helper: what they are, their names and their pronouns."""
    long = BOOK.load()["long"]
    she_or_he = rng.choice(("she", "he"))
    if rng.random() < HUMAN_FRACTION:
        child, hero = {"she": "girl", "he": "boy"}[she_or_he], rng.choice(names(she_or_he))
    else:
        child, hero = rng.choice(long["heroes"]), rng.choice(long["names"][she_or_he].split())
    helper_is = next((kind for kind in ("she", "he") if helper in long[f"always_{kind}"]), rng.choice(("she", "he")))
    named = names(helper_is) if helper in long["people"] else long["names"][helper_is].split()
    friend = rng.choice([name for name in named if name != hero])
    return {
        **{"child": child, "hero": hero, "helper": helper, "friend": friend},
        **dict(zip(("he", "him", "his"), PRONOUNS[she_or_he], strict=True)),
        **{slot: word.capitalize() for slot, word in zip(("He", "Him", "His"), PRONOUNS[she_or_he], strict=True)},
        **dict(zip(("friend_he", "friend_him", "friend_his"), PRONOUNS[helper_is], strict=True)),
    }


def generate(count: int, seed: int = 1337) -> Iterator[str]:
    """`count` distinct tales; the same for the same seed."""
    rng = random.Random(seed)
    seen = DigestSet()
    while len(seen) < count:
        text = tale(rng)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if seen.add(np.frombuffer(digest, dtype="<u8").reshape(-1, 2))[0]:
            yield text
