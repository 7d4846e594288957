"""Repeats, near repeats and shared text, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.dedup import BANDS, DigestSet, NearDuplicates, band_keys, ngram_hashes, shared_ngrams
from data.encoding import encode_documents
from setup_tokenizer import IM_START_ID, ROLES, encode_chat

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def batch(documents: list) -> tuple[np.ndarray, np.ndarray]:
    """(ids, tokens of each document), as the pipeline has them."""
    parts = [encode_documents([document]) for document in documents]
    return np.concatenate(parts).astype(np.uint16), np.array([len(part) for part in parts])


def random_texts(count: int, words: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(map(str, random.integers(0, 10_000, words))) for _ in range(count)]


# --- the digest set ---


@SETTINGS
@given(st.lists(st.lists(st.integers(1, 60), max_size=30), max_size=20))
def test_a_digest_set_is_a_set(batches):
    def digests(numbers):
        return np.array([[number, number % 7] for number in numbers], dtype=np.uint64).reshape(-1, 2)  # collisions

    ours, oracle = DigestSet(), set()
    for batch in batches:
        expected = []
        assert ours.contains(digests(batch)).tolist() == [number in oracle for number in batch]
        for number in batch:
            expected.append(number not in oracle)
            oracle.add(number)
        assert ours.add(digests(batch)).tolist() == expected
        assert len(ours) == len(oracle)


def test_a_digest_set_grows():
    ours = DigestSet()
    digests = np.random.default_rng(0).integers(1, 2**63, size=(50_000, 2), dtype=np.uint64)
    assert ours.add(digests).all()
    assert not ours.add(digests[::-1]).any()
    assert ours.contains(digests).all() and len(ours) == 50_000
    assert not ours.contains(digests + np.uint64(1)).any()


def test_a_set_of_single_words():
    ours = DigestSet(words=1)
    keys = np.random.default_rng(0).integers(1, 2**63, size=(20_000, 1), dtype=np.uint64)
    assert ours.add(keys).all() and ours.contains(keys).all() and not ours.contains(keys + np.uint64(1)).any()


# --- n-grams ---

SMALL_CHATS = st.lists(
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": st.text("ab \n", max_size=12)}),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


@SETTINGS
@given(SMALL_CHATS, st.integers(1, 6))
def test_ngrams_are_those_of_the_contents(conversations, n):
    ids, n_tokens = batch(conversations)
    hashes, document = ngram_hashes(ids, n_tokens, n)
    expected = []
    for index, messages in enumerate(conversations):
        for message in messages:
            whole = encode_chat([message])
            content = whole[whole.index(IM_START_ID) + (3 if message["role"] != "assistant" else 4) : -2]
            expected += [(index, tuple(content[start : start + n])) for start in range(len(content) - n + 1)]
    assert document.tolist() == [index for index, _ in expected]
    by_hash = dict(zip(hashes.tolist(), (ngram for _, ngram in expected), strict=True))
    assert len(by_hash) == len({ngram for _, ngram in expected}), "equal n-grams have equal hashes, and others others"
    assert [by_hash[one] for one in hashes.tolist()] == [ngram for _, ngram in expected]


# --- near duplicates ---


def test_near_duplicates_are_found_as_often_as_minhash_promises():
    originals = random_texts(300, 60)
    random = np.random.default_rng(1)
    found = {}
    for n_changed in (1, 4, 20):  # of 60 words; a changed word changes the n-grams around it
        changed = []
        for text in originals:
            words = text.split()
            for index in random.choice(60, n_changed, replace=False):
                words[index] = "other"
            changed.append(" ".join(words))
        near = NearDuplicates()
        assert not near.find(band_keys(*batch(originals)), np.ones(300, bool)).any()
        found[n_changed] = near.find(band_keys(*batch(changed)), np.ones(300, bool)).mean()
    assert found[1] > 0.98 and found[20] < 0.02 and found[1] >= found[4] > found[20]


def test_the_first_of_equals_is_kept_within_a_batch_and_after_it():
    keys = band_keys(*batch([*random_texts(3, 40), *random_texts(3, 40), "short", "short"]))
    near = NearDuplicates()
    assert near.find(keys, np.ones(8, bool)).tolist() == [False] * 3 + [True] * 3 + [False] * 2
    assert near.find(keys, np.ones(8, bool)).tolist() == [True] * 6 + [False] * 2
    no_candidate = NearDuplicates()
    no_candidate.find(keys, np.zeros(8, bool))
    assert not no_candidate.find(keys[:3], np.ones(3, bool)).any(), "only what is kept makes others near"


def test_signatures_do_not_depend_on_the_batch():
    texts = random_texts(7, 30)
    whole = band_keys(*batch(texts))
    assert np.array_equal(whole, np.concatenate([band_keys(*batch([text])) for text in texts]))
    assert band_keys(np.zeros(0, np.uint16), np.zeros(0, int)).shape == (0, BANDS)


# --- text that validation shares ---


@pytest.mark.parametrize("most", [10**6, 5])
def test_shared_13_grams_are_counted_as_brute_force_counts_them(most):
    words = [" a b c d e f g h i j k l m n o p q r s t"[start:] for start in (0, 4, 10, 30)]
    train = [
        words[0],
        words[1],
        words[3],
        words[0] + words[2],
        *random_texts(20, 30),
        words[1] + random_texts(1, 90)[0],
    ]
    val = [words[1], *random_texts(5, 20, seed=9)]

    def grams(text: str) -> list[tuple]:
        ids = encode_documents([text])[:-1].tolist()
        return [tuple(ids[start : start + 13]) for start in range(len(ids) - 12)]

    counts = shared_ngrams([batch(train[:3]), batch(train[3:])], [batch(val)], max_ngrams=most)
    if most == 5:
        assert counts["13-grams of validation"] == 5
        return
    of_val = {gram for text in val for gram in grams(text)}
    shares = [[gram in of_val for gram in grams(text)] for text in train]
    assert list(counts.values()) == [
        sum(any(share) for share in shares),
        sum(any(share) and 2 * sum(share) >= len(share) for share in shares),
        len(of_val),
        len(of_val & {gram for text in train for gram in grams(text)}),
    ]
    assert 0 < counts["train documents that share half of their 13-grams with validation"] < 4


def test_validation_without_a_13_gram_shares_nothing():
    counts = shared_ngrams([batch(["a " * 40])], [batch(["short"])])
    assert set(counts.values()) == {0}
