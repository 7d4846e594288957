"""The generator of tales (data/tales): names, words, grammar and endings."""

import random
import re

import pytest

from data.tales.short import BOOK, hero_names, short_tale, source_files
from data.templates import words_of

HERO = "Zorvan"


@pytest.fixture(scope="module")
def short_tales():
    rng = random.Random(1)
    return [short_tale(rng, HERO) for _ in range(20_000)]


def sentences(text: str) -> list[str]:
    return re.findall(r'[^.!?]+[.!?]+"?', text)


def test_a_short_tale_names_its_hero_tells_the_wish_and_ends_properly(short_tales):
    for tale in short_tales:
        assert re.search(rf"^[^.]*\b{HERO} wanted to [^.]+\.", tale), tale
        assert 2 <= tale.count(HERO) <= 4, tale
        assert tale.endswith(" The end."), tale


def test_a_short_tale_is_one_short_line_of_complete_sentences(short_tales):
    for tale in short_tales:
        assert len(tale.split()) <= 60 and len(sentences(tale)) == 6, tale
        assert not re.search(r"[{}\[\]()|<>\n]|  | [.,!?]|\ba [aeiou]|\ban [^aeiou]", tale), tale
        assert all(sentence.strip(' "')[0].isupper() for sentence in sentences(tale)), tale


def test_no_pronoun_stands_for_the_hero_of_a_short_tale(short_tales):
    assert not {"he", "she", "him", "her", "his", "they", "them"} & set(words_of(" ".join(short_tales)))


def test_short_tales_have_few_words_and_are_distinct(short_tales):
    assert len(set(words_of(" ".join(short_tales)))) <= 350
    assert len(set(short_tales)) > 18_000


def test_the_helper_of_a_short_tale_helps_and_is_met_before(short_tales):
    animals = {animal for plot in BOOK.load()["short"]["plots"] for t in plot["troubles"] for animal in t["helpers"]}
    for tale in short_tales:
        words = words_of(tale)
        # "a funny duck" before "the duck": the animal that is met is the one that helps.
        assert any(words.count(animal) >= 2 for animal in animals & set(words)), tale


def test_short_tales_are_the_same_for_the_same_seed():
    assert short_tale(random.Random(5), "Mia") == short_tale(random.Random(5), "Mia")
    assert short_tale(random.Random(5), "Mia").replace("Mia", "Tom") == short_tale(random.Random(5), "Tom")


def test_without_a_hero_a_short_tale_has_one_of_the_files_names():
    rng = random.Random(2)
    heroes = {re.search(r"(\w+) wanted to", short_tale(rng))[1] for _ in range(300)}
    assert heroes <= set(hero_names()) and len(heroes) > 30


def test_the_source_files_are_those_of_the_generator():
    assert {file.name for file in source_files()} >= {"tales-phrases.json", "short.py", "templates.py"}
    assert all(file.is_file() for file in source_files())
