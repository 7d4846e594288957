"""Turns of any layout made into messages with our roles, or counted as unusable by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

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


def usable_messages(turns: Sequence, skipped: Counter) -> list[Message] | None:
    """The conversation with our roles and text contents, or None, counted by reason, if it cannot be used.

    Turns after the assistant's last message are cut off, and system messages that are unusable are left out.
    """
    parsed = [_role_and_content(turn) for turn in turns]
    length = len(parsed)
    while parsed and parsed[-1][0] != "assistant":
        parsed.pop()
    if not any(role == "user" for role, _ in parsed):
        skipped["conversation without a question and an answer"] += 1
        return None
    if len(parsed) < length:
        skipped["message without an answer, cut off"] += length - len(parsed)
    messages: list[Message] = []
    for role, content in parsed:
        if fault := _fault(role, content):
            skipped[fault] += 1
            if role == "system":
                continue
            return None
        assert role is not None and content is not None  # otherwise _fault has found a fault
        messages.append({"role": role, "content": content})
    return messages


def _fault(role: str | None, content: str | None) -> str | None:
    """Why a message cannot be used, None if it can."""
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
    """(role, content) of a turn: one of our roles, "tool" or None; content is None if it is not text."""
    if not isinstance(turn, Mapping):
        return None, None
    name = str(turn.get("role") or turn.get("from")).strip().lower()
    role = "tool" if name in TOOL_ROLES or turn.get("tool_calls") else ROLE_NAMES.get(name)
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = _joined_parts(content)
    elif content is None:
        content = ""
    return role, content if isinstance(content, str) else None


def _joined_parts(parts: Sequence) -> str | None:
    """The text of a content given as parts, None if a part is not text."""
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "\n".join(texts)
