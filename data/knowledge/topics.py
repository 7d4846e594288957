"""What the texts are about: topics by subject and age, or questions with an optional passage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from data.knowledge.prompts import read_json


@dataclass(frozen=True)
class Topic:
    """A topic; without an age it is explained to readers of every age."""

    text: str
    subject: str = "general knowledge"
    age: str | None = None


@dataclass(frozen=True)
class Question:
    """A question, and the passage that contains its answer if there is one."""

    text: str
    passage: str = ""


def read_topics(path: Path, ages: Iterable[str]) -> list[Topic]:
    """The distinct topics of a file: one per line of a text, or a JSON file of subjects, ages and topics.

    The JSON layout is that of data/knowledge-topics.json: {subject: {age: [topic, ...]}}; {subject: [topic, ...]} and
    a plain list are accepted too. Lines that are empty or start with # are ignored. `ages` are the known ages.
    """
    if path.suffix.lower() == ".json":
        found = list(_json_topics(read_json(path), path, set(ages)))
    else:
        found = [Topic(line) for line in text_lines(path) if not line.startswith("#")]
    topics = list({_normal(topic.text): topic for topic in reversed(found)}.values())[::-1]  # the first of equal ones
    if not topics:
        raise UserError(f"{path} contains no topic; write one topic per line")
    return topics


def text_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without surrounding white space."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path} not read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    return [line.strip() for line in lines if line.strip()]


def _json_topics(content: object, path: Path, ages: set[str]) -> Iterator[Topic]:
    by_subject = content if isinstance(content, dict) else {"general knowledge": content}
    for subject, by_age in by_subject.items():
        for age, texts in (by_age if isinstance(by_age, dict) else {None: by_age}).items():
            if age is not None and age not in ages:
                raise UserError(f'{path} has an unknown age "{age}"; the prompts file has {", ".join(sorted(ages))}')
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f'{path} has no list of topics at "{subject}"; use the layout of knowledge-topics.json')
            yield from (Topic(text.strip(), subject, age) for text in texts if text.strip())


def read_questions(records: Iterable[Mapping]) -> Iterator[Question]:
    """The distinct questions of records, in order.

    A record has `question` and possibly `context`, or is part of SQuAD's own nested layout: `data`, `paragraphs` and
    `qas`. Records without a question are ignored.
    """
    seen: set[str] = set()
    for question in _all_questions(records, passage=""):
        if (normal := _normal(question.text)) not in seen:
            seen.add(normal)
            yield question


def _all_questions(records: Iterable[Mapping], passage: str) -> Iterator[Question]:
    for record in records:
        context = record.get("context")
        inner = context.strip() if isinstance(context, str) else passage
        if isinstance(question := record.get("question"), str) and question.strip():
            yield Question(question.strip(), inner)
        for name in ("data", "paragraphs", "qas"):
            if isinstance(parts := record.get(name), list):
                yield from _all_questions((part for part in parts if isinstance(part, dict)), inner)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
