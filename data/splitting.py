"""Divide documents into train and validation, by their content and a seed, so that order and repeats do not matter.

The first division is by documents: those with the smallest digests become validation. That works well for many
documents of similar length. Where it gives validation less than half or more than twice its share of the tokens,
because there are few documents or some are huge, `data/redividing.py` divides again by tokens, with the functions at
the end of this module, and cuts one document if no whole documents fit.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data.writing import Encoded

EXACT_SPLIT_DOCUMENTS = 50  # with more expected validation documents, a random share is close enough to the fraction
EXACT_SPLIT_BYTES = 64 << 20
MIN_EXCHANGES = 10  # a conversation with fewer questions is never cut


def with_split(batches: Iterator[Encoded], val_fraction: float) -> Iterator[tuple[Encoded, np.ndarray]]:
    """Each batch with a mask of its validation documents: those with the smallest digests.

    The digests depend on the seed, so this is a random share that does not change with order or repeats. A small corpus
    is read completely before it is divided; validation then gets exactly its share, at least one document.
    """
    threshold = int(val_fraction * 2**64)
    buffered, documents, buffered_bytes = [], 0, 0
    for batch in batches:
        buffered.append(batch)
        documents += len(batch.digests)
        buffered_bytes += int(batch.text_bytes.sum())
        if documents * val_fraction >= EXACT_SPLIT_DOCUMENTS or buffered_bytes >= EXACT_SPLIT_BYTES:
            break
    else:
        keys = np.unique(np.concatenate([batch.digests[:, 0] for batch in buffered])) if buffered else np.zeros(0)
        if len(keys) > 1:
            n_val = min(max(1, round(val_fraction * len(keys))), len(keys) - 1)
            threshold = int(keys[n_val])
    for batch in itertools.chain(buffered, batches):
        yield batch, batch.digests[:, 0] < np.uint64(threshold)


# --- conversations with the same opening ---


def split_by_opening(
    conversations: Iterable[list[dict]], val_fraction: float, seed: int
) -> tuple[list[list[dict]], list[list[dict]] | None]:
    """(train, val), keeping conversations with the same first question together, such as the paths of one OASST tree.

    Such conversations share most of their text, so dividing them one by one would show validation text in training. A
    single opening cannot be divided: val is None. All conversations are in memory at once.
    """
    groups: dict[str, list[list[dict]]] = {}
    for messages in conversations:
        opening = next((message for message in messages if message["role"] == "user"), messages[0])
        groups.setdefault(opening["content"], []).append(messages)
    openings = sorted(groups, key=lambda opening: _digest(opening, seed))
    sizes = [sum(len(m["content"]) for messages in groups[opening] for m in messages) for opening in openings]
    n_val = min(max(1, round(val_fraction * len(groups))), len(groups) - 1)
    chosen = set(openings[:n_val])
    if not is_fair(sum(sizes[:n_val]), sum(sizes), val_fraction):
        by_size = {openings[index] for index in choose_by_size(sizes, val_fraction)}
        chosen = by_size or chosen
    train = [messages for opening, group in groups.items() if opening not in chosen for messages in group]
    val = [messages for opening, group in groups.items() if opening in chosen for messages in group]
    return train, val or None


def _digest(text: str, seed: int) -> bytes:
    key = seed.to_bytes(8, "little")
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=key).digest()


# --- shares of the tokens ---


def fair_range(total: int, val_fraction: float) -> tuple[float, float]:
    """The smallest and the largest number of validation tokens: half and twice the share of `total`, and never all."""
    return total * val_fraction / 2, total * min(2 * val_fraction, (1 + val_fraction) / 2)


def is_fair(n_val: int, total: int, val_fraction: float) -> bool:
    """Whether validation has between half and twice its share of the tokens, and train is not empty."""
    lowest, highest = total * val_fraction / 2, total * 2 * val_fraction
    return 0 < n_val < total and lowest <= n_val <= highest


def choose_by_size(sizes: Sequence[int], val_fraction: float) -> list[int]:
    """The indices of the first documents whose sizes fit into validation's share; empty if none do.

    A document that would take validation beyond its range is skipped.
    """
    total = sum(sizes)
    highest = fair_range(total, val_fraction)[1]
    chosen, n_val = [], 0
    for index, size in enumerate(sizes):
        if n_val >= total * val_fraction:
            break
        if n_val + size <= highest:
            chosen.append(index)
            n_val += size
    return chosen


# --- cutting a document ---

# Where a text may be cut, best first: before a paragraph, a line, a sentence, a word. There is no cut inside a word.
_BOUNDARIES = (
    re.compile(r"\n[ \t]*\n\s*"),
    re.compile(r"\n\s*"),
    re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])"),
    re.compile(r"\s+"),
)


def cut_text(text: str, tail: int, fewest: int, most: int) -> tuple[str, str] | None:
    """Cut a text in two; its end gets about `tail` characters, from `fewest` to `most`. None if there is no boundary.

    The cut is at the last paragraph that leaves at least `tail` characters, or else the first one after that; without
    any in the range, at a line, then at a sentence, then at a word.

    >>> cut_text("One two.\\n\\nThree four.\\n\\nFive six.", 10, 5, 20)
    ('One two.\\n\\nThree four.', 'Five six.')
    """
    wanted, first, last = len(text) - tail, len(text) - most, len(text) - fewest
    start = max(first - 2, 0)
    for boundary in _BOUNDARIES:
        found = boundary.finditer(text, start, min(last + 2, len(text)))
        cuts = [match for match in found if first <= match.end() <= last and match.start() > 0]
        if cuts:
            before = [match for match in cuts if match.end() <= wanted]
            cut = before[-1] if before else cuts[0]
            head, end = text[: cut.start()].rstrip(), text[cut.end() :].lstrip()
            if head and end:
                return head, end
    return None


def cut_conversation(messages: Sequence[dict], sizes: Sequence[int], tail: int) -> tuple[list[dict], list[dict]] | None:
    """Cut a long conversation in two at a question; its end gets about `tail` tokens. None if it is short.

    `sizes` are the tokens of each message. Both parts contain an answer.
    """
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(questions) < MIN_EXCHANGES:
        return None
    ends = np.cumsum(np.array(sizes)[::-1])[::-1]  # tokens from each message to the end
    answers = [
        index for index, message in enumerate(messages) if message["role"] == "assistant" and "weight" not in message
    ]
    cuts = [index for index in questions if answers and answers[0] < index <= answers[-1]]
    if not cuts:
        return None
    cut = min(cuts, key=lambda index: abs(int(ends[index]) - tail))
    return list(messages[:cut]), list(messages[cut:])
