"""The plan: which requests are sent, in which order. It depends only on the topics, the prompts and the seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.knowledge.prompts import Prompts, filled
from data.knowledge.topics import Question, Topic


@dataclass(frozen=True)
class Request:
    """One request to the model.

    `key` identifies it in the journal: a digest of the model and the messages. `user_message` is the question, if the
    answer is to become the reply of a conversation.
    """

    key: str
    messages: tuple[dict[str, str], ...]
    as_chat: bool
    about: str
    form: str
    reader: str
    user_message: str | None = None


def plan(
    sources: Sequence[Topic] | Sequence[Question], prompts: Prompts, as_chat: bool, model: str, seed: int
) -> Iterator[Request]:
    """All distinct requests: every topic once, in random order, then every topic in another form, and so on.

    The first requests of a plan are the same for every number of documents, so a larger number continues a smaller
    one.
    """
    order: list[Topic | Question] = list(sources)
    random.Random(seed).shuffle(order)
    offsets = [random.Random(f"{seed} {source.text}").randrange(1 << 30) for source in order]
    seen: set[str] = set()  # an edited prompts file may make two requests equal
    n_rounds = max((_n_variants(source, prompts, as_chat) for source in order), default=0)
    for number in range(n_rounds):
        for source, offset in zip(order, offsets, strict=True):
            if number < _n_variants(source, prompts, as_chat):
                request = _request(source, offset + number, prompts, as_chat, model)
                if request.key not in seen:
                    seen.add(request.key)
                    yield request


def _kind(source: Topic | Question, as_chat: bool) -> str:
    return f"{'topics' if isinstance(source, Topic) else 'questions'} as {'chat' if as_chat else 'text'}"


def _readers(source: Topic | Question, prompts: Prompts) -> list[str]:
    age = source.age if isinstance(source, Topic) else None
    return [age] if age is not None else list(prompts.readers)


def _n_variants(source: Topic | Question, prompts: Prompts, as_chat: bool) -> int:
    return len(prompts.forms[_kind(source, as_chat)]) * len(prompts.styles) * len(_readers(source, prompts))


def variant(number: int, n_forms: int, n_styles: int, n_readers: int) -> tuple[int, int, int]:
    """Indices of the form, style and reader of variant `number`: consecutive ones differ in all three if possible.

    >>> sorted(variant(number, 2, 3, 2) for number in range(12)) == [
    ...     (form, style, reader) for form in range(2) for style in range(3) for reader in range(2)]
    True
    """
    pair = number % (n_forms * n_styles)
    form = pair % n_forms
    style = (pair // n_forms + form) % n_styles
    return form, style, (number // (n_forms * n_styles) + pair) % n_readers


def _request(source: Topic | Question, number: int, prompts: Prompts, as_chat: bool, model: str) -> Request:
    forms, readers = prompts.forms[_kind(source, as_chat)], _readers(source, prompts)
    chosen = variant(number, len(forms), len(prompts.styles), len(readers))
    form, style, age = list(forms)[chosen[0]], prompts.styles[chosen[1]], readers[chosen[2]]
    values = {"reader": prompts.readers[age], "style": style}
    if isinstance(source, Topic):
        values |= {"topic": source.text, "subject": source.subject}
    else:
        values["question"] = source.text
    prompt = filled(forms[form], values)
    if isinstance(source, Question) and source.passage:
        prompt += "\n\n" + filled(prompts.with_passage, {"passage": source.passage})
    messages = ({"role": "system", "content": prompts.system}, {"role": "user", "content": prompt})
    digest = hashlib.sha256(json.dumps([model, *messages], sort_keys=True).encode()).hexdigest()[:32]
    user_message = source.text if as_chat and isinstance(source, Question) else None
    return Request(digest, messages, as_chat, source.text, form, age, user_message)
