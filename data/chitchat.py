"""Small talk made from the templates of chitchat-phrases.json: greetings, names, facts to remember, farewells.

    >>> next(generate(1))[0]["role"]
    'user'

The template grammar: `(a|b)` is a choice, `[a]` may be left out, `<list>` is one of a list of the file, `{slot}` is a
value of the conversation, such as a name. What a person says gets other case, punctuation, fillers and typing errors;
values stay as they are, because the lesson is to repeat them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

PHRASES_FILE = Path(__file__).with_name("chitchat-phrases.json")
SOURCE_FILES = (PHRASES_FILE, Path(__file__))  # what the conversations depend on, with the seed
MADE_UP_NAMES = 200_000
MADE_UP_NAME_SHARE = 0.75  # of the names in conversations; the rest are real ones
PIECED_NAME_SHARE = 0.6  # of the made-up names; the rest are blends of two real ones

# How often a made-up name has so many tokens, and how often its first and its other tokens have so many letters.
PIECES_OF_A_NAME = {2: 45, 3: 36, 4: 15, 5: 4}
LENGTHS_OF_FIRST_PIECES = {1: 10, 2: 14, 3: 28, 4: 28, 5: 14, 6: 6}
LENGTHS_OF_OTHER_PIECES = {1: 8, 2: 18, 3: 30, 4: 28, 5: 12, 6: 4}

LISTS = ("friends", "words")  # slots of several names: many tokens to copy, from which copying is learned soonest
SYSTEM_SHARE = 0.15
MAX_EXCHANGES = 7  # keeps a conversation under 250 tokens, so that it fits into a block of 256
MADE_AT_ONCE = 100  # conversations that are compared with the earlier ones together

_UNWANTED_IN_NAMES = (
    r"fu[ck]|shit|cunt|dick|cock|anal|anus|porn|slut|rape|rapi|nazi|hitl|nigg|negr|fag|whor|tit|cum|sex|bitch|penis|"
    r"vagin|boob|piss|crap|kill|murder|terror|jihad|suicid|drug|jew|homo|gay|retard"
)
_SLOT = re.compile(r"\{(\w+)\}")


@functools.cache
def load_phrases() -> dict:
    """The data file's content."""
    return json.loads(PHRASES_FILE.read_text(encoding="utf-8"))


# The template grammar. A parsed template is a tuple of parts: text, or a list of parsed alternatives.


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
    """One text of a parsed template; slots stay as they are."""
    texts = []
    for part in parts:
        if isinstance(part, list):
            # Words that may be left out are left out more often than not, so that lines stay short.
            is_optional = part[0] == ()
            part = () if is_optional and rng.random() < 0.6 else rng.choice(part[is_optional:])
            texts.append(expand(part, rng))
        else:
            texts.append(part)
    return "".join(texts)


def assistant_words() -> frozenset[str]:
    """Every word in lower case that the assistant's templates hold, without the values of slots."""
    phrases = load_phrases()
    lines = [line for topic in phrases["topics"].values() for script in topic for line in script["lines"][1::2]]
    lines += [script["reply"] for script in (*phrases["facts"].values(), *phrases["introductions"])]
    lines += [script[kind] for script in phrases["facts"].values() for kind in ("answer", "unknown")]
    text = " ".join(template for line in lines for template in line)
    return frozenset(words_of(_SLOT.sub(" ", text)))


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case, apostrophes kept.

    >>> words_of("I'm fine, thanks!")
    ["i'm", 'fine', 'thanks']
    """
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


# Names


@functools.cache
def real_names() -> tuple[str, ...]:
    """The names and nicknames of the data file, without repeats."""
    return tuple(dict.fromkeys(" ".join(load_phrases()["names"].values()).split()))


@functools.cache
def name_pieces() -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Every token of the vocabulary that can begin a name, and every one that can go on with it, by length.

    A model can only say a piece that it has met, so a name that it never saw must be made of pieces that it did. Those
    whose letters follow each other as in real names stand eight times in their list.
    """
    from setup_tokenizer import get_extended_tokenizer  # not above: corpus.py makes the project's modules importable

    enc = get_extended_tokenizer()
    all_names = " " + " ".join(real_names()).lower()
    begin: dict[int, list[str]] = {}
    go_on: dict[int, list[str]] = {}
    for token in range(enc.eot_token):
        word = enc.decode_single_token_bytes(token).decode("latin-1")
        if re.fullmatch(r" [A-Z][a-z]*|[a-z]+", word):
            piece = word.lstrip()
            looks_real = all(word.lower()[i : i + 3] in all_names for i in range(len(word) - 2))
            places = go_on if piece == word else begin
            places.setdefault(len(piece), []).extend([piece] * (8 if looks_real else 1))
    return begin, go_on


