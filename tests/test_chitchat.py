"""The chitchat generator (data/chitchat) and the judge of what it taught (testing_tools/chat_eval.py)."""

import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data.chitchat.names import hero_names, made_up_names, name_pieces, real_names
from data.chitchat.talks import LISTS, generate
from data.chitchat.templates import assistant_words, expand, load_phrases, parse_template, words_of
from data.chitchat.typing_habits import type_like_a_person
from setup_tokenizer import IM_END, encode_chat, encode_text

PROJECT = Path(__file__).resolve().parent.parent


def load_module(path: str):
    """A module of the project that lies in a folder without a package."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, PROJECT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


chat_scores = load_module("testing_tools/chat_scores.py")


@pytest.fixture(scope="module")
def conversations():
    return list(generate(20_000))


@pytest.fixture(scope="module")
def questions():
    return chat_scores.load_questions()


def normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower().replace("'", "").replace("’", "")))


def user_templates():
    """Every template that a user's line is made from."""
    phrases = load_phrases()
    for topic in phrases["topics"].values():
        for script in topic:
            yield from itertools.chain.from_iterable(script["lines"][::2])
    for script in (*phrases["facts"].values(), *phrases["introductions"]):
        yield from (*script["tell"], *script.get("ask", ()))
    yield from phrases["tale"]


def all_templates():
    phrases = load_phrases()
    yield from user_templates()
    yield from (*phrases["system"], *phrases["system_with_name"])
    for topic in phrases["topics"].values():
        for script in topic:
            yield from itertools.chain.from_iterable(script["lines"][1::2])
    for script in (*phrases["facts"].values(), *phrases["introductions"]):
        yield from (*script["reply"], *script.get("answer", ()), *script.get("unknown", ()))


def template_pattern(parts: tuple, names: str) -> str:
    """A regular expression for all texts of a parsed template, squeezed; `names` is the one for a name."""
    pattern = ""
    for part in parts:
        if isinstance(part, list):
            pattern += "(?:" + "|".join(template_pattern(inner, names) for inner in part) + ")"
            continue
        for piece in re.split(r"(\{\w+\})", part):
            if piece.startswith("{"):
                values = load_phrases()["values"].get(piece[1:-1])  # None for a name, or several
                pattern += f"(?:{'|'.join(map(squeezed, values)) if values else names})"
            else:
                pattern += squeezed(piece)
    return pattern


def squeezed(text: str) -> str:
    return normalised(text).replace(" ", "")


# --- the generator ---


def test_conversations_are_many_distinct_short_and_well_formed(conversations):
    texts = {tuple(message["content"] for message in conversation) for conversation in conversations}
    assert len(texts) == len(conversations) == 20_000
    lengths = [len(encode_chat(conversation, end_of_conversation=True)) for conversation in conversations]
    assert sum(lengths) >= 1_500_000
    assert 250 < max(lengths) < 500, "longer than a block of 256, never than one of 512"
    for conversation in conversations:
        roles = [message["role"] for message in conversation]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        for message in conversation:
            assert message["content"] == message["content"].strip() != ""
            assert not re.search(r"[{}<>\[\]|()\\](?!$)|  ", message["content"].removesuffix(":)").removesuffix(":-)"))


def test_the_seed_decides_everything(conversations):
    assert list(generate(50)) == conversations[:50]
    assert list(generate(50, seed=7)) != conversations[:50]


def test_the_first_of_equal_conversations_is_kept_and_their_text_is_not():
    drawn = []

    def make_long(rng):
        drawn.append(rng.randrange(2000))
        return [{"role": "user", "content": f"{drawn[-1]} {'x' * 20_000}"}]

    tracemalloc.start()
    kept = [int(messages[0]["content"].split()[0]) for messages in generate(1500, make=make_long)]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept) == 1500 and kept == list(dict.fromkeys(drawn))
    assert peak_bytes < 10e6  # of 30 MB of text


def test_the_assistant_repeats_the_name_it_was_told(conversations):
    recalled = 0
    for conversation in conversations:
        before = ""
        for message in conversation:
            if message["role"] == "assistant" and (match := re.fullmatch(r"Your name is (.+)\.", message["content"])):
                assert re.search(rf"(?<!\w){re.escape(match[1])}(?!\w)", before)
                recalled += 1
            before += message["content"] + "\n"
    assert recalled > len(conversations) / 3


