"""Feedback on replies, as serve.py and its page record it: of the events about one reply only the last one counts.

>>> said = {"id": "1", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"}]}
>>> events = [{**said, "rating": "good"}, {**said, "rating": "bad"}]
>>> [event["rating"] for event in latest_events(events, Counter())]
['bad']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

REPLACED = "feedback that a later event replaces"
WITHDRAWN = "feedback that was withdrawn"
_JUDGEMENTS = ("rating", "correction", "preferred_over")


def latest_events(records: Iterable[Mapping], skipped: Counter) -> Iterator[Mapping]:
    """All records, except that of the feedback events with one `id` only the last is returned, after the other records.

    Earlier events, and those that a person has withdrawn (rating "none"), are counted in `skipped`. The events are in
    memory until the last record.
    """
    events: dict[str, Mapping] = {}
    for record in records:
        if not is_event(record):
            yield record
            continue
        if record["id"] in events:
            skipped[REPLACED] += 1
        events[record["id"]] = record
    for event in events.values():
        if event.get("rating") == "none" and event.get("correction") is None and event.get("preferred_over") is None:
            skipped[WITHDRAWN] += 1
        else:
            yield event


def is_event(record: Mapping) -> bool:
    """Whether a record is feedback on a reply that has an id."""
    return (
        isinstance(record.get("id"), str)
        and isinstance(record.get("messages"), list)
        and any(record.get(name) is not None for name in _JUDGEMENTS)
    )


def preferred_reply(record: Mapping) -> str | None:
    """The reply that the last one of `messages` was preferred over; None if the record is not such an event."""
    other = record.get("preferred_over")
    return other["content"] if isinstance(other, Mapping) and isinstance(other.get("content"), str) else None
