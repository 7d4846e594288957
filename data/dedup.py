"""Find exact duplicates, near duplicates, and text that train and validation share.

Documents are compared by the n-grams of their token ids. Near duplicates are found as in FineWeb (Penedo et al. 2024,
section 3.4): MinHash signatures of 5-grams are cut into bands, and documents that agree in at least one band count as
near duplicates. With 16 bands of 8 values, this finds 24, 61, 95 and 100 % of the pairs that share 60, 70, 80 and 90 %
of their 5-grams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from common.cli import UserError
from common.ngrams import hash_ngrams, mixed
from data.writing import Encoded
from setup_tokenizer import GPT2, Tokenizer

NEAR_NGRAM = 5
BANDS = 16
ROWS = 8  # values per band
MINHASH_SEED = 1
SHARED_NGRAM = 13
MAX_SHARED_NGRAMS = 16 << 20  # of validation in memory: 128 MB, plus 64 MB for the filter in front of them
FILTER_BITS = 26

Batches = Iterable[tuple[np.ndarray, np.ndarray]]


# --- sets of digests ---


class DigestSet:
    """A set of digests of `words` uint64 each, filled in batches: an open-addressing hash table.

    The first word of a digest must not be 0. A Python set takes about 120 bytes per 16-byte digest, this one 21 to 43.
    """

    def __init__(self, words: int = 2):
        self._table = np.zeros((1 << 12, words), dtype=np.uint64)  # first word 0: an empty slot
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests, (n, words) uint64; returns which were new, (n,) bool: of equal ones only the first."""
        while self._size + len(digests) > 0.75 * len(self._table):
            self._grow()
        new = np.zeros(len(digests), dtype=bool)
        pending = np.arange(len(digests))
        while pending.size:
            slots = self._find(digests[pending])
            empty = self._table[slots, 0] == 0
            pending, slots = pending[empty], slots[empty]
            taken, first = np.unique(slots, return_index=True)  # if several digests want a slot, the first gets it
            self._table[taken] = digests[pending[first]]
            new[pending[first]] = True
            pending = np.delete(pending, first)
        self._size += int(new.sum())
        return new

    def contains(self, digests: np.ndarray) -> np.ndarray:
        """Which of the digests, (n, words) uint64, are in the set: (n,) bool."""
        return self._table[self._find(digests), 0] != 0

    def _find(self, digests: np.ndarray) -> np.ndarray:
        """The slot of each digest, or the empty slot where it would be stored."""
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


class Deduplicator:
    """Finds the documents that do not repeat an earlier one, and counts the others by reason."""

    def __init__(self, counts: Counter, near_dedup: bool):
        self._counts = counts
        self._near = NearDuplicates() if near_dedup else None
        self._seen = DigestSet()
        self._in_val: DigestSet | None = None

    def begin_train(self) -> None:
        """Everything seen so far is the validation split; the rest is train."""
        self._seen, self._in_val = DigestSet(), self._seen

    def find_new(self, batch: Encoded) -> np.ndarray:
        """Which of the batch's documents are new: (documents,) bool."""
        new = self._seen.add(batch.digests)
        self._counts["duplicates"] += int((~new).sum())
        if self._in_val is not None:
            shared = new & self._in_val.contains(batch.digests)
            self._counts["train documents also in validation"] += int(shared.sum())
            new &= ~shared
        if self._near is not None and batch.band_keys is not None:
            is_near = self._near.find(batch.band_keys, new)
            self._counts["near duplicates"] += int(is_near.sum())
            new &= ~is_near
        return new


# --- n-grams of token ids ---


def ngram_hashes(
    ids: np.ndarray, n_tokens: np.ndarray, n: int, tokenizer: Tokenizer = GPT2
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams within documents' text: (hashes in uint64, index of each one's document).

    `ids` are those of the documents one after another, `n_tokens` the number of each. An n-gram crosses neither
    documents nor messages, and contains no role.
    """
    if len(ids) < n:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    hashes = hash_ngrams(ids, n)
    barriers = np.concatenate([[0], np.cumsum(~_is_text(ids, tokenizer), dtype=np.int64)])
    inside = np.flatnonzero(barriers[n:] == barriers[: len(hashes)])
    return mixed(hashes[inside]), np.repeat(np.arange(len(n_tokens)), n_tokens)[inside]


def _is_text(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Which ids of whole documents are text, rather than control tokens, roles or the newlines after these."""
    messages = tokenizer.message_spans(ids)
    is_text = ids < tokenizer.endoftext
    is_text[np.flatnonzero(ids == tokenizer.im_end) + 1] = False
    longest = max(map(len, tokenizer.role_ids))
    for offset in range(1, longest + 2):  # the ids of the role and of its newline
        in_header = messages.start + offset < messages.content
        is_text[messages.start[in_header] + offset] = False
    return is_text


