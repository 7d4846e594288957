"""The pattern `multilingual`: how it cuts text into pieces, in tiktoken and in Hugging Face's tokenizers."""

from __future__ import annotations

import unicodedata

import pytest
import tiktoken
import tokenizers
from tokenizers import pre_tokenizers

from common.token_patterns import MULTILINGUAL_PATTERN


def pieces(text: str) -> list[str]:
    """The pieces of a text, the same in both programs."""
    split = pre_tokenizers.Split(tokenizers.Regex(MULTILINGUAL_PATTERN), "isolated")
    found = [piece for piece, _ in split.pre_tokenize_str(text)]
    assert found == pieces_of_tiktoken(text)
    return found


def pieces_of_tiktoken(text: str) -> list[str]:
    """A piece that is a token is not cut further, and here every part of the text is a token."""
    content = text.encode()
    parts = {content[start:end] for start in range(len(content)) for end in range(start + 1, len(content) + 1)}
    tokens = sorted(parts | {bytes([byte]) for byte in range(256)}, key=lambda token: (len(token), token))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    enc = tiktoken.Encoding("pieces", pat_str=MULTILINGUAL_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [enc.decode_single_token_bytes(token).decode() for token in enc.encode_ordinary(text)]


def assert_pieces(*expected: str) -> None:
    """The expected pieces, joined, are cut into these pieces."""
    assert pieces("".join(expected)) == list(expected)


@pytest.mark.parametrize(
    "expected",
    [
        ["123", "456", "78"],
        ["in", " ", "198", "4"],  # a number never begins with a space
        ["x", "123", "45", "y"],
        ["3", ".", "141", "592", "6"],
        ["٣٤٥", "٦٧"],
        ["１２３", "４"],
        ["1२३", "४"],  # digits of different scripts are counted together
        ["½²³", "Ⅻ"],
    ],
)
def test_digits_are_in_groups_of_at_most_three(expected):
    assert_pieces(*expected)


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("Hindi", ["नमस्ते", " हिन्दी", " दुनिया"]),
        ("Tamil", ["வணக்கம்", " உலகம்"]),
        ("Thai", ["สวัสดี", " ที่นี่"]),
        ("Vietnamese", ["Tiếng", " Việt", " dễ"]),
        ("Hebrew", ["שָׁלוֹם", " עוֹלָם"]),
        ("Arabic", ["مَرْحَبًا", " بِكُمْ"]),
    ],
)
def test_combining_marks_stay_inside_words(language, words):
    decomposed = [unicodedata.normalize("NFD", word) for word in words]
    assert all(any(unicodedata.category(character)[0] == "M" for character in word) for word in decomposed), language
    assert_pieces(*decomposed)
    assert_pieces(*words)


def test_a_mark_after_symbols_is_not_a_symbol():
    assert_pieces("!!", "\u0301a")
    assert_pieces("\u2764\ufe0f", " ok")  # a red heart, which is a heart and a variation selector


@pytest.mark.parametrize("suffix", ["s", "t", "re", "ve", "m", "ll", "d"])
def test_contractions_are_pieces_in_any_case(suffix):
    for spelling in {suffix, suffix.upper(), suffix.capitalize(), suffix.swapcase(), suffix[:-1] + suffix[-1].upper()}:
        assert_pieces("We", f"'{spelling}", " go")
        assert_pieces("WE", f"'{spelling}", "x")  # as a word with an apostrophe before it, it would have the x


def test_other_apostrophes_begin_a_word():
    assert_pieces("o", "'clock")
    assert_pieces("she", "’s", " here")


def test_a_word_has_one_space_or_symbol_before_it_and_no_line_ending():
    assert_pieces("one", " two", " ", " three", "  ", " four")
    assert_pieces("f", "(x", ",", " y", ")[", "\tz")
    assert_pieces("one", "\n", "two", "\r\n", "three")
    assert_pieces("日本語です", "。次の文", "。")


def test_punctuation_has_the_line_endings_after_it():
    assert_pieces("end", ".\n", "Next")
    assert_pieces("end", "!?\r\n\r\n", "Next")
    assert_pieces("x", " };\n\n", "}\n")
    assert_pieces("x", ";\n", " ", " y")  # but not the indentation of the next line


def test_white_space_is_cut_after_its_last_line_ending():
    assert_pieces("a", " \n\n", " ", " b")
    assert_pieces("a", "  \t\r\n \n", "\tb")
    assert_pieces("a", "\n\n\n", "b")
    assert_pieces("a", "   ")
    assert_pieces("a", "  \n")
    assert_pieces("a", "  ", " ", "1")
