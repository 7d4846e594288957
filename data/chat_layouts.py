"""Chat records in the layouts that people publish, made into conversations of system, user and assistant messages.

>>> records = [{"instruction": "Add 1 and 2", "context": "", "response": "3"}]
>>> list(conversations(records))
[[{'role': 'user', 'content': 'Add 1 and 2'}, {'role': 'assistant', 'content': '3'}]]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from common.cli import UserError

Message = dict[str, str]

ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
TOOL_ROLES = (
    "function",
    "tool",
    "function_call",
    "function_response",
    "tool_call",
    "tool_response",
    "observation",
    "ipython",
)


def layout_of(record: Mapping) -> str | None:
    """The name of a chat record's layout by its fields, None where it is no chat record.

    >>> layout_of({"instruction": "Add 1 and 2", "context": "", "response": "3"})
    'dolly'
    """
    if isinstance(record.get("messages"), list):
        return "messages"
    if isinstance(record.get("conversations"), list):
        return "sharegpt"
    if isinstance(record.get("prompt"), Mapping) and "replies" in record["prompt"]:
        return "oasst trees"
    if {"message_id", "parent_id", "role", "text"} <= record.keys():
        return "oasst messages"
    if {"instruction", "output"} <= record.keys():
        return "alpaca"
    if {"instruction", "response"} <= record.keys():
        return "dolly"
    return None


def conversations(
    records: Iterable[Mapping],
    oasst_all_paths: bool = False,
    skipped: Counter | None = None,
    language: str | None = None,
    where: str | Path = "the input",
) -> Iterator[list[Message]]:
    """Conversations of chat records in any of the usual layouts, recognised record by record by its fields.

    `messages` (role and content, which may be a list of text parts), ShareGPT, Alpaca, Dolly, OASST message rows and
    OASST trees: of each tree the best-ranked path, or every path. Roles become system, user and assistant; a
    conversation ends with what the assistant says. What cannot be used is counted by reason in `skipped`.
    `language` keeps only the OASST trees in it. Raises UserError for a record of no known layout.
    """
    skipped = Counter() if skipped is None else skipped
    oasst_rows: list[Mapping] = []
    for number, record in enumerate(records, 1):
        layout = layout_of(record)
        if layout is None:
            fields = ", ".join(map(str, record)) or "none"
            raise UserError(
                f"{where}: record {number} is no conversation (its fields: {fields}); give messages, conversations, "
                "instruction and output, instruction and response, or OASST fields"
            )
        if layout == "oasst messages":
            oasst_rows.append(_slim(record))
        elif layout == "oasst trees":
            yield from _oasst_conversations(_rows_of_tree(record["prompt"]), oasst_all_paths, skipped, language)
        elif messages := _usable(_turns(record, layout), skipped):
            yield messages
    yield from _oasst_conversations(oasst_rows, oasst_all_paths, skipped, language)


def _turns(record: Mapping, layout: str) -> list:
    """A record's messages as they stand, each a mapping of role and content."""
    system = record.get("system")
    opening = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    if layout in ("messages", "sharegpt"):
        return opening + record["messages" if layout == "messages" else "conversations"]
    question, answer = record["instruction"], record["output" if layout == "alpaca" else "response"]
    addition = record.get("input" if layout == "alpaca" else "context")
    if isinstance(question, str) and isinstance(addition, str) and addition.strip():
        question = f"{question}\n\n{addition}"
    return [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _usable(turns: Sequence, skipped: Counter) -> list[Message] | None:
    """The conversation with standard roles and text contents, None (counted by reason) where there is none."""
    turns = [_role_and_content(turn) for turn in turns]
    length = len(turns)
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not any(role == "user" for role, _ in turns):
        skipped["conversation without a question and an answer"] += 1
        return None
    if len(turns) < length:
        skipped["message without an answer, cut off"] += length - len(turns)
    messages = []
    for role, content in turns:
        if fault := _fault(role, content):
            skipped[fault] += 1
            if role == "system":
                continue
            return None
        messages.append({"role": role, "content": content})
    return messages


def _fault(role: str | None, content: str | None) -> str | None:
    """Why a message cannot be used, None where it can."""
    if role is None:
        return "conversation with an unknown role"
    if role == "tool":
        return "conversation with a function or tool message"
    if content is None:
        return "conversation with content that is not text"
    if not content.strip("\ufeff \t\r\n"):
        return "empty system message" if role == "system" else "conversation with an empty message"
    return None


def _role_and_content(turn) -> tuple[str | None, str | None]:
    """(role, content) of a message: one of our roles, "tool" or None; content None where it is not text."""
    if not isinstance(turn, Mapping):
        return None, None
    role = str(turn.get("role") or turn.get("from")).strip().lower()
    role = "tool" if role in TOOL_ROLES or turn.get("tool_calls") else ROLE_NAMES.get(role)
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = _join_parts(content)
    elif content is None:
        content = ""
    return role, content if isinstance(content, str) else None


def _join_parts(parts: Sequence) -> str | None:
    """The text of a content given as parts, None where a part is not text."""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else None


# ---- OASST: trees of messages --------------------------------------------------------------------------------------

_OASST_FIELDS = ("message_id", "parent_id", "role", "text", "rank", "deleted", "lang")


def _slim(row: Mapping) -> dict:
    """The fields of a row that its tree needs, ids as strings and a rank that is no number as None."""
    slim = {field: row.get(field) for field in _OASST_FIELDS}
    slim["message_id"] = str(slim["message_id"])
    slim["parent_id"] = None if slim["parent_id"] in (None, "") else str(slim["parent_id"])
    if not isinstance(slim["rank"], int | float) or slim["rank"] != slim["rank"]:
        slim["rank"] = None
    return slim


def _rows_of_tree(prompt: Mapping) -> list[dict]:
    """Message rows of a nested tree, as OASST's message files have them."""
    rows, waiting = [], [(prompt, None)]
    while waiting:
        node, parent_id = waiting.pop()
        message_id = node.get("message_id") or f"{len(rows):08d}"  # sorts like its place in the tree
        rows.append(_slim({**node, "message_id": message_id, "parent_id": parent_id}))
        replies = node.get("replies")
        if isinstance(replies, list):
            waiting += [(reply, message_id) for reply in reversed(replies) if isinstance(reply, Mapping)]
    return rows


def _oasst_conversations(
    rows: Iterable[Mapping], all_paths: bool, skipped: Counter, language: str | None
) -> Iterator[list[Message]]:
    """The best-ranked path, or every path, of each tree that the rows make, trees in the order of their prompts."""
    by_id: dict = {}
    for row in rows:
        if by_id.setdefault(row["message_id"], row) is not row:
            skipped["OASST message that is a repeat"] += 1
    children: dict = {}
    for row in by_id.values():
        children.setdefault(row["parent_id"], []).append(row)
    reached = 0
    for root in children.get(None, []):
        tree = _parents_first(root, children)
        reached += len(tree)
        if language and root["lang"] not in (None, language):
            skipped["OASST tree in another language"] += 1
            continue
        answered = _answered(tree, children, skipped)
        if root["message_id"] not in answered:
            skipped["OASST tree without an answer"] += 1
            continue
        for path in _paths(root, answered, all_paths):
            if messages := _usable([{"role": row["role"], "content": row["text"]} for row in path], skipped):
                yield messages
    if reached < len(by_id):
        skipped["OASST message whose parent is missing"] += len(by_id) - reached


def _parents_first(root: Mapping, children: Mapping) -> list[Mapping]:
    tree = [root]
    for row in tree:
        tree += children.get(row["message_id"], [])
    return tree


def _answered(tree: Sequence[Mapping], children: Mapping, skipped: Counter) -> dict:
    """Message id -> usable replies, best first, for each message on a path that ends with the assistant."""
    answered: dict = {}
    for row in reversed(tree):
        if row["deleted"] or not str(row["text"] or "").strip():
            skipped["OASST message deleted or empty, with all that follows it"] += 1
            continue
        replies = [reply for reply in children.get(row["message_id"], []) if reply["message_id"] in answered]
        if replies or row["role"] == "assistant":
            answered[row["message_id"]] = sorted(replies, key=_rank)
        else:
            skipped["OASST prompt without a usable reply"] += 1
    return answered


def _rank(row: Mapping) -> tuple:
    """Sorts best first: rank 0, 1, ..., then the unranked; ties by id, so that the file's order does not matter."""
    rank = row["rank"]
    return (rank is None, 0 if rank is None else rank, row["message_id"])


def _paths(root: Mapping, answered: Mapping, all_paths: bool) -> Iterator[list[Mapping]]:
    """Paths from the root to an assistant's message that nobody answered further, best first."""
    waiting = [[root]]
    while waiting:
        path = waiting.pop()
        replies = answered[path[-1]["message_id"]]
        if not replies:
            yield path
        waiting += [[*path, reply] for reply in reversed(replies if all_paths else replies[:1])]
