"""Which messages of a chat the model sees when they do not all fit into its window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.cli import UserError
from setup_tokenizer import GPT2, Tokenizer


class MessageTooLong(UserError):
    """The newest message, together with the system message, does not fit into the window."""


def room_for_reply(block_size: int, max_tokens: int | None) -> int:
    """The tokens that a prompt must leave free: `max_tokens`, or a quarter of the window if that is less."""
    quarter = max(1, block_size // 4)
    return quarter if max_tokens is None else min(quarter, max_tokens)


def fit_window(messages: Sequence[Mapping], capacity: int, tokenizer: Tokenizer = GPT2) -> tuple[list[int], int]:
    """The ids of as many messages as fit into `capacity`, followed by the assistant's header; and how many are dropped.

    The oldest whole exchanges are dropped; a system message at the beginning stays. Raises MessageTooLong if the
    newest exchange alone does not fit.
    """
    n_system = int(messages[0]["role"] == "system")
    system = tokenizer.encode_chat(messages[:1]) if n_system else []
    starts = [index for index in range(n_system, len(messages)) if messages[index]["role"] == "user"]
    starts = sorted({min(n_system, len(messages) - 1), *starts[1:]})
    kept: list[int] = []
    first = len(messages)
    for start in reversed(starts):  # newest first, so that the dropped part of a long history is not encoded
        is_newest = start == starts[-1]
        ids = tokenizer.encode_chat(messages[start:first], add_generation_prompt=is_newest)
        if len(system) + len(ids) + len(kept) > capacity:
            if is_newest:
                raise _too_long(messages, capacity - len(system) - len(ids), tokenizer)
            break
        kept, first = ids + kept, start
    return (system if first >= n_system else []) + kept, max(0, first - n_system)


def _too_long(messages: Sequence[Mapping], room: int, tokenizer: Tokenizer) -> MessageTooLong:
    """The error for a message that does not fit: `room` is the number of free tokens it leaves, which is negative."""
    n_tokens = len(tokenizer.encode_text(messages[-1]["content"]))
    advice = "shorten it" + (" or the system message" if messages[0]["role"] == "system" else "")
    return MessageTooLong(
        f"the message has {n_tokens} tokens and the window has room for {max(0, room + n_tokens)}; {advice}"
    )
