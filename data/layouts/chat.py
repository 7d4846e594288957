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

from data.counts import count_unknown
from data.layouts.exports import chatgpt_turns, claude_turns, is_chatgpt, is_claude
from data.layouts.feedback import latest_events, preferred_reply
from data.layouts.messengers import is_messenger_export, messenger_conversations
from data.layouts.oasst import is_oasst_row, is_oasst_tree, oasst_conversations, rows_of_tree, slim_row
from data.layouts.turn_lists import PAIRS, is_list_of_turns, list_of_turns, pair_of_turns
from data.layouts.turns import Message, first_present, usable_messages

_SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
_PREFERENCES = frozenset(
    (
        *("chosen", "rejected", "chosen_response", "rejected_response", "preferred_output", "non_preferred_output"),
        *("response_j", "response_k"),
    )
)
PREFERENCE = "preference data (chosen and rejected answers), not trained as answers"
LABEL_FALSE = "preference data (label false), not trained as an answer"
BAD_REPLY = "reply rated bad, without a correction"


@dataclass(frozen=True)
class Layout:
    """How one kind of chat record is recognized, and what its turns are: mappings of role and content.

    `turns` returns the turns of each conversation of a record, of which there is usually one. It is None for layouts
    that `conversations` handles separately.
    """

    name: str
    matches: Callable[[Mapping], bool]
    turns: Callable[[Mapping], list[list]] | None = None


def layout_of(record: Mapping) -> str | None:
    """The name of a chat record's layout, by its fields; None if it is not a chat record.

    >>> layout_of({"instruction": "Add 1 and 2", "context": "", "response": "3"})
    'dolly'
    """
    found = _find_layout(record)
    return found[0].name if found else None


def known_layouts() -> str:
    """The layouts as a phrase for messages: the fields by which they are recognized."""
    pairs = ", ".join(f"{question}/{answer}" for question, answer in PAIRS[:6])
    return (
        f"messages, conversations, conversation, a list of messages, {pairs}, OASST fields, or an export of ChatGPT, "
        "Claude, Telegram or Discord"
    )


def conversations(
    records: Iterable[Mapping],
    oasst_all_paths: bool = False,
    skipped: Counter | None = None,
    language: str | None = None,
    where: str | Path = "the input",
    me: str | None = None,
) -> Iterator[list[Message]]:
    """Conversations of chat records, whose layout is recognized record by record: see LAYOUTS.

    A field that is null counts as absent. Roles become system, user and assistant, and a conversation ends with the
    assistant's last message. Whatever cannot be used, including records of an unknown layout, is counted by reason in
    `skipped`. `language` selects OASST trees; of each, the best-ranked path is used, or every path with
    `oasst_all_paths`. OASST's message rows are all in memory before their trees are walked. `me` is the person whose
    messages become the assistant's in the export of a messenger; raises UserError for such an export without it.
    """
    skipped = Counter() if skipped is None else skipped
    oasst_rows: list[Mapping] = []
    for record in latest_events(records, skipped):
        found = _find_layout(record)
        if found is None:
            count_unknown(record, skipped)
            continue
        layout, record = found
        if layout.name == "oasst messages":
            oasst_rows.append(slim_row(record))
        elif layout.name == "oasst trees":
            yield from oasst_conversations(rows_of_tree(record["prompt"]), oasst_all_paths, skipped, language)
        elif layout.name == "preference data":
            skipped[PREFERENCE] += 1
        elif layout.name == "feedback" and record.get("rating") == "bad" and record.get("correction") is None:
            skipped[BAD_REPLY] += 1
        elif "label" in record and str(record["label"]).lower() == "false":
            skipped[LABEL_FALSE] += 1
        elif layout.turns is None:
            yield from messenger_conversations(record, me, skipped, where)
        else:
            for turns in layout.turns(record):
                if messages := usable_messages(_system_turn(record, turns) + turns, skipped):
                    yield messages
    yield from oasst_conversations(oasst_rows, oasst_all_paths, skipped, language)


def _find_layout(record: Mapping) -> tuple[Layout, Mapping] | None:
    """The layout of a record and the record as that layout reads it.

    Nulls and empty lists count as absent. If no layout matches, the fields are compared in lower case; if still none
    does, nulls and empty lists are kept, so that a record with an empty answer is counted as such.
    """
    present = {field: value for field, value in record.items() if value is not None and value != []}
    if found := _match(present):
        return found
    return _match({str(field).strip().lower(): value for field, value in present.items()}) or _match(record)


