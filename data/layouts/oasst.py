"""OASST: trees of messages, made into conversations along their best-ranked path or along every path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data.layouts.turns import Message, usable_messages

_OASST_FIELDS = ("message_id", "parent_id", "role", "text", "rank", "deleted", "lang")


def is_oasst_tree(record: Mapping) -> bool:
    """Whether a record is a nested tree."""
    return isinstance(record.get("prompt"), Mapping) and "replies" in record["prompt"]


def is_oasst_row(record: Mapping) -> bool:
    """Whether a record is a message of a tree."""
    return record.keys() >= {"message_id", "role", "text"} and ("parent_id" in record or "message_tree_id" in record)


def slim_row(row: Mapping) -> dict:
    """The fields of a row that its tree needs, with ids as strings, and rank None if it is not a number."""
    slim = {field: row.get(field) for field in _OASST_FIELDS}
    slim["message_id"] = str(slim["message_id"])
    slim["parent_id"] = None if slim["parent_id"] in (None, "") else str(slim["parent_id"])
    if not isinstance(slim["rank"], int | float) or slim["rank"] != slim["rank"]:
        slim["rank"] = None
    return slim


def rows_of_tree(prompt: Mapping) -> list[dict]:
    """A nested tree as message rows, as in OASST's message files."""
    rows: list[dict] = []
    waiting: list[tuple[Mapping, str | None]] = [(prompt, None)]
    while waiting:
        node, parent_id = waiting.pop()
        message_id = node.get("message_id") or f"{len(rows):08d}"  # sorts like its position in the tree
        rows.append(slim_row({**node, "message_id": message_id, "parent_id": parent_id}))
        replies = node.get("replies")
        if isinstance(replies, list):
            waiting += [(reply, message_id) for reply in reversed(replies) if isinstance(reply, Mapping)]
    return rows


def oasst_conversations(
    rows: Iterable[Mapping], all_paths: bool, skipped: Counter, language: str | None
) -> Iterator[list[Message]]:
    """The best-ranked path, or every path, of each tree that the rows form, in the order of the trees' prompts."""
    for tree, answered in _trees(rows, skipped, language):
        for path in _paths(tree[0], answered, all_paths):
            if messages := usable_messages(_turns(path), skipped):
                yield messages


def oasst_answers(
    rows: Iterable[Mapping], skipped: Counter, language: str | None
) -> Iterator[tuple[list[dict], list[dict]]]:
    """The turns up to the best-ranked reply to a prompt, and those up to a lower-ranked one, for each such pair.

    Replies of equal rank, and those without a rank, are not compared.
    """
    for tree, answered in _trees(rows, skipped, language):
        paths: dict[str | None, list[Mapping]] = {None: []}
        for row in tree:
            path = paths[row["message_id"]] = [*paths[row["parent_id"]], row]
            if row["message_id"] not in answered or row["role"] == "assistant":
                continue
            ranked = [reply for reply in answered[row["message_id"]] if reply["rank"] is not None]
            worse = [reply for reply in ranked if reply["rank"] > ranked[0]["rank"]]
            if not worse:
                skipped["OASST prompt without replies of different rank"] += 1
            for reply in worse:
                yield _turns([*path, ranked[0]]), _turns([*path, reply])


def _turns(path: Iterable[Mapping]) -> list[dict]:
    return [{"role": row["role"], "content": row["text"]} for row in path]


def _trees(rows: Iterable[Mapping], skipped: Counter, language: str | None) -> Iterator[tuple[list[Mapping], dict]]:
    """The rows of each tree, parents first, and `_answered` of it, in the order of the trees' prompts."""
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
        yield tree, answered
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
    """Sorts best first: rank 0, 1, ..., then unranked; ties by id, so that the file's order does not matter."""
    rank = row["rank"]
    return (rank is None, 0 if rank is None else rank, row["message_id"])


def _paths(root: Mapping, answered: Mapping, all_paths: bool) -> Iterator[list[Mapping]]:
    """Paths from the root to an assistant's message without a usable reply, best first."""
    waiting = [[root]]
    while waiting:
        path = waiting.pop()
        replies = answered[path[-1]["message_id"]]
        if not replies:
            yield path
        waiting += [[*path, reply] for reply in reversed(replies if all_paths else replies[:1])]
