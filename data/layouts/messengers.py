"""Exports of Telegram, Discord and WhatsApp: the messages of one person become the assistant's.

A conversation ends with a silence of more than six hours. Consecutive messages from one person become one message of
several lines. With more than two people, the others' messages begin with their names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import UserError
from data.layouts.turns import Message, usable_messages

SILENCE_S = 6 * 3600  # a longer silence ends a conversation
_SHOWN_NAMES = 8


class Said(NamedTuple):
    """One message of an export. `time_s` is None if it is unknown."""

    name: str
    time_s: float | None
    text: str


def is_messenger_export(record: Mapping) -> bool:
    """Whether a record is an export of Telegram (one chat or all of them) or of DiscordChatExporter."""
    if isinstance(chats := record.get("chats"), Mapping):
        return isinstance(chats.get("list"), list)
    messages = record.get("messages")
    if not isinstance(messages, list):
        return False
    first = next((message for message in messages if isinstance(message, Mapping)), {})
    is_telegram = "date" in first and "type" in first and ("from_id" in first or "actor_id" in first)
    return is_telegram or ("timestamp" in first and isinstance(first.get("author"), Mapping))


def messenger_conversations(
    record: Mapping, me: str | None, skipped: Counter, where: str | Path
) -> Iterator[list[Message]]:
    """The conversations of a Telegram or Discord export. Raises UserError if `me` is missing or not in it."""
    chats = record["chats"]["list"] if "chats" in record else [record]
    said = [list(_messages_of(chat, skipped)) for chat in chats if isinstance(chat, Mapping)]
    check_me(me, (message for chat in said for message in chat), where)
    for chat in said:
        yield from conversations_with(chat, me or "", skipped)


def check_me(me: str | None, said: Iterable[Said], where: str | Path) -> None:
    """Raise UserError, with the names in the export, unless `me` is one of them."""
    names = [name for name, _ in Counter(message.name for message in said).most_common(_SHOWN_NAMES)]
    if me is None or (me not in names and names):
        missing = f"nobody in it is called {me!r}" if me is not None else "it is not known who the assistant is"
        example = names[-1] if names else "NAME"
        raise UserError(
            f'{where} is the export of a messenger, and {missing}; give --me "{example}" '
            f"(names in it: {', '.join(names) or 'none'})"
        )


def _messages_of(chat: Mapping, skipped: Counter) -> Iterator[Said]:
    """The text messages of a chat of Telegram or Discord; others are counted."""
    for message in chat.get("messages") or []:
        if not isinstance(message, Mapping):
            continue
        author = message.get("author")
        if isinstance(author, Mapping):
            name = author.get("nickname") or author.get("name")
            text, time = message.get("content"), message.get("timestamp")
        else:
            name, text, time = message.get("from"), _telegram_text(message.get("text")), message.get("date")
        if isinstance(name, str) and isinstance(text, str) and text.strip():
            yield Said(name, _seconds(time), text)
        else:
            skipped["message without text or name, left out"] += 1


def _telegram_text(text: Any) -> str:
    """A message's text, which Telegram stores as a string or as a list of strings and formatted parts."""
    parts = text if isinstance(text, list) else [text]
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return "".join(part for part in texts if isinstance(part, str))


def _seconds(time: object) -> float | None:
    try:
        return datetime.fromisoformat(str(time)).replace(tzinfo=None).timestamp()
    except ValueError:
        return None


def conversations_with(said: Sequence[Said], me: str, skipped: Counter) -> Iterator[list[Message]]:
    """The conversations in one chat, in which `me` is the assistant."""
    names = {message.name for message in said}
    turns: list[dict] = []
    previous: Said | None = None
    for message in said:
        if previous and _silence_s(previous, message) > SILENCE_S:
            yield from _usable(turns, skipped)
            turns = []
        role = "assistant" if message.name == me else "user"
        text = message.text if role == "assistant" or len(names) <= 2 else f"{message.name}: {message.text}"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n{text}"
        else:
            turns.append({"role": role, "content": text})
        previous = message
    yield from _usable(turns, skipped)


def _silence_s(earlier: Said, later: Said) -> float:
    return 0.0 if earlier.time_s is None or later.time_s is None else later.time_s - earlier.time_s


def _usable(turns: list[dict], skipped: Counter) -> Iterator[list[Message]]:
    while turns and turns[0]["role"] == "assistant":  # nobody has written to the assistant yet
        turns = turns[1:]
    if messages := usable_messages(turns, skipped) if turns else None:
        yield messages
    elif not turns:
        skipped["conversation without a question and an answer"] += 1


# --- WhatsApp ---

_WHATSAPP_LINE = re.compile(
    r"[\u200e\u200f]?\[?(\d{1,4}[./-]\d{1,2}[./-]\d{1,4}),? "
    r"(\d{1,2}[:.]\d\d(?:[:.]\d\d)?(?:[\s\u202f]?[AaPp]\.?[Mm]\.?)?)"
    r"(?:\] | - )(?:([^:\n]{1,60}): )?(.*)"
)


def is_whatsapp(head: str) -> bool:
    """Whether a text begins like WhatsApp's export: most of its first lines have a date, a time and a name."""
    lines = [line for line in head.splitlines()[:20] if line.strip()]
    return len(lines) > 1 and sum(bool(_WHATSAPP_LINE.match(line)) for line in lines) > len(lines) / 2


def whatsapp_messages(lines: Sequence[str]) -> Iterator[Said]:
    """The messages of WhatsApp's export; a line without a date continues the message before it."""
    is_month_first = _is_month_first(lines)
    current: Said | None = None
    for line in lines:
        match = _WHATSAPP_LINE.match(line)
        if match is None:
            if current is not None:
                current = current._replace(text=f"{current.text}\n{line.rstrip()}")
            continue
        if current is not None and current.text.strip():
            yield current
        date, time, name, text = match.groups()
        # A line without a name comes from WhatsApp itself: somebody joined, messages are encrypted.
        current = Said(name, _whatsapp_seconds(date, time, is_month_first), text.strip("\u200e ")) if name else None
    if current is not None and current.text.strip():
        yield current


def _is_month_first(lines: Iterable[str]) -> bool:
    """Whether an export writes the month before the day, as in the USA: more dates show this than the opposite order.

    A number above 12 is not a month. If no date has one, the day comes first.
    """
    dates = [_numbers(match[1]) for line in lines if (match := _WHATSAPP_LINE.match(line))]
    n_month_first = sum(first <= 12 < second for first, second, _ in dates)
    return n_month_first > sum(12 < first <= 31 for first, _, _ in dates)


def _numbers(date: str) -> list[int]:
    return [int(number) for number in re.split(r"[./-]", date)]


def _whatsapp_seconds(date: str, time: str, is_month_first: bool) -> float | None:
    """Seconds, of which only the differences matter; a date may also begin with the year, which must then exceed 31."""
    first, second, third = _numbers(date)
    if first > 31:
        year, month, day = first, second, third
    elif is_month_first:
        month, day, year = first, second, third
    else:
        day, month, year = first, second, third
    hour, minute = map(int, re.split(r"[:.]", re.sub(r"[^\d:.]", "", time).strip("."))[:2])
    if "a" in time.lower() and hour == 12:  # 12:05 AM is just after midnight
        hour = 0
    elif "p" in time.lower() and hour < 12:
        hour += 12
    try:
        return datetime(year + (2000 if year < 100 else 0), month, day, hour, minute).timestamp()
    except ValueError:
        return None
