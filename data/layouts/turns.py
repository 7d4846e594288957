"""Convert turns of any layout to messages with our roles, or count them as unusable by reason."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data.counts import UNKNOWN_ROLE, Skipped

Message = dict[str, Any]  # {"role", "content"}, and "weight": 0 for an answer that is not a target

_NAMES = {
    "system": "system developer system_prompt",
    "user": "user human prompter person customer questioner asker student me q input question instruction prompt",
    "assistant": (
        "assistant gpt chatgpt bot model ai bing bard chatbot claude gemini llama copilot palm agent answerer teacher "
        "machine robot_assistant ai_assistant assistant_response output answer response completion openai mistral "
        "vicuna alpaca koala grok deepseek qwen a"
    ),
}
ROLE_NAMES = {name: role for role, names in _NAMES.items() for name in names.split()}
_MODEL_NAME = re.compile(r"(chat-?)?gpt-?\d|(claude|gemini|llama|mistral|vicuna|palm|qwen|deepseek|bard|bing)-")
TOOL_ROLES = (
    "function",
    "tool",
    "function_call",
    "function_response",
    "tool_call",
    "tool_calls",
    "tool_response",
    "tool_result",
    "tool_output",
    "function-call",
    "observation",
    "ipython",
)
_TOOL_FIELDS = frozenset(("tool_calls", "function_call", "tool_call_id"))
_ROLE_FIELDS = ("role", "from", "sender", "author", "speaker")
_CONTENT_FIELDS = ("content", "value", "text", "message", "utterance")
_WEIGHT_FIELDS = frozenset(("weight", "loss_weight", "train", "loss"))

_NOT_TEXT = "conversation with content that is not text"


def usable_messages(turns: Sequence, skipped: Counter) -> list[Message] | None:
    """The conversation with our roles and text contents, or None, counted by reason, if it cannot be used.

    Turns after the assistant's last message are cut off, and system messages that are unusable are left out. An answer
    of weight 0 has "weight": 0: it is context for the following ones, not a target.
    """
    parsed = [_parsed(turn) for turn in turns]
    length = len(parsed)
    while parsed and parsed[-1][0] != "assistant":
        parsed.pop()
    if not any(role == "user" for role, _, _ in parsed):
        _count_unanswered(turns, skipped)
        return None
    notes: list[str] = []
    if len(parsed) < length:
        notes += ["message without an answer, cut off"] * (length - len(parsed))
    messages: list[Message] = []
    for (role, content, is_target), turn in zip(parsed, turns, strict=False):
        if fault := _fault(role, content):
            if role == "system" and fault != UNKNOWN_ROLE:
                notes.append(fault)
                continue
            _count_fault(fault, turn, skipped)
            return None
        assert role is not None and content is not None  # otherwise _fault has found a fault
        messages.append({"role": role, "content": content})
        if not is_target:
            messages[-1]["weight"] = 0
            notes.append("answer of weight 0, no target")
    if not any(role == "assistant" and is_target for role, _, is_target in parsed):
        skipped["conversation whose answers all have weight 0"] += 1
        return None
    if notes:
        skipped.update(notes)
    return messages


def _count_unanswered(turns: Sequence, skipped: Counter) -> None:
    """Count a conversation that has no question with an answer after it, under the reason that explains most."""
    for turn in turns:
        role, content, _ = _parsed(turn)
        if role is None or role == "tool":
            _count_fault(_fault(role, content) or "", turn, skipped)
            return
    skipped["conversation without a question and an answer"] += 1


def _count_fault(fault: str, turn: Any, skipped: Counter) -> None:
    skipped[fault] += 1
    if fault == UNKNOWN_ROLE and isinstance(skipped, Skipped):
        skipped.note_role(_role_name(turn) or "none" if isinstance(turn, Mapping) else "none")


def _fault(role: str | None, content: str | None) -> str | None:
    """Why a message cannot be used, None if it can."""
    if role is None:
        return UNKNOWN_ROLE
    if role == "tool":
        return "conversation with a function or tool message"
    if content is None:
        return "system message that is not text, left out" if role == "system" else _NOT_TEXT
    if not content.strip("\ufeff \t\r\n"):
        return "empty system message" if role == "system" else "conversation with an empty message"
    return None


def _parsed(turn: Any) -> tuple[str | None, str | None, bool]:
    """(role, content, is a target) of a turn. The role is ours, "tool", or None; content that is not text is None."""
    if type(turn) is not dict and not isinstance(turn, Mapping):
        return None, None, True
    role = known_role(_role_name(turn))
    if not _TOOL_FIELDS.isdisjoint(turn) and any(turn.get(field) for field in _TOOL_FIELDS):
        role = "tool"
    content = first_present(turn, _CONTENT_FIELDS)
    if not isinstance(content, str):
        content = _text_of(content)
    return role, content, role != "assistant" or not _has_weight_0(turn)


def _text_of(content: Any) -> str | None:
    """The text of a content that is not a string: "" for null, None if it is not text."""
    if isinstance(content, Mapping):  # ChatGPT's export: {"content_type": "text", "parts": [...]}
        content = content.get("parts", content.get("text"))
    if isinstance(content, list):
        return joined_parts(content)
    return "" if content is None else content if isinstance(content, str) else None


def _has_weight_0(turn: Mapping) -> bool:
    """Whether one of the fields that weigh an answer is 0 or false."""
    if _WEIGHT_FIELDS.isdisjoint(turn):
        return False
    weights = [turn.get(field) for field in _WEIGHT_FIELDS]
    return any(isinstance(weight, int | float) and weight == 0 for weight in weights)


def first_present(record: Mapping, fields: Sequence[str]) -> Any:
    """The value of the first of the fields that is not null, or None."""
    for field in fields:
        if (value := record.get(field)) is not None:
            return value
    return None


def _role_name(turn: Mapping) -> str:
    role = first_present(turn, _ROLE_FIELDS)
    if isinstance(role, str):
        return role.strip()
    if isinstance(role, Mapping):  # ChatGPT's export: "author": {"role": "user"}
        role = role.get("role")
    return "" if role is None else str(role).strip()


@functools.lru_cache(1024)
def known_role(name: str) -> str | None:
    """Our role for a role's name in a published data set, "tool" for a tool's, None if it is unknown.

    >>> known_role("Human"), known_role("gpt-4"), known_role("ipython"), known_role("narrator")
    ('user', 'assistant', 'tool', None)
    """
    name = name.lower()
    if name in TOOL_ROLES:
        return "tool"
    role = ROLE_NAMES.get(name.replace(" ", "_"))
    return role or ("assistant" if _MODEL_NAME.match(name) else None)


def joined_parts(parts: Sequence) -> str | None:
    """The text of a content given as parts, None if a part is not text."""
    texts: list[str] = []
    for part in parts:
        text = first_present(part, ("text", "value", "content")) if isinstance(part, Mapping) else part
        if text is None and (part is None or part.get("type") == "text"):
            continue
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "\n".join(texts)
