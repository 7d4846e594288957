"""The generator of tales (data/tales): names, words, grammar and endings."""

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from data.tales.long import generate, tale
from data.tales.phrases import BOOK, names
from data.tales.short import short_tale, source_files
from data.templates import words_of

ROOT = Path(__file__).resolve().parent.parent
HERO = "Zorvan"


@pytest.fixture(scope="module")
def short_tales():
    rng = random.Random(1)
    return [short_tale(rng, HERO) for _ in range(20_000)]


def sentences(text: str) -> list[str]:
    return re.findall(r'[^.!?]+[.!?]+"?', text)


def test_a_short_tale_names_its_hero_tells_the_wish_and_ends_properly(short_tales):
    for text in short_tales:
        assert re.search(rf"^[^.]*\b{HERO} wanted to [^.]+\.", text), text
        assert 2 <= text.count(HERO) <= 4, text
        assert text.endswith(" The end."), text


def test_a_short_tale_is_one_short_line_of_complete_sentences(short_tales):
    for text in short_tales:
        assert len(text.split()) <= 60 and len(sentences(text)) == 6, text
        assert not re.search(r"[{}\[\]()|<>\n]|  | [.,!?]|\ba [aeiou]|\ban [^aeiou]", text), text
        assert all(sentence.strip(' "')[0].isupper() for sentence in sentences(text)), text


def test_no_pronoun_stands_for_the_hero_of_a_short_tale(short_tales):
    assert not {"he", "she", "him", "her", "his", "they", "them"} & set(words_of(" ".join(short_tales)))


def test_short_tales_have_few_words_and_are_distinct(short_tales):
    assert len(set(words_of(" ".join(short_tales)))) <= 350
    assert len(set(short_tales)) > 18_000


def test_the_helper_of_a_short_tale_helps_and_is_met_before(short_tales):
    animals = {animal for plot in BOOK.load()["short"]["plots"] for t in plot["troubles"] for animal in t["helpers"]}
    for text in short_tales:
        words = words_of(text)
        # "a funny duck" before "the duck": the animal that is met is the one that helps.
        assert any(words.count(animal) >= 2 for animal in animals & set(words)), text


def test_short_tales_are_the_same_for_the_same_seed():
    assert short_tale(random.Random(5), "Mia") == short_tale(random.Random(5), "Mia")
    assert short_tale(random.Random(5), "Mia").replace("Mia", "Tom") == short_tale(random.Random(5), "Tom")


def test_without_a_hero_a_short_tale_has_one_of_the_files_names():
    rng = random.Random(2)
    heroes = {re.search(r"(\w+) wanted to", short_tale(rng))[1] for _ in range(300)}
    assert heroes <= {*names("she"), *names("he")} and len(heroes) > 30


def test_the_source_files_are_those_of_the_generator():
    assert {file.name for file in source_files()} >= {"tales-phrases.json", "short.py", "templates.py"}
    assert all(file.is_file() for file in source_files())


# Long tales.


@pytest.fixture(scope="module")
def tales():
    return list(generate(3_000, seed=1))


def test_tales_have_the_promised_length_and_no_unfilled_slot(tales):
    for text in tales:
        assert 80 <= len(text.split()) <= 200 and 2 <= len(text.split("\n\n")) <= 5, text
        assert not re.search(r"[{}\[\]()|<>]|  |[^\S\n] | [.,!?]|\n$|\n\n\n|\ba [aeiou]|\ban [^aeiou]", text), text
        assert text.count('"') % 2 == 0 and text.count('"') >= 4, text
        assert text[-1] in '.!?"' and not re.search(r"[.!?] [a-z]", text), text


def test_tales_are_distinct_and_the_same_for_the_same_seed(tales):
    assert len(set(tales)) == len(tales)
    assert list(generate(50, seed=1)) == tales[:50] != list(generate(50, seed=2))
    assert tale(random.Random(4)) == tale(random.Random(4))


def people(text: str) -> tuple[str, str, str]:
    """The hero, the word for what it is, and the helper, as a reader finds them in a tale."""
    first = re.match(r"Once upon a time, there was a \w+ (?P<child>\w+) named (?P<hero>\w+)\.", text)
    first = first or re.match(r"(?P<hero>\w+) was an? \w+ (?P<child>\w+) who", text)
    first = first or re.match(r"Once there was an? \w+ (?P<child>\w+)\. (His|Her) name was (?P<hero>\w+),", text)
    first = first or re.match(r"Long ago, .*?, there lived an? \w+ (?P<child>\w+) called (?P<hero>\w+)\.", text)
    first = first or re.match(r"This is the story of (?P<hero>\w+), an? \w+ (?P<child>\w+) who", text)
    met = re.search(r"[Aa]n? \w+ \w+ named (\w+) (?:came|had)|It was an? \w+ \w+ named (\w+)\.|It was (\w+), an?", text)
    met = met or re.search(r"met an? \w+ \w+ named (\w+),", text)
    return first["hero"], first["child"], next(name for name in met.groups() if name)


