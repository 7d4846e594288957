"""Small talk made from the templates of chitchat-phrases.json: greetings, names, facts to remember, short tales.

Questions beyond small talk get an honest reply, so that a model learns where its knowledge ends.

    >>> next(generate(1))[0]["role"]
    'user'

The user's lines get typing habits (typing_habits.py). Values such as names are left as they are, because the lesson
is to repeat them.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data.chitchat.names import hero_names, made_up_names, real_names
from data.chitchat.templates import PHRASES_FILE, SLOT, expand, load_phrases, parse_template
from data.chitchat.typing_habits import type_like_a_person
from data.dedup import DigestSet
from data.tales import short

MADE_UP_NAME_FRACTION = 0.75  # of the names in conversations; the others are real ones
LISTS = ("friends", "words")  # slots of several names: many tokens to copy, which teaches copying fastest
# Values that a model has to copy: made-up words, and for pets people's names, take the place of this fraction of them.
MADE_UP_VALUES = {"city": 0.8, "colour": 0.85, "pet_name": 0.75}
SYSTEM_FRACTION = 0.15
MAX_EXCHANGES = 10  # keeps a conversation under 500 tokens, so that it fits into a block of 512
CONVERSATIONS_AT_ONCE = 100  # made before they are compared with the earlier ones

Conversation = list[dict[str, str]]


class Talk:
    """A conversation being made: its messages, its values, and which of these were told."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.phrases = load_phrases()
        self.messages: list[dict[str, str]] = []
        self.values: dict[str, str] = {}
        self.told: set[str] = set()
        self.played: set[int] = set()

    def say(self, role: str, templates: Sequence[str]) -> None:
        """Add a system or user message; the values in it count as told."""
        text = expand(parse_template(self.rng.choice(templates)), self.rng)
        if role == "user":
            text = type_like_a_person(text, self.rng)
        self.told.update(SLOT.findall(text))
        self._add(role, text)

    def reply(self, templates: Sequence[str]) -> None:
        """Add an assistant message, which uses only what was told, and a known name more often than not."""
        possible = [template for template in templates if self.told.issuperset(SLOT.findall(template))]
        with_name = [template for template in possible if "{name}" in template]
        without_name = [template for template in possible if "{name}" not in template]
        chosen = with_name if not without_name or (with_name and self.rng.random() < 0.7) else without_name
        self._add("assistant", expand(parse_template(self.rng.choice(chosen)), self.rng))

    def _add(self, role: str, text: str) -> None:
        self.messages.append({"role": role, "content": SLOT.sub(lambda match: self._value(match[1]), text)})

    def _value(self, slot: str) -> str:
        if slot not in self.values:
            choose = self._new_names if slot in LISTS else self._new_name if slot.endswith("name") else self._choose
            self.values[slot] = choose(slot)
        return self.values[slot]

    def _new_names(self, slot: str) -> str:
        names = [self._new_name(slot) for _ in range(self.rng.randint(2, 5))]
        return " ".join(names) if slot == "words" else f"{', '.join(names[:-1])} and {names[-1]}"

    def _choose(self, slot: str) -> str:
        if self.rng.random() < MADE_UP_VALUES.get(slot, 0):
            word = self.rng.choice(made_up_names())
            return word if slot == "city" else word.lower()
        return self.rng.choice(self.phrases["values"][slot])

    def _new_name(self, slot: str) -> str:
        if slot == "pet_name" and self.rng.random() > MADE_UP_VALUES["pet_name"]:
            return self.rng.choice(self.phrases["names"]["Pets"].split())
        names = made_up_names() if self.rng.random() < MADE_UP_NAME_FRACTION else real_names()
        name = self.rng.choice(names)
        if name in self.values.values():
            return self._new_name(slot)
        return name.lower() if self.rng.random() < 0.03 else name  # some people do not type capitals

    def play(self, topic: str) -> None:
        """A few lines on a topic, and an answer if the assistant's last line is a question."""
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
        """A few lines on each of `count` topics, drawn by weight."""
        for topic in self.rng.choices(list(topics), list(topics.values()), k=count):
            self.play(topic)

    def tell(self, fact: str) -> None:
        """The user tells a fact; sometimes a name together with something else."""
        if fact == "name" and self.rng.random() < 0.2:
            script = self.rng.choice(self.phrases["introductions"])
        else:
            script = self.phrases["facts"][fact]
        self.say("user", script["tell"])
        self.reply(script["reply"])
        self._follow_invitation()

    def ask(self, fact: str) -> None:
        """The user asks for a fact, whether told or not."""
        script = self.phrases["facts"][fact]
        self.say("user", script["ask"])
        self.reply(script["answer"] if fact in self.told else script["unknown"])

    def tell_tale(self) -> None:
        """The user asks for a story; its hero is the user, if the name is known."""
        self.say("user", self.phrases["tale"])
        hero = self.values["name"] if "name" in self.told else self.rng.choice(hero_names())
        self._add("assistant", short.short_tale(self.rng, hero))