@functools.cache
def made_up_names() -> tuple[str, ...]:
    """Names that nobody has: so many that a model must copy a name and cannot know it by heart.

    Most are put together from the pieces into which the tokenizer splits names, so that each piece is met often and
    in any company; the others are the beginning of one real name and the end of another. The same for every seed, and
    none that chat_eval.py asks for, so that which names a model has never seen is known.
    """
    rng = random.Random("made-up names, each its own")
    kept_out = {name.lower() for name in (*real_names(), *load_phrases()["never_made_up"].split())}
    names: dict[str, None] = {}
    unwanted = re.compile(r"[aeiouy]{4}|[^aeiouy]{4}|^[^aeiouy]{3}|^[^aeiouy]+$|(.)\1\1|" + _UNWANTED_IN_NAMES)
    while len(names) < MADE_UP_NAMES:
        name = _name_of_pieces(rng) if rng.random() < PIECED_NAME_SHARE else _blended_name(rng)
        if 3 <= len(name) <= 12 and name.lower() not in kept_out and not unwanted.search(name.lower()):
            names[name] = None
    return tuple(names)


def _name_of_pieces(rng: random.Random) -> str:
    """Two to five pieces of names, of the lengths that pieces of real names have: Melunbra."""
    from setup_tokenizer import encode_text

    begin, go_on = name_pieces()
    while True:
        count = rng.choices(*_weighted(PIECES_OF_A_NAME))[0]
        first = rng.choices(*_weighted(LENGTHS_OF_FIRST_PIECES))[0]
        lengths = rng.choices(*_weighted(LENGTHS_OF_OTHER_PIECES), k=count - 1)
        name = rng.choice(begin[first]) + "".join(rng.choice(go_on[length]) for length in lengths)
        if len(encode_text(f" {name}")) == count:
            return name


def _weighted(weights: dict[int, int]) -> tuple[list[int], list[int]]:
    return list(weights), list(weights.values())


def _blended_name(rng: random.Random) -> str:
    """The beginning of one real name and the end of another, joined where a vowel meets a consonant: Prirash."""
    while True:
        first, last = rng.choice(real_names()), rng.choice(real_names()).lower()
        cut, start = rng.randint(2, 6), rng.randint(1, 5)
        beginning, end = first[:cut], last[start:]
        if len(end) >= 2 and (beginning[-1] in "aeiouy") != (end[0] in "aeiouy"):
            return beginning + end


# What people do to a text when they type


def type_like_a_person(text: str, rng: random.Random) -> str:
    """`text` with other case, punctuation, fillers and typing errors; its slots stay as they are."""
    noise = load_phrases()["noise"]
    if rng.random() < 0.35:  # two sentences instead of one
        stop = rng.choice(".!")
        text = re.sub(r", ([a-zA-Z])", lambda match: f"{stop} {match[1].upper()}", text)
    if rng.random() < 0.06:
        text = rng.choice(noise["before"]) + text
    if rng.random() < 0.06:
        text = _mistype(text, rng)
    is_question = text.endswith("?")
    text = text.removesuffix("?")
    if not text.endswith("}"):
        text = text[:1].upper() + text[1:] if rng.random() < 0.7 else text
    elif not text.startswith("{"):
        text = text[:1].upper() + text[1:] if rng.random() < 0.8 else text
    style = rng.random()
    if style < 0.1:
        text = _outside_slots(str.lower, text)
    elif style < 0.12:
        text = _outside_slots(str.upper, text)
    if "'" in text:
        text = text.replace("'", rng.choices(["'", "", "’"], [85, 10, 5])[0])
    if rng.random() < 0.03:
        return text + rng.choice(noise["after"])
    if is_question:
        return text + rng.choices(["?", "", "??", "?!"], [80, 16, 3, 1])[0]
    return text + rng.choices([".", "!", "", "...", "!!"], [42, 23, 30, 3, 2])[0]


def _outside_slots(change, text: str) -> str:
    """`change` applied to what stands between the slots."""
    return "".join(part if part.startswith("{") else change(part) for part in re.split(r"(\{\w+\})", text))


