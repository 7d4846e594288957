"""Tales of one line for a chat: a hero, a wish, a trouble, an animal that helps, and a happy end.

    >>> short_tale(random.Random(3), "Zorvan").startswith("Once upon a time, Zorvan wanted to")
    True

A very small model learns them, so there are few words, regular sentences and one kind of ending. The hero can be
anybody, so no pronoun refers to the hero.
"""

from __future__ import annotations

import random

from data.tales.phrases import BOOK, choose, choose_values, fill, names, source_files, with_articles

__all__ = ["short_tale", "source_files"]

ENDING = "The end."


def short_tale(rng: random.Random, hero: str | None = None) -> str:
    """A tale of six short sentences on one line, at most 60 words; the last sentence is `The end.`

    `hero` can be any name and is kept as it is; by default it is one of the names in the file. The hero is named two to
    four times, and the first sentence tells what the hero wanted.
    """
    short = BOOK.load()["short"]
    plot = rng.choice(short["plots"])
    trouble = rng.choice(plot["troubles"])
    lines = [
        choose(plot.get("openings", short["openings"]), rng),
        choose([trouble["trouble"]], rng),
        choose(plot.get("meetings", short["meetings"]), rng),
        choose([trouble["help"]], rng),
        choose(plot["endings"], rng),
    ]
    values = choose_values(rng, short["values"], plot["values"], trouble.get("values", {}))
    values |= {"wish": choose(plot["wish"], rng), "helper": rng.choice(trouble["helpers"])}
    tale = with_articles(fill(" ".join((*lines, ENDING)), values))
    return tale.replace("{hero}", hero or rng.choice([*names("she"), *names("he")]))
