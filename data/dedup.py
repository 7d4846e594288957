"""Repeats: documents seen before, documents nearly seen before, and the text that validation shares with train.

A document is compared by the n-grams of its token ids. Near duplicates are found as in FineWeb (Penedo et al. 2024,
section 3.4): MinHash signatures of 5-grams, cut into bands; documents with an equal band are taken for near
duplicates. With 16 bands of 8 values that happens to 24, 61, 95 and 100 in 100 pairs that share 60, 70, 80 and 90 %
of their 5-grams.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from common.cli import UserError
from common.ngrams import hash_ngrams, mixed
from setup_tokenizer import ASSISTANT_IDS

NEAR_NGRAM = 5
BANDS = 16
ROWS = 8  # values a band
MINHASH_SEED = 1
SHARED_NGRAM = 13
MOST_SHARED_NGRAMS = 16 << 20  # of validation, kept in memory: 128 MB, and 64 MB for the filter before them
FILTER_BITS = 26

Batches = Iterable[tuple[np.ndarray, np.ndarray]]


# --- sets of digests ---


class DigestSet:
    """A set of digests of `words` uint64 each, filled a batch at a time: an open-addressing table.

    A digest's first word is not 0. A Python set of 16-byte digests takes about 120 bytes for each; this one 21 to 43.
    """

    def __init__(self, words: int = 2):
        self._table = np.zeros((1 << 12, words), dtype=np.uint64)  # first word 0: an empty slot
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests, (n, words) uint64, and return for each whether it was new: (n,) bool, one True among equals."""
        while self._size + len(digests) > 0.75 * len(self._table):
            self._grow()
        new = np.zeros(len(digests), dtype=bool)
        pending = np.arange(len(digests))
        while pending.size:
            slots = self._find(digests[pending])
            empty = self._table[slots, 0] == 0
            pending, slots = pending[empty], slots[empty]
            taken, first = np.unique(slots, return_index=True)  # where several want a slot, the first gets it
            self._table[taken] = digests[pending[first]]
            new[pending[first]] = True
            pending = np.delete(pending, first)
        self._size += int(new.sum())
        return new

    def contains(self, digests: np.ndarray) -> np.ndarray:
        """For each digest, (n, words) uint64, whether it is in the set: (n,) bool."""
        return self._table[self._find(digests), 0] != 0

    def _find(self, digests: np.ndarray) -> np.ndarray:
        """The slot of each digest, or the empty one where it would go."""
        mask = np.uint64(len(self._table) - 1)
        slots = (digests[:, -1] & mask).astype(np.intp)
        searching = np.arange(len(digests))
        while searching.size:
            entries = self._table[slots[searching]]
            other = (entries[:, 0] != 0) & (entries != digests[searching]).any(axis=1)
            searching = searching[other]
            slots[searching] = (slots[searching] + 1) & int(mask)
        return slots

    def _grow(self) -> None:
        old = self._table
        self._table = np.zeros((2 * len(old), old.shape[1]), dtype=np.uint64)
        self._size = 0
        for start in range(0, len(old), 1 << 16):
            part = old[start : start + (1 << 16)]
            self.add(part[part[:, 0] != 0])


# --- n-grams of token ids ---


def ngram_hashes(ids: np.ndarray, n_tokens: np.ndarray, n: int, control_ids: tuple[int, int, int]):
    """Hashes of the n-grams within documents' text: (hashes uint64, index of the document of each).

    `ids` are those of the documents one after another, `n_tokens` how many each has, `control_ids` those of
    <|endoftext|>, <|im_start|> and <|im_end|>. An n-gram crosses neither documents nor messages, nor holds a role.
    """
    if len(ids) < n:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    hashes = hash_ngrams(ids, n)
    barriers = np.concatenate([[0], np.cumsum(_is_control(ids, control_ids), dtype=np.int64)])
    inside = np.flatnonzero(barriers[n:] == barriers[: len(hashes)])
    return mixed(hashes[inside]), np.repeat(np.arange(len(n_tokens)), n_tokens)[inside]


def _is_control(ids: np.ndarray, control_ids: tuple[int, int, int]) -> np.ndarray:
    """Where control tokens stand, the role and line feed behind <|im_start|>, the line feed behind <|im_end|>."""
    is_control = np.isin(ids, np.array(control_ids, dtype=ids.dtype))
    _, im_start, im_end = control_ids
    is_control[np.flatnonzero(ids == im_end) + 1] = True
    starts = np.flatnonzero(ids == im_start)
    is_control[starts + 1] = is_control[starts + 2] = True  # a role has one token and "assistant" two
    is_control[starts[ids[starts + 1] == ASSISTANT_IDS[0]] + 3] = True
    return is_control


