"""Lists of turns in the layouts that people use, converted to lists of {"role", "content"}.

>>> list_of_turns(["Hi", "Hello!"])
[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from data.layouts.turns import known_role

# Fields with a question and its answer, the most common first.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "answer"),
    ("instruction", "completion"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("input", "output"),
    ("input", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "completion"),
    ("question", "output"),
    ("problem", "solution"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("human", "bot"),
    ("context", "response"),
    ("inputs", "targets"),
)


def is_list_of_turns(value: Any) -> bool:
    """Whether a value is a conversation: a list, a list as JSON text, or a struct of lists.

    A list of records that contain conversations themselves is not a conversation.
    """
    if value is None:
        return False
    value = _parsed(value)
    if isinstance(value, Mapping):
        return len(value) >= 2 and all(isinstance(column, list) for column in value.values())
    if not isinstance(value, list):
        return False
    first = value[0] if value and isinstance(value[0], Mapping) else {}
    nested = ("messages", "conversations", "conversation")
    return "role" in first or "from" in first or not any(isinstance(first.get(field), list) for field in nested)


def list_of_turns(value: Any) -> list:
    """The turns of a value for which `is_list_of_turns` is true. Nulls are left out, other elements kept."""
    value = _parsed(value)
    if isinstance(value, Mapping):  # parquet: one list per field
        rows = itertools.zip_longest(*value.values())
        return [dict(zip(value, row, strict=True)) for row in rows if any(each is not None for each in row)]
    value = [turn for turn in value if turn is not None]
    if all(isinstance(turn, str) for turn in value):
        return _alternating(value)
    return [made for turn in value for made in _turns_of_element(turn)]


def pair_of_turns(question: Any, answer: Any, addition: Any = None) -> list:
    """The turns of a question, which `addition` may extend, and an answer; both may be lists of turns themselves."""
    if isinstance(question, list) and isinstance(answer, list):  # TRL's conversational prompt and completion
        return [*list_of_turns(question), *list_of_turns(answer)]
    if isinstance(question, list):
        return [*list_of_turns(question), {"role": "assistant", "content": answer}]
    if isinstance(question, str) and isinstance(addition, str) and addition.strip():
        question = f"{question}\n\n{addition}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _answer_text(answer)}]


def _answer_text(answer: Any) -> Any:
    """An answer, or the text in it if it is a list with a single text."""
    return answer[0] if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], str) else answer


def _parsed(value: Any) -> Any:
    """A list or struct that is stored as JSON text; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _alternating(texts: list[str]) -> list:
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def _turns_of_element(turn: Any) -> list:
    """The turns in one element of a list: the element itself, or a question and its answer."""
    if type(turn) is dict and ("role" in turn or "from" in turn):
        return [turn]  # nearly every turn, recognized first because it is the fastest
    if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
        role = known_role(turn[0])
        return [{"role": role, "content": turn[1]}] if role else _alternating(turn)
    if isinstance(turn, Mapping) and not any(turn.get(field) for field in ("role", "from", "sender", "author")):
        for question, answer in PAIRS:
            if turn.get(question) is not None and turn.get(answer) is not None:
                return pair_of_turns(turn[question], turn[answer])
    return [turn]


def is_turn(value: Any) -> bool:
    """Whether a value is one turn rather than a record: it has a role and content, but no list of turns.

    >>> is_turn({"role": "user", "content": "Hi"}), is_turn({"messages": []})
    (True, False)
    """
    if not isinstance(value, Mapping) or len(value) > 4:
        return False
    has_role = any(isinstance(value.get(field), str) for field in ("role", "from", "sender"))
    return has_role and any(field in value for field in ("content", "value")) and "messages" not in value
