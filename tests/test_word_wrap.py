"""generation/word_wrap.py: lines end between words, whatever the pieces in which the text arrives."""

from __future__ import annotations

import random
import textwrap

import pytest

from generation.word_wrap import WordWrap, columns_of, may_break


def wrapped(pieces, width: int = 20) -> str:
    wrap = WordWrap(lambda: width)
    return "".join([*map(wrap.feed, pieces), wrap.finish()])


def words(seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcde,.", k=draw.randint(1, 12))) for _ in range(200)]


@pytest.mark.parametrize("seed", range(5))
def test_lines_are_those_of_textwrap_however_the_text_is_divided(seed):
    text, draw = " ".join(words(seed)), random.Random(seed)
    cuts = sorted(draw.sample(range(len(text)), 300))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    expected = textwrap.fill(text, 20, break_on_hyphens=False)
    assert wrapped(pieces) == wrapped([text]) == wrapped(text) == expected


def test_a_text_that_fits_is_unchanged_with_its_own_line_breaks_and_indentation():
    text = "def f():\n    return 1\n\n\ta  b\n"
    assert wrapped(text) == text
    assert wrapped("x" * 20 + "\n" + "y" * 20) == "x" * 20 + "\n" + "y" * 20  # exactly as wide as the line


def test_only_the_last_word_is_held_back():
    wrap = WordWrap(lambda: 20)
    assert [wrap.feed(piece) for piece in ("Once", " upon", " a", " time", ".", "\n")] == [
        *("", "Once", " upon", " a", "", " time.\n")
    ]
    assert wrap.feed("The") == "" and wrap.finish() == "The"


def test_the_width_may_change_while_the_text_arrives():
    width = 40
    wrap = WordWrap(lambda: width)
    shown = wrap.feed("one two three four ")
    width = 8
    assert shown + wrap.feed("five six seven") + wrap.finish() == "one two three four\nfive six\nseven"


def test_a_word_longer_than_a_line_starts_on_a_new_one_and_is_left_to_the_terminal():
    url = "https://example.org/" + "x" * 30
    assert wrapped(f"See {url} for more of it") == f"See\n{url} for more\nof it"


def test_wide_characters_take_two_columns_and_may_be_divided():
    texts = ("ab", "你好", "e\u0301", "\u200b")
    assert [columns_of(text) for text in texts] == [2, 4, 1, 0]
    lines = wrapped("今日は天気がいいですね。散歩に行きましょう。", width=10).split("\n")
    assert "".join(lines) == "今日は天気がいいですね。散歩に行きましょう。"
    assert max(map(columns_of, lines)) <= 10 and min(map(columns_of, lines[:-1])) >= 8
    assert not any(line.startswith(("。", "ー")) for line in lines)
    assert wrapped("ab你好 cd", width=4) == "ab你\n好\ncd"


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ("", "你", False),
        ("a", "b", False),
        ("你", "好", True),
        ("你", "a", True),
        ("好", "。", False),
        ("好", ",", False),
        ("「", "好", False),
        ("👩", "\u200d", False),
        ("\u200d", "💻", False),
        ("👍", "🏽", False),
    ],
)
def test_where_lines_may_break_without_white_space(before, after, allowed):
    assert may_break(before, after) is allowed
