"""Names for the conversations: real ones, and many made-up ones that a model cannot memorize and must copy."""

from __future__ import annotations

import functools
import random
import re

from data.chitchat.templates import load_phrases
from data.tales.phrases import names
from setup_tokenizer import encode_text, get_extended_tokenizer

N_MADE_UP_NAMES = 200_000
N_HEROES = 6  # of girls, and the same number of boys
PIECED_NAME_FRACTION = 0.6  # of the made-up names; the others are blends of two real ones

# Weights for the number of tokens in a made-up name, and for the letters in its first and its other tokens.
PIECES_OF_A_NAME = {2: 45, 3: 36, 4: 15, 5: 4}
LENGTHS_OF_FIRST_PIECES = {1: 10, 2: 14, 3: 28, 4: 28, 5: 14, 6: 6}
LENGTHS_OF_OTHER_PIECES = {1: 8, 2: 18, 3: 30, 4: 28, 5: 12, 6: 4}

_UNWANTED_IN_NAMES = (
    r"fu[ck]|shit|cunt|dick|cock|anal|anus|porn|slut|rape|rapi|nazi|hitl|nigg|negr|fag|whor|tit|cum|sex|bitch|penis|"
    r"vagin|boob|piss|crap|kill|murder|terror|jihad|suicid|drug|jew|homo|gay|retard"
)


@functools.cache
def real_names() -> tuple[str, ...]:
    """The names and nicknames of the data file, without repeats."""
    return tuple(dict.fromkeys(" ".join(load_phrases()["names"].values()).split()))


def hero_names() -> list[str]:
    """Names for the heroes of tales who are not the user.

    The list is short, so a model can memorize it. A model that has to make up a name often does not end it ("Maaaaaa").
    """
    return [*names("she")[:N_HEROES], *names("he")[:N_HEROES]]


@functools.cache
def name_pieces() -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Every token of the vocabulary that can begin a name, and every one that can continue it, by length.

    A model can only say pieces that it has seen in training, so a name that it never saw must consist of such pieces.
    Pieces whose letters follow each other as in real names are in their list eight times.
    """
    enc = get_extended_tokenizer()
    all_names = " " + " ".join(real_names()).lower()
    begin: dict[int, list[str]] = {}
    others: dict[int, list[str]] = {}
    for token in range(enc.eot_token):
        word = enc.decode_single_token_bytes(token).decode("latin-1")
        if re.fullmatch(r" [A-Z][a-z]*|[a-z]+", word):
            piece = word.lstrip()
            looks_real = all(word.lower()[i : i + 3] in all_names for i in range(len(word) - 2))
            pieces = others if piece == word else begin
            pieces.setdefault(len(piece), []).extend([piece] * (8 if looks_real else 1))
    return begin, others


@functools.cache
def made_up_names() -> tuple[str, ...]:
    """Names that nobody has: so many that a model cannot memorize them and has to copy.

    Most consist of the pieces into which the tokenizer splits names, so that each piece occurs often and in many
    combinations; the others join the beginning of one real name and the end of another. They are the same for every
    seed, and none of them is a name that chat_eval.py asks for, so it is known which names a model has never seen.
    """
    rng = random.Random("made-up names, each its own")
    kept_out = {name.lower() for name in (*real_names(), *load_phrases()["never_made_up"].split())}
    made: dict[str, None] = {}
    unwanted = re.compile(r"[aeiouy]{4}|[^aeiouy]{4}|^[^aeiouy]{3}|^[^aeiouy]+$|(.)\1\1|" + _UNWANTED_IN_NAMES)
    while len(made) < N_MADE_UP_NAMES:
        name = _name_of_pieces(rng) if rng.random() < PIECED_NAME_FRACTION else _blended_name(rng)
        if 3 <= len(name) <= 12 and name.lower() not in kept_out and not unwanted.search(name.lower()):
            made[name] = None
    return tuple(made)


def _name_of_pieces(rng: random.Random) -> str:
    """Two to five pieces of names, with the lengths of real names' pieces: Melunbra."""
    begin, others = name_pieces()
    while True:
        count = rng.choices(*_weighted(PIECES_OF_A_NAME))[0]
        first = rng.choices(*_weighted(LENGTHS_OF_FIRST_PIECES))[0]
        lengths = rng.choices(*_weighted(LENGTHS_OF_OTHER_PIECES), k=count - 1)
        name = rng.choice(begin[first]) + "".join(rng.choice(others[length]) for length in lengths)
        if len(encode_text(f" {name}")) == count:
            return name


def _weighted(weights: dict[int, int]) -> tuple[list[int], list[int]]:
    return list(weights), list(weights.values())


def _blended_name(rng: random.Random) -> str:
    """The beginning of one real name and the end of another, joined between a vowel and a consonant: Prirash."""
    while True:
        first, last = rng.choice(real_names()), rng.choice(real_names()).lower()
        cut, start = rng.randint(2, 6), rng.randint(1, 5)
        beginning, end = first[:cut], last[start:]
        if len(end) >= 2 and (beginning[-1] in "aeiouy") != (end[0] in "aeiouy"):
            return beginning + end