def test_values_to_copy_are_mostly_made_up_words(conversations):
    replies = [message["content"] for talk in conversations for message in talk if message["role"] == "assistant"]
    for slot, reply in {"city": r"You live in (.+)\.", "colour": r"Your favourite colour is (.+)\."}.items():
        values = [match[1] for text in replies if (match := re.fullmatch(reply, text))]
        listed = set(load_phrases()["values"][slot])
        assert len(values) > 400 and 0.7 < sum(value not in listed for value in values) / len(values) < 0.9


def test_a_tale_is_about_the_user(conversations):
    heroes = []
    for talk in conversations:
        for index, message in enumerate(talk):
            if message["content"].endswith("The end."):
                assert chat_scores.tale_fault(message["content"] + IM_END, hero_of(message["content"])) is None
                told = re.search(
                    r"(?:Nice to meet you|nice to meet you|Hello|Hi), (\w+)", talk[max(0, index - 2)]["content"]
                )
                if told and talk[index - 2]["role"] == "assistant":
                    heroes.append(hero_of(message["content"]) == told[1])
    assert len(heroes) > 100 and all(heroes)


def test_a_hero_who_is_not_the_user_has_one_of_a_few_names(conversations):
    """A model that learns to make up names does not find their end: "Once upon a time, Maaaaaaaaaaaa"."""
    others = 0
    for talk in conversations:
        said = ""
        for message in talk:
            if message["content"].endswith("The end."):
                hero = hero_of(message["content"])
                assert hero in hero_names() or re.search(rf"\b{hero}\b", said)
                others += hero in hero_names()
            said += message["content"] + "\n"
    assert others > 10


def hero_of(tale: str) -> str:
    return re.search(r"(?:, |, and )(?!and )(\w+)", tale)[1]


def test_questions_beyond_small_talk_get_an_honest_reply(conversations, questions):
    beyond = questions["beyond"]
    for script in load_phrases()["topics"]["beyond"]:
        for reply in script["lines"][1]:
            assert chat_scores.beyond_fault(reply + IM_END, beyond["fits"], beyond["offers"], assistant_words()) is None
    honest = [
        message["content"] for talk in conversations for message in talk if "very small model" in message["content"]
    ]
    assert len(set(honest)) == 12 and len(honest) > len(conversations) / 10


def test_a_name_that_nobody_gave_is_not_known(conversations):
    for conversation in conversations:
        for index, message in enumerate(conversation):
            if message["content"] == "You have not told me your name yet.":
                earlier = [line["content"] for line in conversation[:index] if line["role"] == "assistant"]
                assert not any(text.startswith(("Your name is", "Nice to meet you,")) for text in earlier)


def test_names_are_many_and_mostly_not_to_be_known_by_heart(conversations):
    told = [re.findall(r"Your name is (\w+)", message["content"]) for talk in conversations for message in talk]
    assert len(set(itertools.chain.from_iterable(told))) > 4_000
    assert len(real_names()) > 1_000
    assert not any(" " in name for name in (*real_names(), *made_up_names()))


def test_names_hold_nearly_every_piece_that_a_name_can_have():
    """A name that the model never saw is made of pieces; one that is missing here could not be said."""
    met = set(itertools.chain.from_iterable(encode_text(f" {name}") for name in made_up_names()))
    for pieces, prefix in zip(name_pieces(), (" ", ""), strict=True):
        for length, share in {1: 1, 2: 0.95, 3: 0.9, 4: 0.8}.items():
            ids = [encode_text(prefix + piece) for piece in set(pieces[length])]
            assert len(ids) >= 26 and all(len(piece) == 1 for piece in ids)
            assert sum(piece[0] in met for piece in ids) >= share * len(ids), (prefix, length)


def test_every_template_expands_to_plain_text():
    for template in all_templates():
        for seed in range(5):
            text = expand(parse_template(template), random.Random(seed))
            assert not re.search(r"[<>\[\]()|]|  |^ | $|\?\S", text), (template, text)
            assert text


def test_slots_of_templates_are_known():
    phrases = load_phrases()
    slots = {slot for template in all_templates() for slot in re.findall(r"\{(\w+)\}", template)}
    assert slots == {*phrases["values"], *LISTS, "name", "pet_name", "relative_name", "stranger_name", "strange_name"}


