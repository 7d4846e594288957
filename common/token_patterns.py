"""The regular expressions that cut text into pieces before byte pair encoding merges their bytes.

A pattern must mean the same in tiktoken (fancy-regex) and in Hugging Face's tokenizers (Oniguruma); see
`problem_of_pattern`.
"""

from __future__ import annotations

import itertools
import re

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Contractions in any case; letters together with combining marks, which many scripts need within a word, after one
# space or punctuation mark; at most three digits; punctuation with the line endings after it; white space up to its
# last line ending.
MULTILINGUAL_PATTERN = "|".join(
    (
        r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])",
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s++$",
        r"\s+(?!\S)",
        r"\s",
    )
)
PATTERNS = {"gpt2": GPT2_PATTERN, "multilingual": MULTILINGUAL_PATTERN}


def pattern_after_digits(individual_digits: bool) -> str:
    """GPT-2's pattern for text whose numbers are split off first: digit by digit, or as a whole.

    It gives the same pieces as the steps Digits and ByteLevel of tokenizers. A number has no space in front of it, and
    all white space before a number is one piece.
    """
    number = r"\p{N}" if individual_digits else r"\p{N}++"
    return number + r"|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|\s++$|\s+(?!\S)|\s"


# --- what a pattern may contain ---

_MAX_PATTERN_LENGTH = 10_000
_PATTERN_TIMEOUT_S = 10
_CONSTRUCTS = re.compile(
    r"""
    (?P<same> \\s\+\+\$ | \[\^? (?: \\[^wW] | \[(?!:) | [^\]\\\[] )* \] )  # white space up to the end; a set
    | \\ (?: [pPxu]\{[^}]*\} | (?P<escape> . ) )
    | (?P<other> \[ | \}\+ | [$^] | \(\?[a-z]*m )
    """,
    re.VERBOSE | re.DOTALL,
)


def _ambiguous_construct(pattern: str) -> str | None:
    r"""The first part of a pattern that Oniguruma and fancy-regex read differently, or None.

    `{1,3}+` is possessive in one and repeats the repetition in the other, `^` and `$` match at every line ending in
    one, (?m) lets the dot match a line ending or `^` and `$`, and `\w`, `\b` and [:alpha:] contain other characters.
    After `\s++` no line ending is left, so `\s++$` means the same.
    """
    for match in _CONSTRUCTS.finditer(pattern):
        if match["other"] or (match["escape"] and match["escape"] in "wWbB"):
            return match[0]
    return None


def _probe() -> str:
    """A text with characters of every kind, in several contexts."""
    points = itertools.chain(range(0x3100), range(0x3100, 0xD800, 97), range(0xE000, 0x110000, 4999))
    characters = list(map(chr, points))
    return "".join(separator.join(characters) for separator in ("", " ", "\n", "a", "1", "!"))


def problem_of_pattern(pattern: str) -> str | None:
    """Why tiktoken cannot use a pattern as tokenizers does, as the end of a sentence; None if it can."""
    if pattern in PATTERNS.values():
        return None
    import regex  # tiktoken depends on it
    import tiktoken

    if len(pattern) > _MAX_PATTERN_LENGTH:
        return f"is longer than {_MAX_PATTERN_LENGTH:,} characters"
    if construct := _ambiguous_construct(pattern):
        return f"tokenizers and tiktoken read differently ({construct})"
    text, ranks = _probe(), {bytes([byte]): byte for byte in range(256)}
    try:
        enc = tiktoken.Encoding("pattern", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        pieces = [match[0] for match in regex.finditer(pattern, text, timeout=_PATTERN_TIMEOUT_S)]
    except (ValueError, regex.error, TimeoutError) as error:
        return f"cannot be used ({str(error)[:60]!r})"
    if "" in pieces:  # tiktoken would panic
        return "matches nothing at all"
    # tokenizers keeps the text between two matches as a piece; tiktoken drops it. With these ranks, ids are bytes.
    if bytes(enc.encode_ordinary(text)) != text.encode():
        return "does not match every character"
    return None