# --- near duplicates ---


def require_minhash() -> None:
    """Raise UserError unless the package that computes MinHash signatures is installed."""
    try:
        import rensa  # noqa: F401
    except ImportError as error:
        raise UserError("--near_dedup needs the package rensa; run: pip install rensa==0.5.0") from error


def band_keys(ids: np.ndarray, n_tokens: np.ndarray, tokenizer: Tokenizer = GPT2) -> np.ndarray:
    """Each document's MinHash signature as the hashes of its bands: (documents, BANDS) uint64.

    `ids` and `n_tokens` are as for `ngram_hashes`. A document without a 5-gram has zeros.
    """
    import rensa

    hashes, document = ngram_hashes(ids, n_tokens, NEAR_NGRAM, tokenizer)
    counts = np.bincount(document, minlength=len(n_tokens))
    row_offsets = np.concatenate([[0], np.cumsum(counts)]).tolist()
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, row_offsets, BANDS * ROWS, MINHASH_SEED)
    signatures = np.array(digests.to_rows(), dtype=np.uint64).reshape(len(n_tokens), BANDS, ROWS)
    keys = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), signatures.shape[:2])
    for row in range(ROWS):
        keys = mixed(keys ^ signatures[:, :, row])
    return np.where(counts[:, None] > 0, np.maximum(keys, np.uint64(1)), np.uint64(0))


class NearDuplicates:
    """The bands of every document kept so far: 170 to 340 bytes of memory per document."""

    def __init__(self) -> None:
        self._seen = DigestSet(words=1)

    def find(self, keys: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Which candidates share a band with a document kept earlier, in this batch or a previous one.

        `keys`, (documents, BANDS), come from `band_keys`; `candidates` and the result are (documents,) bool. The
        candidates that are not near duplicates are kept.
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


# --- text that train and validation share ---


def shared_ngrams(
    train: Batches, val: Batches, max_ngrams: int = MAX_SHARED_NGRAMS, tokenizer: Tokenizer = GPT2
) -> dict[str, int]:
    """Counts of the 13-grams of token ids that validation shares with train, and of the documents that contain them.

    `train` and `val` are batches of (ids, number of tokens of each document). GPT-3's authors counted 13 words in a row
    as a repeat (Brown et al. 2020, appendix C); 13 tokens are about ten words. Of a large validation split only the
    first `max_ngrams` are compared, so that memory stays below half a gigabyte.
    """
    known = _distinct_ngrams(val, max_ngrams, tokenizer)
    in_filter = np.zeros(1 << FILTER_BITS, dtype=bool)  # spares most 13-grams of train the binary search
    in_filter[known >> np.uint64(64 - FILTER_BITS)] = True
    in_train = np.zeros(len(known), dtype=bool)
    n_some = n_half = 0
    for ids, n_tokens in train:
        hashes, document = ngram_hashes(ids, n_tokens, SHARED_NGRAM, tokenizer)
        maybe = np.flatnonzero(in_filter[hashes >> np.uint64(64 - FILTER_BITS)])
        index = np.minimum(np.searchsorted(known, hashes[maybe]), max(len(known) - 1, 0))
        is_shared = known[index] == hashes[maybe]
        in_train[index[is_shared]] = True
        n_shared = np.bincount(document[maybe[is_shared]], minlength=len(n_tokens))
        n_all = np.bincount(document, minlength=len(n_tokens))
        n_some += int((n_shared > 0).sum())
        n_half += int(((n_shared > 0) & (2 * n_shared >= n_all)).sum())
    return {
        "train documents that share 13 tokens in a row with validation": n_some,
        "train documents that share half of their 13-grams with validation": n_half,
        "13-grams of validation": len(known),
        "13-grams of validation that also occur in train": int(in_train.sum()),
    }


def _distinct_ngrams(batches: Batches, max_ngrams: int, tokenizer: Tokenizer) -> np.ndarray:
    """The hashes of the first `max_ngrams` distinct 13-grams, sorted."""
    parts: list[np.ndarray] = []
    count = 0
    for ids, n_tokens in batches:
        part = np.unique(ngram_hashes(ids, n_tokens, SHARED_NGRAM, tokenizer)[0])
        parts.append(part[: max_ngrams - count])
        count += len(parts[-1])
        if count == max_ngrams:
            break
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)