@pytest.mark.parametrize("template", ["(a", "a)", "[a|b", "(a]"])
def test_unbalanced_brackets_are_named(template):
    with pytest.raises(ValueError, match="bracket"):
        parse_template(template)


def test_typing_changes_no_value():
    rng = random.Random(1)
    for _ in range(2_000):
        assert type_like_a_person("hello there, my name is {name}", rng).count("{name}") == 1


# --- the questions are new to the model ---


def test_no_opener_and_no_question_beyond_small_talk_is_ever_emitted(questions, conversations):
    """By the templates' grammar, with any filler before and after; and by looking at what was emitted."""
    phrases = load_phrases()
    before, after = ("|".join(map(squeezed, phrases["noise"][place])) for place in ("before", "after"))
    openers = [(category, opener) for category, opener, _ in chat_scores.openers(questions)]
    openers += [(kind, question) for kind, group in questions["beyond"]["questions"].items() for question in group]
    opener_words = {word for _, opener in openers for word in words_of(opener)}
    all_names = {name.lower() for name in (*real_names(), *made_up_names())}
    names = "|".join(["priya", *(all_names & opener_words)])  # no other name can stand in an opener
    lines = "|".join({template_pattern(parse_template(template), names) for template in user_templates()})
    grammar = re.compile(f"(?:{before})?(?:{lines})(?:{after})?")
    assert grammar.fullmatch(squeezed("Oh, what's your favorite color?"))
    assert grammar.fullmatch(squeezed("I am Priya and I live in New York, haha"))
    assert not grammar.fullmatch(squeezed("Hello there, I live in New York"))
    emitted = {squeezed(message["content"]) for talk in conversations for message in talk}
    for category, opener in openers:
        assert squeezed(opener) not in emitted, (category, opener)
        assert not grammar.fullmatch(squeezed(opener)), (category, opener)


def test_no_name_and_no_value_of_the_questions_is_ever_emitted(questions, conversations):
    possible = {name.lower() for name in (*real_names(), *made_up_names())}
    used = {key: value for key, value in load_phrases().items() if key != "never_made_up"}
    phrase_words = set(words_of(json.dumps(used, ensure_ascii=False)))
    emitted = {word for talk in conversations for message in talk for word in words_of(message["content"])}
    assert len(set(questions["names"])) == 50
    values = [value for fact in questions["facts"].values() for value in fact["values"]]
    assert len(set(values)) == 40
    for name in values:
        assert name.lower() not in possible | phrase_words | emitted, name
    for name in questions["names"]:
        assert name.lower() not in possible | phrase_words | emitted, name
        assert len(encode_text(f" {name}")) > 1, name  # a token never trained on could not be said at all


# --- the scripts ---


def run_script(path, *arguments, cwd):
    command = [sys.executable, str(PROJECT / path), *map(str, arguments)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for a busy core spin
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=one_thread)


def test_prepare_chitchat_writes_the_same_bytes_again(tmp_path):
    for folder in ("one", "two"):
        result = run_script("data/prepare-chitchat.py", "--conversations", 400, "--output_dir", folder, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("licence: MIT") == 1
        assert "<|im_start|>assistant" in result.stdout
    files = [f"chitchat-{split}.{kind}" for split in ("train", "val") for kind in ("bin", "jsonl")]
    for file in (*files, "chitchat.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    description = json.loads((tmp_path / "one/chitchat.json").read_text())
    documents = {}
    for split in ("train", "val"):
        lines = (tmp_path / f"one/chitchat-{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ids = [encode_chat(json.loads(line)["messages"], end_of_conversation=True) for line in lines]
        stored = np.fromfile(tmp_path / f"one/chitchat-{split}.bin", dtype="<u2")
        assert stored.tolist() == list(itertools.chain.from_iterable(ids))
        assert description["splits"][split]["tokens"] == len(stored)
        documents[split] = set(lines)
    assert len(documents["train"]) + len(documents["val"]) == 400
    assert not documents["train"] & documents["val"]


def test_prepare_chitchat_refuses_input_in_one_sentence(tmp_path):
    result = run_script("data/prepare-chitchat.py", "--input", "mine.txt", "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 1
    assert "prepare_with_extended_tokenizer.py" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
