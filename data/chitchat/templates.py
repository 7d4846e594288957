"""The phrases of chitchat-phrases.json, in the templates of data/templates.py."""

from __future__ import annotations

from pathlib import Path

from data.templates import SLOT, PhraseBook, expand, words_of

__all__ = ["PHRASES_FILE", "SLOT", "assistant_words", "expand", "load_phrases", "parse_template", "words_of"]

BOOK = PhraseBook(Path(__file__).parent.with_name("chitchat-phrases.json"))
PHRASES_FILE = BOOK.file
load_phrases = BOOK.load
parse_template = BOOK.parse


def assistant_words() -> frozenset[str]:
    """Every word in the assistant's templates, in lower case, without the values of slots."""
    phrases = load_phrases()
    lines = [line for topic in phrases["topics"].values() for script in topic for line in script["lines"][1::2]]
    lines += [script["reply"] for script in (*phrases["facts"].values(), *phrases["introductions"])]
    lines += [script[kind] for script in phrases["facts"].values() for kind in ("answer", "unknown")]
    text = " ".join(template for line in lines for template in line)
    return frozenset(words_of(SLOT.sub(" ", text)))