def test_the_hero_keeps_its_name_and_the_helper_is_in_the_ending(tales):
    for text in tales:
        hero, child, friend = people(text)
        paragraphs = text.split("\n\n")
        assert hero != friend and hero in paragraphs[0] and hero in paragraphs[-1], text
        assert friend in paragraphs[-1], text
        known = {*names("she"), *names("he"), *" ".join(BOOK.load()["long"]["names"].values()).split()}
        assert known & set(re.findall(r"\w+", text)) == {hero, friend}, text
        if child in ("girl", "boy"):
            assert hero in names({"girl": "she", "boy": "he"}[child]), text


def test_a_tale_about_two_girls_has_no_he(tales):
    """Pronouns agree: where hero and helper are both female (male), no pronoun is male (female)."""
    n_compared = 0
    for text in tales:
        hero, _, friend = people(text)
        female, male = ({*names(kind), *BOOK.load()["long"]["names"][kind].split()} for kind in ("she", "he"))
        words = set(words_of(text.replace("because he had no hat", "").replace("on him, but", "")))
        words -= {"mother", "father"}
        if {hero, friend} <= female:
            assert not words & {"he", "his", "him"}, text
            n_compared += 1
        elif {hero, friend} <= male and "mother saw" not in text and "to her as fast" not in text:
            assert not words & {"she", "her"}, text
            n_compared += 1
    assert n_compared > 1_000


def test_what_is_in_the_bag_at_the_beginning_is_what_is_shared(tales):
    snacks = set(BOOK.load()["long"]["values"]["snack"])
    n_shared = 0
    for text in tales:
        found = {snack for snack in snacks if re.search(rf"\b{snack}\b", text)}
        assert len(found) <= 1, text
        if match := re.search(r"shared |gave half of it|can have my|gave (him|her) the", text.rpartition("\n\n")[2]):
            assert found and re.search(rf"an? {found.pop()}\b", text[: -len(match.string)]), text
            n_shared += 1
    assert n_shared > 300


def slots_and_texts(value) -> list[str]:
    """All strings of a part of the phrases file."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in slots_and_texts(item)]
    return [text for item in value for text in slots_and_texts(item)] if isinstance(value, list) else [value]


def test_every_phrase_of_the_file_is_used(short_tales):
    """The plain words of each template, without its slots, occur in some tale: nothing in the file is dead."""
    book = BOOK.load()
    told = " ".join(generate(8_000, seed=3)) + " ".join(short_tales)
    words = set(words_of(told))
    for template in slots_and_texts([book["lists"], book["long"], book["short"]]):
        missing = set(words_of(re.sub(r"[{<]\w+[}>]", " ", template))) - words
        assert not missing, f"{missing} of {template!r} never occur"
    used = " ".join(slots_and_texts([book["lists"], book["long"], book["short"]]))
    for name in book["lists"]:
        assert f"<{name}>" in used, f"the list {name} is never used"


def run_script(python, *command, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [python, str(ROOT / command[0]), *command[1:]],
        **{"cwd": cwd, "capture_output": True, "text": True, "timeout": 240, "env": env, "stdin": subprocess.DEVNULL},
    )


def test_tales_are_prepared_with_a_vocabulary_of_their_own_and_a_model_tells_one(python, tmp_path):
    prepare = ("data/prepare-tales.py", "--stories", "200", "--output_dir", ".", "--workers", "1")
    for command in (
        prepare,
        ("data/train-tokenizer.py", "--input", "tales-train.txt", "--vocab_size", "600", "--name", "fable"),
        (*prepare, "--tokenizer", "fable-tokenizer.json", "--force"),
        (
            *("train.py", "--dataset", "tales", "--data_dir", ".", "--device", "cpu", "--max_iters", "4"),
            *("--n_layer", "1", "--n_head", "1", "--n_embd", "16", "--block_size", "64", "--batch_size", "2"),
        ),
        ("gen.py", "models/tales4.pt", "--prompt", "Once", "--max_tokens", "8", "--device", "cpu"),
    ):
        output = ["--output_dir", "."] if "train-tokenizer" in command[0] else []
        done = run_script(python, *command, *output, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.startswith("Once")
    info = json.loads((tmp_path / "tales.json").read_text("utf-8"))
    assert (info["licence"], info["format"]) == ("MIT", "text") and "data/tales-phrases.json" in info["source"]
    texts = [(tmp_path / f"tales-{split}.txt").read_text("utf-8") for split in ("train", "val")]
    documents = {text.strip() for kept in texts for text in kept.split("<|endoftext|>") if text.strip()}
    assert documents == set(generate(200, seed=1337))


def test_prepare_tales_refuses_input_in_one_sentence(python, tmp_path):
    done = run_script(python, "data/prepare-tales.py", "--input", "mine.txt", "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 1 and "prepare_with_extended_tokenizer.py" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
