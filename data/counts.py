"""What a preparation counts: dropped records by reason, and notes about those that were kept.

Every record that is read is either kept or counted under exactly one reason, so that

    read = kept + the sum of the reasons

holds in every report. Notes, such as "changed by normalise", say what happened to records that were kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from common.cli import UserError

UNKNOWN_ROLE = "conversation with an unknown role"
NO_LAYOUT = "record that is not a conversation"
NO_TEXT = "record without text"
NOT_TEXT = "record whose field is not text"
DIVIDED = "divided between train and validation"

_NOTES = (
    *("read", DIVIDED, "unpaired surrogates", "empty system message", "system message that is not text, left out"),
    *("answer of weight 0, no target", "OASST message that is a repeat", "OASST message whose parent is missing"),
    *("OASST message deleted or empty, with all that follows it", "OASST prompt without a usable reply"),
    "OASST prompt without replies of different rank",
)
_NOTE_PREFIXES = ("changed by ", "message ", "train documents that share ", "13-grams of ")
_SHOWN_NAMES = 8


class Skipped(Counter):
    """Counts by reason, and the unknown roles and fields for the error message about a file without a usable record."""

    def __init__(self, *arguments: Any, **counts: int) -> None:
        super().__init__(*arguments, **counts)
        self.unknown_roles: dict[str, None] = {}  # in the order in which they were found
        self.fields: tuple[str, ...] = ()  # of the first record that is not a conversation

    def note_role(self, role: str) -> None:
        """Remember the name of a role that is unknown."""
        if len(self.unknown_roles) < _SHOWN_NAMES:
            self.unknown_roles[role[:40]] = None


def count_unknown(record: Mapping, skipped: Counter) -> None:
    """Count a record of an unknown layout, and remember the fields of the first one."""
    skipped[NO_LAYOUT] += 1
    if isinstance(skipped, Skipped) and not skipped.fields:
        skipped.fields = tuple(map(str, record)) or ("none",)


def is_reason(name: str) -> bool:
    """Whether an entry of a report counts dropped records, rather than something about kept ones."""
    return name not in _NOTES and not name.startswith(_NOTE_PREFIXES)


def n_dropped(counts: Mapping[str, int]) -> int:
    """The number of records that were dropped, for whatever reason."""
    return sum(count for name, count in counts.items() if is_reason(name))


def reasons_in_words(counts: Mapping[str, int]) -> str:
    """The reasons with their counts, most frequent first, as a phrase; unknown roles are named.

    >>> reasons_in_words(Counter({"empty": 3, "duplicates": 1}))
    'empty: 3; duplicates: 1'
    """
    reasons = sorted(((count, name) for name, count in counts.items() if count and is_reason(name)), reverse=True)
    roles = ", ".join(counts.unknown_roles) if isinstance(counts, Skipped) else ""
    fields = ", ".join(counts.fields) if isinstance(counts, Skipped) else ""
    named = {UNKNOWN_ROLE: f" ({roles})" if roles else "", NO_LAYOUT: f" (its fields: {fields})" if fields else ""}
    return "; ".join(f"{name}{named.get(name, '')}: {count:,}" for count, name in reasons)


def nothing_usable(
    what: str, where: str, counts: Mapping[str, int], advice: str = "pass another file with --input"
) -> UserError:
    """The UserError for an input without a usable document or conversation, with the counts by reason."""
    return UserError(f"no usable {what} in {where} ({reasons_in_words(counts) or 'no record'}); {advice}")
