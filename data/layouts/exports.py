"""The exports of ChatGPT (trees of messages, of which the current branch is read) and of Claude."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.layouts.turns import first_present

_HIDDEN_KINDS = ("user_editable_context", "model_editable_context", "thoughts", "reasoning_recap")


def is_chatgpt(record: Mapping) -> bool:
    """Whether a record is a conversation of ChatGPT's conversations.json."""
    return isinstance(record.get("mapping"), Mapping)


def is_claude(record: Mapping) -> bool:
    """Whether a record is a conversation of Claude's conversations.json."""
    return isinstance(record.get("chat_messages"), list)


def chatgpt_turns(record: Mapping) -> list[list]:
    """The turns from the root to the current message; without a current one, to the end of the newest branch."""
    mapping = record["mapping"]
    node_id = record.get("current_node")
    if node_id not in mapping:
        node_id = _newest_leaf(mapping)
    branch: list[Mapping] = []
    seen = set()
    while node_id in mapping and node_id not in seen and isinstance(mapping[node_id], Mapping):
        seen.add(node_id)
        branch.append(mapping[node_id])
        node_id = mapping[node_id].get("parent")
    messages = [node["message"] for node in reversed(branch) if isinstance(node.get("message"), Mapping)]
    return [[_chatgpt_turn(message) for message in messages if not _is_hidden(message)]]


def _newest_leaf(mapping: Mapping) -> str | None:
    """The end of the branch that follows the last child from the root."""
    nodes = {node_id: node for node_id, node in mapping.items() if isinstance(node, Mapping)}
    node_id = next((node_id for node_id, node in nodes.items() if node.get("parent") not in nodes), None)
    for _ in nodes:  # at most as many steps as there are nodes, even in a cycle
        children = [child for child in nodes.get(node_id or "", {}).get("children") or [] if child in nodes]
        if not children:
            break
        node_id = children[-1]
    return node_id


def _is_hidden(message: Mapping) -> bool:
    """Whether ChatGPT's page does not show a message: settings, reasoning, and empty system messages."""
    metadata, content = message.get("metadata"), message.get("content")
    if isinstance(metadata, Mapping) and metadata.get("is_visually_hidden_from_conversation"):
        return True
    if not isinstance(content, Mapping):
        return False
    author = message.get("author")
    is_system = isinstance(author, Mapping) and author.get("role") == "system"
    return content.get("content_type") in _HIDDEN_KINDS or (is_system and not any(content.get("parts") or []))


def _chatgpt_turn(message: Mapping) -> Mapping:
    """A message without ChatGPT's own weight, which says whether the page uses it, not whether to train on it."""
    return {field: value for field, value in message.items() if field != "weight"}


def claude_turns(record: Mapping) -> list[list]:
    """The turns of a conversation: the text of each message, or the text parts of its content."""
    return [[_claude_turn(message) for message in record["chat_messages"]]]


def _claude_turn(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    text = message.get("text")
    parts = message.get("content")
    if not (isinstance(text, str) and text.strip()) and isinstance(parts, list):
        kinds = [part for part in parts if isinstance(part, Mapping) and part.get("type", "text") == "text"]
        text = "\n".join(str(first_present(part, ("text", "value")) or "") for part in kinds)
    return {"role": first_present(message, ("sender", "role")), "content": text}
