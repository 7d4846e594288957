"""Templates of text and their grammar, for the generators of data.

`(a|b)` is a choice, `[a]` is optional, `<list>` is one item of a list of the file, and `{slot}` is a value that the
generator fills in, such as a name. A parsed template is a tuple of parts: text, or a list of parsed alternatives.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

SLOT = re.compile(r"\{(\w+)\}")


class PhraseBook:
    """A .json file of templates, read when it is first needed; its "lists" are what `<list>` refers to."""

    def __init__(self, file: Path):
        self.file = file
        self._phrases: dict = {}
        self._parsed: dict[str, tuple] = {}

    def load(self) -> dict:
        """The content of the file."""
        if not self._phrases:
            self._phrases = json.loads(self.file.read_text(encoding="utf-8"))
        return self._phrases

    def parse(self, template: str) -> tuple:
        """A template as a tuple of parts: a str, or a list of alternatives that are such tuples themselves.

        `so (long|far)[!]` becomes ('so ', [('long',), ('far',)], [(), ('!',)]). Raises ValueError for unbalanced
        brackets.
        """
        if template not in self._parsed:
            parts, rest = self._parse(re.findall(r"[()\[\]|]|<\w+>|[^()\[\]|<>]+", template))
            if rest:
                raise ValueError(f"{self.file.name}: unbalanced brackets in {template!r}")
            self._parsed[template] = parts[0] if len(parts) == 1 else (parts,)
        return self._parsed[template]

    def _parse(self, tokens: list[str]) -> tuple[list[tuple], list[str]]:
        """The alternatives up to the closing bracket, and the tokens after it."""
        alternatives: list[list] = [[]]
        while tokens:
            token, *tokens = tokens
            if token in ")]":
                return [tuple(parts) for parts in alternatives], [token, *tokens]
            if token == "|":
                alternatives.append([])
            elif token in "([":
                inner, tokens = self._parse(tokens)
                if not tokens or token + tokens[0] not in ("()", "[]"):
                    raise ValueError(f"{self.file.name}: a bracket {token!r} is not closed")
                tokens = tokens[1:]
                alternatives[-1].append([(), *inner] if token == "[" else inner)
            elif token.startswith("<"):
                alternatives[-1].append([self.parse(phrase) for phrase in self.load()["lists"][token[1:-1]]])
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


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case, apostrophes kept.

    >>> words_of("I'm fine, thanks!")
    ["i'm", 'fine', 'thanks']
    """
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))
