"""Breaks lines between words in text that arrives piece by piece.

wrap = WordWrap(lambda: 80)
for piece in pieces:
    print(wrap.feed(piece), end="", flush=True)
print(wrap.finish())
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

TAB_STOP = 8
JOINER = "\u200d"  # joins emoji into one
NEVER_FIRST = ("Pe", "Pf", "Po", "Lm", "Sk")  # Unicode categories: closing punctuation, marks, modifiers
NEVER_LAST = ("Ps", "Pi")  # opening punctuation


class WordWrap:
    """Puts line breaks where the next word would not fit into `width()` columns; changes nothing else.

    A word is held back until it is complete. White space at a break is dropped. Chinese and Japanese characters are two
    columns wide, and lines may also break between them. A word that is longer than a line is left to the terminal.
    """

    def __init__(self, width: Callable[[], int]):
        self.width = width  # asked at every word, so that it may change
        self._column = 0
        self._space, self._word = "", ""  # not yet released: the word, and the white space before it
        self._is_begun = False  # the beginning of a long word has been released
        self._previous = ""

    def feed(self, text: str) -> str:
        """What can be printed after some more text; often nothing, or a line break and a word."""
        return "".join(map(self._feed_character, text))

    def finish(self) -> str:
        """What was held back, after the last text."""
        return self._release()

    def _feed_character(self, character: str) -> str:
        released = ""
        if character == "\n":
            released = self._release() + character
            self._column, self._space = 0, ""
        elif character in " \t":
            released = self._release()
            self._space += character
        else:
            if may_break(self._previous, character):
                released = self._release()
            self._word += character
            if columns_of(self._word) >= self._line_width():
                released += self._release()
                self._is_begun = True
        self._previous = character
        return released

    def _line_width(self) -> int:
        return max(1, self.width())

    def _release(self) -> str:
        """The pending word with the white space before it, or with a line break instead."""
        if not self._word:
            self._is_begun = False
            return ""
        indent = 0
        for character in self._space:
            column = self._column + indent
            indent += TAB_STOP - column % TAB_STOP if character == "\t" else 1
        line_width, columns = self._line_width(), columns_of(self._word)
        released = self._space + self._word
        if self._column and not self._is_begun and self._column + indent + columns > line_width:
            released, self._column, indent = "\n" + self._word, 0, 0
        self._column += indent + columns
        if self._column > line_width:  # the terminal has broken the line
            self._column = (self._column - 1) % line_width + 1
        self._space, self._word, self._is_begun = "", "", False
        return released


def may_break(before: str, after: str) -> bool:
    """Whether a line may break between two characters that no white space separates; `before` is empty at the start.

    >>> may_break("你", "好"), may_break("好", "。"), may_break("a", "b")
    (True, False, False)
    """
    if not before or before.isspace() or before == JOINER or not columns_of(after):
        return False
    if unicodedata.category(after) in NEVER_FIRST or unicodedata.category(before) in NEVER_LAST:
        return False
    return columns_of(before) == 2 or columns_of(after) == 2


def columns_of(text: str) -> int:
    """How many columns a terminal needs for a text: two for a wide character, none for a combining one.

    >>> columns_of("abc"), columns_of("你好"), columns_of("e\u0301")
    (3, 4, 1)
    """
    return sum(map(_columns_of_character, text))


def _columns_of_character(character: str) -> int:
    if character.isascii():
        return int(character.isprintable())
    if unicodedata.category(character) in ("Mn", "Me", "Cc", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
