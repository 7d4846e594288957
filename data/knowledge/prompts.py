"""The wording of the requests: a JSON file that a person can edit, checked when it is read.

The file contains what the model is told in general ("system"), the readers by age, the styles, and for each kind of
request the forms by name. A form is a sentence with placeholders in braces: {topic}, {subject}, {question}, {reader}
and {style}. "with_passage" is added to questions that come with a passage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import UserError, alternatives

KINDS = ("topics as text", "topics as chat", "questions as text", "questions as chat")
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompts:
    """The checked content of a prompts file; `forms` maps each of KINDS to its forms by name."""

    system: str
    with_passage: str
    readers: dict[str, str]
    styles: tuple[str, ...]
    forms: dict[str, dict[str, str]]


def read_prompts(path: Path) -> Prompts:
    """The prompts in a file. Raises UserError that names what is missing or wrong in it."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise _wrong(path, "must be a JSON object")
    for name in ("system", "with_passage"):
        if not isinstance(content.get(name), str):
            raise _wrong(path, f'needs a text "{name}"')
    for name in ("readers", *KINDS):
        if not _is_texts(content.get(name)):
            raise _wrong(path, f'needs an object "{name}" with at least one text')
    styles = content.get("styles", [])
    if not isinstance(styles, list) or not all(isinstance(style, str) for style in styles):
        raise _wrong(path, '"styles" must be a list of texts')
    prompts = Prompts(
        content["system"],
        content["with_passage"],
        content["readers"],
        tuple(styles) or ("",),
        {kind: content[kind] for kind in KINDS},
    )
    _check_placeholders(path, prompts)
    return prompts


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError if it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} not read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise _wrong(path, "is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise _wrong(path, f"is not JSON (line {error.lineno}: {error.msg})") from error


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its placeholders replaced; other braces stay as they are.

    >>> filled("Explain {topic}. {style}", {"topic": "tides {x}", "style": ""})
    'Explain tides {x}.'
    """
    return PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), template).strip()


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(text, str) and text for text in value.values())


def _check_placeholders(path: Path, prompts: Prompts) -> None:
    for kind, forms in prompts.forms.items():
        subject = kind.partition("s ")[0]  # "topic" or "question"
        allowed = {subject, "reader", "style"} | ({"subject"} if subject == "topic" else set())
        for name, form in forms.items():
            used = set(PLACEHOLDER.findall(form))
            if unknown := sorted(used - allowed):
                known = alternatives([f"{{{word}}}" for word in sorted(allowed)])
                raise _wrong(path, f'has an unknown placeholder {{{unknown[0]}}} in "{kind}", "{name}"; use {known}')
            if subject not in used:
                raise _wrong(path, f'needs the placeholder {{{subject}}} in "{kind}", "{name}"')
    if "{passage}" not in prompts.with_passage:
        raise _wrong(path, 'needs the placeholder {passage} in "with_passage"')


def _wrong(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}; correct it, or copy data/knowledge-prompts.json and edit the copy")
