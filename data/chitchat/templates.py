"""The templates of chitchat-phrases.json and their grammar.

`(a|b)` is a choice, `[a]` is optional, `<list>` is one item of a list of the file, and `{slot}` is a value of the
conversation, such as a name. A parsed template is a tuple of parts: text, or a list of parsed alternatives.
"""

from __future__ import annotations

import functools
import json
import random
import re
from pathlib import Path

PHRASES_FILE = Path(__file__).parent.with_name("chitchat-phrases.json")
SLOT = re.compile(r"\{(\w+)\}")


@functools.cache
def load_phrases() -> dict:
    """The content of the data file."""
    return json.loads(PHRASES_FILE.read_text(encoding="utf-8"))


@functools.cache
def parse_template(template: str) -> tuple:
    """A template as a tuple of parts: a str, or a list of alternatives that are such tuples themselves.

    >>> parse_template("so (long|far)[!]")
    ('so ', [('long',), ('far',)], [(), ('!',)])
    """
    parts, rest = _parse(re.findall(r"[()\[\]|]|<\w+>|[^()\[\]|<>]+", template))
    if rest:
        raise ValueError(f"{PHRASES_FILE.name}: unbalanced brackets in {template!r}")
    return parts[0] if len(parts) == 1 else (parts,)


def _parse(tokens: list[str]) -> tuple[list[tuple], list[str]]:
    """The alternatives up to the closing bracket, and the tokens after it."""
    alternatives: list[list] = [[]]
    while tokens:
        token, *tokens = tokens
        if token in ")]":
            return [tuple(parts) for parts in alternatives], [token, *tokens]
        if token == "|":
            alternatives.append([])
        elif token in "([":
            inner, tokens = _parse(tokens)
            if not tokens or token + tokens[0] not in ("()", "[]"):
                raise ValueError(f"{PHRASES_FILE.name}: a bracket {token!r} is not closed")
            tokens = tokens[1:]
            alternatives[-1].append([(), *inner] if token == "[" else inner)
        elif token.startswith("<"):
            alternatives[-1].append([parse_template(phrase) for phrase in load_phrases()["lists"][token[1:-1]]])
        else:
            alternatives[-1].append(token)
    return [tuple(parts) for parts in alternatives], []


def expand(parts: tuple, rng: random.Random) -> str:
    """A random text of a parsed template; slots are left as they are."""
    texts = []
    for part in parts:
        if isinstance(part, list):
            # Optional words are left out more often than not, so that lines stay short.
            is_optional = part[0] == ()
            part = () if is_optional and rng.random() < 0.6 else rng.choice(part[is_optional:])
            texts.append(expand(part, rng))
        else:
            texts.append(part)
    return "".join(texts)


def assistant_words() -> frozenset[str]:
    """Every word in the assistant's templates, in lower case, without the values of slots."""
    phrases = load_phrases()
    lines = [line for topic in phrases["topics"].values() for script in topic for line in script["lines"][1::2]]
    lines += [script["reply"] for script in (*phrases["facts"].values(), *phrases["introductions"])]
    lines += [script[kind] for script in phrases["facts"].values() for kind in ("answer", "unknown")]
    text = " ".join(template for line in lines for template in line)
    return frozenset(words_of(SLOT.sub(" ", text)))


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case, apostrophes kept.

    >>> words_of("I'm fine, thanks!")
    ["i'm", 'fine', 'thanks']
    """
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))
