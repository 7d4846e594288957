"""Divide documents into train and validation, by their content and a seed, so that order and repeats do not matter."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from data.documents import Document
from data.writing import Encoded

EXACT_SPLIT_DOCUMENTS = 50  # with more expected validation documents, a random share is close enough to the fraction
EXACT_SPLIT_BYTES = 64 << 20


def with_split(batches: Iterator[Encoded], val_fraction: float) -> Iterator[tuple[Encoded, np.ndarray]]:
    """Each batch with a mask of its validation documents: those with the smallest digests.

    The digests depend on the seed, so this is a random share that does not change with order or repeats. A small corpus
    is read completely before it is divided; validation then gets exactly its share, at least one document.
    """
    threshold = int(val_fraction * 2**64)
    held, documents, held_bytes = [], 0, 0
    for batch in batches:
        held.append(batch)
        documents += len(batch.digests)
        held_bytes += int(batch.text_bytes.sum())
        if documents * val_fraction >= EXACT_SPLIT_DOCUMENTS or held_bytes >= EXACT_SPLIT_BYTES:
            break
    else:
        keys = np.unique(np.concatenate([batch.digests[:, 0] for batch in held])) if held else np.zeros(0)
        if len(keys) > 1:
            n_val = min(max(1, round(val_fraction * len(keys))), len(keys) - 1)
            threshold = int(keys[n_val])
    for batch in itertools.chain(held, batches):
        yield batch, batch.digests[:, 0] < np.uint64(threshold)


def split_by_opening(
    conversations: Iterable[list[dict]], val_fraction: float, seed: int
) -> tuple[list[list[dict]], list[list[dict]] | None]:
    """(train, val), keeping conversations with the same first message together, such as the paths of one OASST tree.

    Such conversations share most of their text, so dividing them one by one would show validation text in training. A
    single opening cannot be divided: val is None. All conversations are in memory at once.
    """
    groups: dict[str, list[list[dict]]] = {}
    for messages in conversations:
        groups.setdefault(messages[0]["content"], []).append(messages)
    n_val = min(max(1, round(val_fraction * len(groups))), len(groups) - 1)
    chosen = set(sorted(groups, key=lambda opening: _digest(opening, seed))[:n_val])
    train = [messages for opening, group in groups.items() if opening not in chosen for messages in group]
    val = [messages for opening, group in groups.items() if opening in chosen for messages in group]
    return train, val or None


def _digest(text: str, seed: int) -> bytes:
    key = seed.to_bytes(8, "little")
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=key).digest()


def split_single_text(
    documents: Iterator[Document], val_fraction: float
) -> tuple[Iterable[Document], Iterable[Document] | None]:
    """(train, val) of a corpus that may be one text: that is cut in two, and its end becomes validation.

    Several documents, and conversations, are returned unchanged with val None.
    """
    first = list(itertools.islice(documents, 2))
    if len(first) != 1 or not isinstance(first[0], str):
        return itertools.chain(first, documents), None
    text = first[0].strip()
    wanted = int(len(text) * (1 - val_fraction))
    breaks = (text.rfind(mark, 0, wanted) for mark in ("\n\n", "\n", " "))
    cut = next((position for position in breaks if position > wanted // 2), wanted)
    return [text[:cut]], [text[cut:]]