# --- near duplicates ---


def require_minhash() -> None:
    """Raise UserError unless the package that makes MinHash signatures is installed."""
    try:
        import rensa  # noqa: F401
    except ImportError as error:
        raise UserError("--near_dedup needs the package rensa; run: pip install rensa==0.5.0") from error


def band_keys(ids: np.ndarray, n_tokens: np.ndarray, control_ids: tuple[int, int, int]) -> np.ndarray:
    """Each document's MinHash signature as the hashes of its bands: (documents, BANDS) uint64.

    A document without a 5-gram has zeros.
    """
    import rensa

    hashes, document = ngram_hashes(ids, n_tokens, NEAR_NGRAM, control_ids)
    counts = np.bincount(document, minlength=len(n_tokens))
    row_offsets = np.concatenate([[0], np.cumsum(counts)]).tolist()
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, row_offsets, BANDS * ROWS, MINHASH_SEED)
    signatures = np.array(digests.to_rows(), dtype=np.uint64).reshape(len(n_tokens), BANDS, ROWS)
    keys = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), signatures.shape[:2])
    for row in range(ROWS):
        keys = mixed(keys ^ signatures[:, :, row])
    return np.where(counts[:, None] > 0, np.maximum(keys, np.uint64(1)), np.uint64(0))


class NearDuplicates:
    """The bands of every document kept so far: 170 to 340 bytes of memory a document."""

    def __init__(self):
        self._seen = DigestSet(words=1)

    def find(self, keys: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Which candidates, (documents,) bool, share a band with a document kept before, in this batch or earlier.

        `keys`, (documents, BANDS), come from `band_keys`. The candidates that are not found are kept from now on.
        """
        is_near = self._seen.contains(keys.reshape(-1, 1)).reshape(keys.shape).any(axis=1) & candidates
        in_batch: set[int] = set()
        for index in np.flatnonzero(candidates & ~is_near & (keys[:, 0] != 0)):
            document = keys[index].tolist()
            if in_batch.isdisjoint(document):
                in_batch.update(document)
            else:
                is_near[index] = True
        self._seen.add(np.fromiter(in_batch, dtype=np.uint64, count=len(in_batch)).reshape(-1, 1))
        return is_near


# --- what validation shares with train ---


def shared_ngrams(train: Batches, val: Batches, control_ids: tuple[int, int, int]) -> dict[str, int]:
    """Counts of the 13-grams of token ids that validation shares with train, and of the documents that hold them.

    `train` and `val` are batches of (ids, tokens of each document). 13 words in a row are what GPT-3's authors took
    for a repeat (Brown et al. 2020, appendix C); 13 tokens are about ten words. Of a large validation split the first
    MOST_SHARED_NGRAMS are looked at. Memory stays under half a GB.
    """
    known = _distinct_ngrams(val, control_ids)
    in_filter = np.zeros(1 << FILTER_BITS, dtype=bool)  # spares most 13-grams of train the search
    in_filter[known >> np.uint64(64 - FILTER_BITS)] = True
    in_train = np.zeros(len(known), dtype=bool)
    n_some = n_half = 0
    for ids, n_tokens in train:
        hashes, document = ngram_hashes(ids, n_tokens, SHARED_NGRAM, control_ids)
        maybe = np.flatnonzero(in_filter[hashes >> np.uint64(64 - FILTER_BITS)])
        place = np.minimum(np.searchsorted(known, hashes[maybe]), max(len(known) - 1, 0))
        is_shared = known[place] == hashes[maybe]
        in_train[place[is_shared]] = True
        n_shared = np.bincount(document[maybe[is_shared]], minlength=len(n_tokens))
        n_all = np.bincount(document, minlength=len(n_tokens))
        n_some += int((n_shared > 0).sum())
        n_half += int(((n_shared > 0) & (2 * n_shared >= n_all)).sum())
    return {
        "train documents that share 13 tokens in a row with validation": n_some,
        "train documents that share half of their 13-grams with validation": n_half,
        "13-grams of validation": len(known),
        "13-grams of validation that train holds, too": int(in_train.sum()),
    }


def _distinct_ngrams(batches: Batches, control_ids: tuple[int, int, int]) -> np.ndarray:
    """The distinct 13-grams' hashes, sorted, of the first MOST_SHARED_NGRAMS."""
    parts, count = [], 0
    for ids, n_tokens in batches:
        part = np.unique(ngram_hashes(ids, n_tokens, SHARED_NGRAM, control_ids)[0])
        parts.append(part[: MOST_SHARED_NGRAMS - count])
        count += len(parts[-1])
        if count == MOST_SHARED_NGRAMS:
            break
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)