def _match(record: Mapping) -> tuple[Layout, Mapping] | None:
    for layout in LAYOUTS:
        if layout.matches(record):
            return layout, record
    return None


def _system_turn(record: Mapping, turns: list) -> list:
    """The turn of a system prompt that a record keeps in a field of its own, unless the turns begin with one."""
    system = first_present(record, _SYSTEM_FIELDS)
    first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
    if not isinstance(system, str) or not system.strip() or "system" in (first.get("role"), first.get("from")):
        return []
    return [{"role": "system", "content": system}]


# --- recognizing and reading each layout ---


def _turn_list_in(*fields: str) -> tuple[Callable[[Mapping], bool], Callable[[Mapping], list[list]]]:
    """(matches, turns) of a layout whose conversation is a list in one of `fields`."""

    def found(record: Mapping) -> str | None:
        return next((field for field in fields if field in record and is_list_of_turns(record[field])), None)

    return lambda record: found(record) is not None, lambda record: [list_of_turns(record[found(record) or ""])]


def _pair(question: str, answer: str, *additions: str) -> tuple[Callable, Callable]:
    """(matches, turns) of a record with a question, which another field may extend, and an answer."""

    others = tuple(field for field in additions if field != question)

    def turns(record: Mapping) -> list[list]:
        return [_history(record) + pair_of_turns(record[question], record[answer], first_present(record, others))]

    return lambda record: question in record and answer in record, turns


def _history(record: Mapping) -> list:
    """Alpaca's earlier turns: a list of [question, answer]."""
    history = record.get("history")
    return list_of_turns(history) if is_list_of_turns(history) else []


def _instances(record: Mapping) -> list[list]:
    """Self-Instruct: an instruction with several inputs, each with its output."""
    return [
        pair_of_turns(record["instruction"], instance.get("output"), instance.get("input"))
        for instance in record["instances"]
        if isinstance(instance, Mapping)
    ] or [[]]


def _is_preference(record: Mapping) -> bool:
    return not _PREFERENCES.isdisjoint(record)


def _is_feedback(record: Mapping) -> bool:
    """The chat page's feedback: a conversation whose last reply is rated, corrected, or preferred to another."""
    judged = isinstance(record.get("correction"), str) or record.get("rating") in ("good", "bad")
    return (judged or preferred_reply(record) is not None) and is_list_of_turns(record.get("messages"))


def _feedback_turns(record: Mapping) -> list[list]:
    """The conversation with the wanted reply. The replies before it were not judged: they are only its context."""
    *before, reply = list_of_turns(record["messages"]) or [None]
    if isinstance(record.get("correction"), str):
        reply = {"role": "assistant", "content": record["correction"]}
    return [[*({**turn, "weight": 0} if isinstance(turn, Mapping) else turn for turn in before), reply]]


def _has_instances(record: Mapping) -> bool:
    return "instruction" in record and isinstance(record.get("instances"), list)


def _has_strings(record: Mapping) -> bool:
    """UltraChat: the turns are strings in the field "data"."""
    turns = record.get("data")
    return isinstance(turns, list) and len(turns) > 1 and all(isinstance(turn, str) for turn in turns)


# A record has the first layout that matches. To add one, add a row.
LAYOUTS = (
    Layout("preference data", _is_preference),
    Layout("telegram or discord", is_messenger_export),
    Layout("chatgpt export", is_chatgpt, chatgpt_turns),
    Layout("claude export", is_claude, claude_turns),
    Layout("feedback", _is_feedback, _feedback_turns),
    Layout("messages", *_turn_list_in("messages")),
    Layout("sharegpt", *_turn_list_in("conversations")),
    Layout("conversation", *_turn_list_in("conversation", "dialog", "dialogue", "turns", "utterances", "chat")),
    Layout("list of strings", _has_strings, lambda record: [list_of_turns(record["data"])]),
    Layout("oasst trees", is_oasst_tree),
    Layout("oasst messages", is_oasst_row),
    Layout("instances", _has_instances, _instances),
    Layout("alpaca", *_pair("instruction", "output", "input", "context")),
    Layout("dolly", *_pair("instruction", "response", "context", "input")),
    *(Layout(f"{question} and {answer}", *_pair(question, answer, "input", "context")) for question, answer in PAIRS),
)