def _mistype(text: str, rng: random.Random) -> str:
    """`text` with one letter of one longer word swapped, left out or doubled."""
    words = list(re.finditer(r"(?<![\w{])[A-Za-z]{4,}(?![\w}'])", text))
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    here, after = text[at : at + 2]
    return text[:at] + rng.choice([after + here, after, here + here + after]) + text[at + 2 :]


class Talk:
    """One conversation in the making: its messages, its values, and which of them were told."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.phrases = load_phrases()
        self.messages: list[dict[str, str]] = []
        self.values: dict[str, str] = {}
        self.told: set[str] = set()
        self.played: set[int] = set()

    def say(self, role: str, templates: Sequence[str]) -> None:
        """Add a message of a system or a user; the values in it are told from here on."""
        text = expand(parse_template(self.rng.choice(templates)), self.rng)
        if role == "user":
            text = type_like_a_person(text, self.rng)
        self.told.update(_SLOT.findall(text))
        self._add(role, text)

    def reply(self, templates: Sequence[str]) -> None:
        """Add a message of the assistant, who uses only what was told, and a known name more often than not."""
        possible = [template for template in templates if self.told.issuperset(_SLOT.findall(template))]
        with_name = [template for template in possible if "{name}" in template]
        without_name = [template for template in possible if "{name}" not in template]
        chosen = with_name if not without_name or (with_name and self.rng.random() < 0.7) else without_name
        self._add("assistant", expand(parse_template(self.rng.choice(chosen)), self.rng))

    def _add(self, role: str, text: str) -> None:
        self.messages.append({"role": role, "content": _SLOT.sub(lambda match: self._value(match[1]), text)})

    def _value(self, slot: str) -> str:
        if slot not in self.values:
            choose = self._new_names if slot in LISTS else self._new_name if slot.endswith("name") else self._choose
            self.values[slot] = choose(slot)
        return self.values[slot]

    def _new_names(self, slot: str) -> str:
        names = [self._new_name(slot) for _ in range(self.rng.randint(2, 5))]
        return " ".join(names) if slot == "words" else f"{', '.join(names[:-1])} and {names[-1]}"

    def _choose(self, slot: str) -> str:
        return self.rng.choice(self.phrases["values"][slot])

    def _new_name(self, slot: str) -> str:
        if slot == "pet_name" and self.rng.random() < 0.5:
            return self.rng.choice(self.phrases["names"]["Pets"].split())
        names = made_up_names() if self.rng.random() < MADE_UP_NAME_SHARE else real_names()
        name = self.rng.choice(names)
        if name in self.values.values():
            return self._new_name(slot)
        return name.lower() if self.rng.random() < 0.03 else name  # some people type no capitals

    def play(self, topic: str) -> None:
        """A few lines on a topic, and on the question that the assistant's last line puts."""
        scripts = [script for script in self.phrases["topics"][topic] if id(script) not in self.played]
        if not scripts:
            return
        script = self.rng.choices(scripts, [script["weight"] for script in scripts])[0]
        self.played.add(id(script))
        for index, line in enumerate(script["lines"]):
            if index % 2:
                self.reply(line)
            else:
                self.say("user", line)
        self._follow_invitation()

    def _follow_invitation(self) -> None:
        last = self.messages[-1]["content"]
        for question, topic in self.phrases["invites"].items():
            if last.endswith(question) and self.rng.random() < 0.6:
                return self.play(topic)

    def play_some(self, topics: dict[str, int], count: int) -> None:
        """`count` topics, drawn by weight."""
        for topic in self.rng.choices(list(topics), list(topics.values()), k=count):
            self.play(topic)

    def tell(self, fact: str) -> None:
        """The person tells a fact; a name sometimes together with something else."""
        if fact == "name" and self.rng.random() < 0.2:
            script = self.rng.choice(self.phrases["introductions"])
        else:
            script = self.phrases["facts"][fact]
        self.say("user", script["tell"])
        self.reply(script["reply"])
        self._follow_invitation()

    def ask(self, fact: str) -> None:
        """The person asks for a fact, told or not."""
        script = self.phrases["facts"][fact]
        self.say("user", script["ask"])
        self.reply(script["answer"] if fact in self.told else script["unknown"])


OPENINGS = {"greeting": 5, "how_are_you": 2, "smalltalk": 2, "feeling": 1}
FILLERS = {"smalltalk": 5, "how_are_you": 2, "thanks": 1, "feeling": 1, "plans": 1}
CLOSINGS = {"farewell": 3, "thanks": 1}


def _count(rng: random.Random, *weights: int) -> int:
    return rng.choices(range(len(weights)), weights)[0]


