"""Chat records in the layouts that people publish, made into conversations of system, user and assistant messages.

>>> records = [{"instruction": "Add 1 and 2", "context": "", "response": "3"}]
>>> list(conversations(records))
[[{'role': 'user', 'content': 'Add 1 and 2'}, {'role': 'assistant', 'content': '3'}]]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from data.layouts.oasst import oasst_conversations, rows_of_tree, slim_row
from data.layouts.turns import Message, usable_messages


@dataclass(frozen=True)
class Layout:
    """How one kind of chat record is recognized, and what its turns are: mappings of role and content.

    `turns` is None for OASST, whose trees are several conversations.
    """

    name: str
    matches: Callable[[Mapping], bool]
    turns: Callable[[Mapping], list] | None = None


def layout_of(record: Mapping) -> str | None:
    """The name of a chat record's layout, by its fields; None if it is not a chat record.

    >>> layout_of({"instruction": "Add 1 and 2", "context": "", "response": "3"})
    'dolly'
    """
    layout = _find_layout(record)
    return layout.name if layout else None


def conversations(
    records: Iterable[Mapping],
    oasst_all_paths: bool = False,
    skipped: Counter | None = None,
    language: str | None = None,
    where: str | Path = "the input",
) -> Iterator[list[Message]]:
    """Conversations of chat records, whose layout is recognized record by record.

    `messages` (role and content, which may be a list of text parts), ShareGPT, Alpaca, Dolly, OASST message rows and
    OASST trees: of each tree the best-ranked path, or every path. Roles become system, user and assistant, and a
    conversation ends with the assistant's last message. Whatever cannot be used is counted by reason in `skipped`.
    `language` selects OASST trees. OASST's message rows are all in memory before their trees are walked. Raises
    UserError for a record of an unknown layout.
    """
    skipped = Counter() if skipped is None else skipped
    oasst_rows: list[Mapping] = []
    for number, record in enumerate(records, 1):
        layout = _find_layout(record)
        if layout is None:
            fields = ", ".join(map(str, record)) or "none"
            raise UserError(
                f"{where}: record {number} is not a conversation (its fields: {fields}); give messages, conversations, "
                "instruction and output, instruction and response, or OASST fields"
            )
        if layout.name == "oasst messages":
            oasst_rows.append(slim_row(record))
        elif layout.turns is None:
            yield from oasst_conversations(rows_of_tree(record["prompt"]), oasst_all_paths, skipped, language)
        elif messages := usable_messages(_system_turn(record) + layout.turns(record), skipped):
            yield messages
    yield from oasst_conversations(oasst_rows, oasst_all_paths, skipped, language)


def _find_layout(record: Mapping) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.matches(record)), None)


def _system_turn(record: Mapping) -> list:
    """The turn of a system prompt that a record keeps in a field of its own."""
    system = record.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []


def _has(*fields: str) -> Callable[[Mapping], bool]:
    return lambda record: record.keys() >= set(fields)


def _has_list(field: str) -> Callable[[Mapping], bool]:
    return lambda record: isinstance(record.get(field), list)


def _question_and_answer(question: str, addition: str, answer: str) -> Callable[[Mapping], list]:
    """The two turns of a record with a question, which another field may extend, and an answer."""

    def turns(record: Mapping) -> list:
        asked, added = record[question], record.get(addition)
        if isinstance(asked, str) and isinstance(added, str) and added.strip():
            asked = f"{asked}\n\n{added}"
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": record[answer]}]

    return turns


def _is_oasst_tree(record: Mapping) -> bool:
    return isinstance(record.get("prompt"), Mapping) and "replies" in record["prompt"]


# A record has the first layout that matches.
LAYOUTS = (
    Layout("messages", _has_list("messages"), lambda record: record["messages"]),
    Layout("sharegpt", _has_list("conversations"), lambda record: record["conversations"]),
    Layout("oasst trees", _is_oasst_tree),
    Layout("oasst messages", _has("message_id", "parent_id", "role", "text")),
    Layout("alpaca", _has("instruction", "output"), _question_and_answer("instruction", "input", "output")),
    Layout("dolly", _has("instruction", "response"), _question_and_answer("instruction", "context", "response")),
)