OPENINGS = {"greeting": 5, "how_are_you": 2, "smalltalk": 2, "feeling": 1}
FILLERS = {"smalltalk": 5, "how_are_you": 2, "thanks": 1, "feeling": 1, "plans": 1, "beyond": 2}
CLOSINGS = {"farewell": 3, "thanks": 1}
LONG_FACTS = ("pet_name", "city", "colour", "food", "hobby", "relative_name")


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
    first = {**OPENINGS, "how_are_you": 4, "smalltalk": 5, "thanks": 6, "farewell": 10, "beyond": 9}
    topic = rng.choices(list(first), list(first.values()))[0]
    talk.play(topic)
    if topic != "farewell":
        talk.play_some(FILLERS, _count(rng, 45, 40, 15))
        talk.play_some(CLOSINGS, _count(rng, 50, 50))


def _one_exchange(talk: Talk) -> None:
    """A first message and its reply: few tokens, and without them a first "Bye!" is answered with "Hello!"."""
    talk.play_some({"farewell": 8, "beyond": 6, "thanks": 2, "how_are_you": 2, "greeting": 2}, 1)


def _long_talk(talk: Talk) -> None:
    """Facts that are asked for several exchanges after they were told."""
    rng = talk.rng
    talk.play_some(OPENINGS, _count(rng, 50, 50))
    facts = ["name"] * (rng.random() < 0.8) + rng.sample(LONG_FACTS, 1 + _count(rng, 60, 40))
    for fact in rng.sample(facts, len(facts)):
        if fact not in talk.told:
            talk.tell(fact)
            talk.play_some(FILLERS, _count(rng, 40, 40, 20))
    talk.play_some(FILLERS, _count(rng, 20, 40, 30, 10))
    for fact in rng.sample(facts, len(facts)):
        talk.ask(fact)
        talk.play_some(FILLERS, _count(rng, 60, 40))
    talk.play_some(CLOSINGS, _count(rng, 60, 40))


def _talk_with_tale(talk: Talk) -> None:
    rng = talk.rng
    talk.play_some(OPENINGS, _count(rng, 60, 40))
    if rng.random() < 0.85:
        talk.tell("name")
        talk.play_some(FILLERS, _count(rng, 50, 35, 15))
    talk.tell_tale()
    talk.play_some({"after_tale": 2, **CLOSINGS}, _count(rng, 50, 50))
    if rng.random() < 0.3:
        talk.ask("name")


# Kinds of conversation: their weights, and the functions that make them. Remembering is the hardest lesson, so it is
# the most frequent one.
KINDS = {
    "name": (10, _talk_with_name),
    "name_from_system": (2, _talk_with_name_from_system),
    "fact": (11, _talk_with_facts),
    "names": (8, _talk_with_many_names),
    "long": (27, _long_talk),
    "unknown": (3, _talk_without_fact),
    "tale": (10, _talk_with_tale),
    "chat": (19, _small_talk),
    "exchange": (12, _one_exchange),
}


def make_conversation(rng: random.Random) -> Conversation:
    """One conversation as messages, under 500 tokens."""
    talk = Talk(rng)
    weights, players = zip(*KINDS.values(), strict=True)
    play = rng.choices(players, weights)[0]
    if play is _talk_with_name_from_system:
        talk.say("system", talk.phrases["system_with_name"])
    elif rng.random() < SYSTEM_FRACTION:
        talk.say("system", talk.phrases["system"])
    play(talk)
    has_system = talk.messages[0]["role"] == "system"
    return talk.messages[: has_system + 2 * MAX_EXCHANGES]


def source_files() -> list[Path]:
    """The files that, with the seed, decide the conversations."""
    return [PHRASES_FILE, *sorted(Path(__file__).parent.glob("*.py")), *short.source_files()]


def generate(
    count: int, seed: int = 1337, make: Callable[[random.Random], Conversation] = make_conversation
) -> Iterator[Conversation]:
    """`count` distinct conversations, each a list of {"role", "content"} messages; the same for the same seed."""
    rng = random.Random(seed)
    seen = DigestSet()
    while len(seen) < count:
        made = [make(rng) for _ in range(min(CONVERSATIONS_AT_ONCE, count - len(seen)))]
        yield from itertools.compress(made, seen.add(_digests(made)))


def _digests(conversations: Sequence[Conversation]) -> np.ndarray:
    """The digests by which conversations are compared: (conversations, 2) uint64."""
    texts = ("\0".join(message["content"] for message in conversation) for conversation in conversations)
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