def _talk_with_name(talk: Talk) -> None:
    rng = talk.rng
    talk.play_some(OPENINGS, _count(rng, 70, 27, 3))
    talk.tell("name")
    talk.play_some(FILLERS, _count(rng, 70, 21, 7, 2))
    if rng.random() < 0.9:
        talk.ask("name")
    if rng.random() < 0.08:
        talk.play_some(FILLERS, 1)
        talk.ask("name")
    talk.play_some(CLOSINGS, _count(rng, 80, 20))


def _talk_with_name_from_system(talk: Talk) -> None:
    talk.play_some(OPENINGS, _count(talk.rng, 40, 60))
    talk.ask("name")
    talk.play_some(CLOSINGS, _count(talk.rng, 60, 40))


def _talk_with_facts(talk: Talk) -> None:
    rng = talk.rng
    talk.play_some(OPENINGS, _count(rng, 75, 25))
    knows_name = rng.random() < 0.4
    if knows_name:
        talk.tell("name")
    facts = rng.sample(
        [fact for fact in talk.phrases["facts"] if fact not in ("name", *LISTS)], 1 + _count(rng, 80, 20)
    )
    for fact in facts:
        if fact not in talk.told:
            talk.tell(fact)
    talk.play_some(FILLERS, _count(rng, 75, 25))
    questions = [rng.choice(facts)] + ["name"] * (knows_name and rng.random() < 0.6)
    for fact in rng.sample(questions, len(questions)):
        talk.ask(fact)
    talk.play_some(CLOSINGS, _count(rng, 85, 15))


def _talk_with_many_names(talk: Talk) -> None:
    rng = talk.rng
    talk.play_some(OPENINGS, _count(rng, 85, 15))
    fact = rng.choice(LISTS)
    talk.tell(fact)
    talk.play_some(FILLERS, _count(rng, 85, 15))
    if rng.random() < 0.6:
        talk.ask(fact)


def _talk_without_fact(talk: Talk) -> None:
    rng = talk.rng
    talk.play_some(OPENINGS, _count(rng, 50, 50))
    fact = "name" if rng.random() < 0.7 else rng.choice(list(talk.phrases["facts"]))
    talk.ask(fact)
    if rng.random() < 0.5:
        talk.tell(fact)
        talk.ask(fact)


def _small_talk(talk: Talk) -> None:
    rng = talk.rng
    first = {**OPENINGS, "how_are_you": 3, "smalltalk": 5, "thanks": 4, "farewell": 6}
    topic = rng.choices(list(first), list(first.values()))[0]
    talk.play(topic)
    if topic != "farewell":
        talk.play_some(FILLERS, _count(rng, 45, 40, 15))
        talk.play_some(CLOSINGS, _count(rng, 50, 50))


# Kinds of conversation: how many in a hundred, and who plays them. Remembering is the hardest lesson, so it is the most
# frequent one.
KINDS = {
    "name": (36, _talk_with_name),
    "name_from_system": (2, _talk_with_name_from_system),
    "fact": (12, _talk_with_facts),
    "names": (16, _talk_with_many_names),
    "unknown": (4, _talk_without_fact),
    "chat": (30, _small_talk),
}


def make_conversation(rng: random.Random) -> list[dict[str, str]]:
    """One conversation as messages, under 250 tokens."""
    talk = Talk(rng)
    weights, players = zip(*KINDS.values(), strict=True)
    play = rng.choices(players, weights)[0]
    if play is _talk_with_name_from_system:
        talk.say("system", talk.phrases["system_with_name"])
    elif rng.random() < SYSTEM_SHARE:
        talk.say("system", talk.phrases["system"])
    play(talk)
    has_system = talk.messages[0]["role"] == "system"
    return talk.messages[: has_system + 2 * MAX_EXCHANGES]


def generate(count: int, seed: int = 1337) -> Iterator[list[dict[str, str]]]:
    """`count` distinct conversations, each a list of {"role", "content"} messages; the same for the same seed."""
    from data.dedup import DigestSet  # not above: corpus.py makes the project's modules importable

    rng = random.Random(seed)
    seen = DigestSet()
    while len(seen) < count:
        made = [make_conversation(rng) for _ in range(min(MADE_AT_ONCE, count - len(seen)))]
        yield from itertools.compress(made, seen.add(_digests(made)))


def _digests(conversations: Sequence[list[dict[str, str]]]) -> np.ndarray:
    """What the conversations are compared by: (conversations, 2) uint64."""
    texts = ("\0".join(message["content"] for message in conversation) for conversation in conversations)
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
