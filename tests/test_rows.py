"""Rows: every token is a target once an epoch, and whole conversations are packed into rows."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.token_stream import TokenStream
from model import IGNORED
from setup_tokenizer import ENDOFTEXT_ID, IM_END_ID, IM_START_ID, ROLE_IDS, encode_chat, get_extended_tokenizer
from tests.test_targets import slow_targets
from training.rows import ChatRows, TextRows, pack_best_fit

ASSISTANT_IDS = ROLE_IDS["assistant"]


def stream_of(folder: Path, ids, shard_lengths=()) -> TokenStream:
    """`ids` as a stream of shards of the given lengths and a last one with the rest."""
    ids = np.asarray(ids, dtype="<u2")
    shards = [part for part in np.split(ids, np.cumsum(shard_lengths, dtype=int)) if len(part)]
    paths = [folder / f"{number}.bin" for number in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        path.write_bytes(shard.tobytes())
    return TokenStream(paths)


def conversations(rng: np.random.Generator, n: int, most_messages: int = 6, most_tokens: int = 9) -> list[list[int]]:
    """Random conversations as ids, some with a system message, empty messages, or several turns in a row."""
    enc, made = get_extended_tokenizer(), []
    for _ in range(n):
        messages = []
        for _ in range(int(rng.integers(1, most_messages + 1))):
            content = enc.decode(rng.integers(1000, 20000, rng.integers(0, most_tokens + 1)).tolist())
            messages.append({"role": str(rng.choice(["system", "user", "assistant"])), "content": content})
        made.append(encode_chat(messages, end_of_conversation=True))
    return made


def joined(talks: list[list[int]]) -> list[int]:
    return list(itertools.chain(*talks))


# --- text rows ---


@pytest.mark.parametrize(("n_tokens", "block_size"), [(9, 8), (17, 8), (24, 8), (25, 8), (100, 7), (2, 1), (50, 49)])
def test_every_token_but_the_first_is_a_target_once_an_epoch(tmp_path, n_tokens, block_size):
    ids = np.random.default_rng(1).permutation(n_tokens)  # each id tells its position
    rows = TextRows(stream_of(tmp_path, ids, (n_tokens // 3,)), block_size, seed=5)
    for epoch in range(4):
        seen = Counter()
        for index in range(rows.start_epoch(epoch)):
            x, y = rows.row(index)
            assert x.shape == y.shape == (block_size,)
            for position in np.flatnonzero(y != IGNORED):
                assert np.flatnonzero(ids == x[position])[0] + 1 == np.flatnonzero(ids == y[position])[0]
            seen.update(y[y != IGNORED].tolist())
        assert seen == Counter(ids[1:].tolist())


def test_epochs_differ_and_seeds_differ_and_both_repeat(tmp_path):
    stream = stream_of(tmp_path, np.arange(1000))

    def rows_of(seed: int, epoch: int) -> list:
        rows = TextRows(stream, 10, seed)
        return [rows.row(index)[0].tolist() for index in range(rows.start_epoch(epoch))]

    assert rows_of(1, 0) == rows_of(1, 0) and rows_of(1, 3) == rows_of(1, 3)
    assert rows_of(1, 0) != rows_of(2, 0)
    assert len({str(rows_of(1, epoch)) for epoch in range(6)}) == 6
    cuts = {next(row[0] for row in rows_of(1, epoch) if row[0] != ENDOFTEXT_ID) % 10 for epoch in range(6)}
    assert len(cuts) > 1, "pieces are cut elsewhere each epoch"


# --- chat rows ---


@pytest.mark.parametrize("block_size", [15, 40, 400])
@pytest.mark.parametrize("shard_lengths", [(), (100, 3)])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_every_conversation_is_there_once_an_epoch(tmp_path, block_size, shard_lengths, loss_on):
    talks = conversations(np.random.default_rng(2), 40)
    rows = ChatRows(stream_of(tmp_path, joined(talks), shard_lengths), block_size, 5, loss_on)
    expected_tokens = Counter(joined(talks))
    said = [token for talk in talks for token, flag in zip(talk, slow_targets(talk), strict=True) if flag]
    orders = set()
    for epoch in range(3):
        tokens, targets, order, n_places = Counter(), Counter(), [], 0
        for index in range(rows.start_epoch(epoch)):
            x, y = rows.row(index)
            row = [int(x[0]), *(int(token) for token in np.append(x, 0)[1:-1])]
            assert len(row) == block_size == len(y)
            tokens.update(row)
            targets.update(y[y != IGNORED].tolist())
            order.append(row[0:8])
            n_places += block_size + 1
            shifted = np.append(x[1:], y[-1] if y[-1] != IGNORED else ENDOFTEXT_ID)
            assert (shifted[y != IGNORED] == y[y != IGNORED]).all()
        orders.add(str(order))
        # A row's last place is a target only; what it holds is not among the inputs.
        assert not tokens - expected_tokens - Counter({ENDOFTEXT_ID: n_places})
        if loss_on == "assistant" and block_size == 400:
            assert targets == Counter(said)
        assert not targets - (Counter(said) if loss_on == "assistant" else expected_tokens)
        assert 0 < rows.real_token_fraction() <= 1
    assert len(orders) == 3


def test_few_conversations_are_seen_at_many_positions(tmp_path):
    """Packing alone would put them at nearly the same position in every epoch, and an answer is then learned there."""
    talks = conversations(np.random.default_rng(6), 12)
    rows = ChatRows(stream_of(tmp_path, joined(talks)), 200, 5)
    seen = set()
    for epoch in range(20):
        for index in range(rows.start_epoch(epoch)):
            row = rows.row(index)[0].tolist()
            seen |= {start for start in range(200) if row[start : start + len(talks[0])] == talks[0]}
    assert len(seen) > 8


@pytest.mark.parametrize("block_size", [9, 20, 63])
def test_pieces_cover_the_stream_once_and_fit(tmp_path, block_size):
    talks = conversations(np.random.default_rng(3), 60, most_messages=8, most_tokens=30)
    ids = np.array(joined(talks))
    rows = ChatRows(stream_of(tmp_path, ids), block_size, 5)
    pieces = sorted(rows._pieces.tolist(), key=lambda piece: piece[1])
    assert [begin for _, begin, _ in pieces] == [0, *(end for _, _, end in pieces[:-1])] and pieces[-1][2] == len(ids)
    assert all(message <= begin < end <= begin + block_size + 1 for message, begin, end in pieces)
    ends = np.cumsum([len(talk) for talk in talks])
    for message, begin, end in pieces:
        conversation = int(np.searchsorted(ends, begin, side="right"))
        first = int(ends[conversation]) - len(talks[conversation])
        assert first <= message and end <= ends[conversation], "no piece crosses a conversation's end"
        if len(talks[conversation]) <= block_size + 1:
            assert (begin, end) == (first, ends[conversation]), "one that fits stays whole"
        elif begin != first and begin != message:  # cut inside of a turn: only where the turn itself is too long
            turns = [first + place for place in np.flatnonzero(np.array(talks[conversation]) == IM_START_ID)]
            turn_end = next((turn for turn in turns if turn > begin), int(ends[conversation]))
            assert turn_end - message > block_size + 1
    for epoch in range(2):
        n_rows = rows.start_epoch(epoch)
        placed = Counter(piece for row in rows._rows for piece in row)
        assert placed == Counter(dict.fromkeys(placed, 1)) and n_rows == len(rows._rows)
        left_out = [rows._pieces[piece].tolist() for piece in range(len(pieces)) if piece not in placed]
        for message, begin, end in left_out:
            assert not any(slow_targets(ids[message:end].tolist())[begin + 1 - message :]), "only what has no target"
        assert all(sum(rows._lengths[piece] for piece in row) <= block_size + 1 for row in rows._rows)


def test_a_cut_answer_keeps_its_targets_but_the_first_of_each_piece(tmp_path):
    answer = list(range(1000, 1040))
    talk = [
        IM_START_ID,
        7220,
        198,
        5,
        IM_END_ID,
        198,
        IM_START_ID,
        *ASSISTANT_IDS,
        198,
        *answer,
        IM_END_ID,
        198,
        ENDOFTEXT_ID,
    ]
    rows = ChatRows(stream_of(tmp_path, [*talk, *talk]), 15, 1)
    seen = Counter()
    for index in range(rows.start_epoch(0)):
        _, y = rows.row(index)
        seen.update(y[y != IGNORED].tolist())
    firsts = {
        int(token)
        for message, begin, _ in rows._pieces
        for token in rows.stream.read(begin, begin + 1)
        if begin > message
    }
    assert len(firsts) == 2
    expected = [token for token in answer if token not in firsts]
    assert seen == Counter([*expected, IM_END_ID] * 2)


@pytest.mark.parametrize("end_pieces", [False, True])
@pytest.mark.parametrize("block_size", [4, 9, 20, 63, 400])
def test_exactly_the_rows_without_a_target_are_left_out(tmp_path, block_size, end_pieces, monkeypatch):
    monkeypatch.setattr("training.rows.SCANNED_TOKENS", 37)
    rng = np.random.default_rng(block_size)
    talks = conversations(rng, 80, most_messages=3, most_tokens=40)
    broken = [[IM_START_ID, *ASSISTANT_IDS], [IM_START_ID, *ASSISTANT_IDS, 198], [IM_START_ID, *ASSISTANT_IDS, 198, 7]]
    talks += [[*talk, ENDOFTEXT_ID] for talk in broken] + [[ENDOFTEXT_ID], [5, 6, ENDOFTEXT_ID]]
    stream = stream_of(tmp_path, joined([talks[index] for index in rng.permutation(len(talks))] + broken[2:]))
    rows = ChatRows(stream, block_size, 3, end_pieces=end_pieces)
    every = ChatRows(stream, block_size, 3, end_pieces=end_pieces)
    every._has_target[:] = True  # leaves out nothing
    for epoch in range(2):
        n_rows, n_all = rows.start_epoch(epoch), every.start_epoch(epoch)
        assert n_rows <= n_all == n_rows + rows.n_without_target and (n_rows < n_all or block_size == 400)
        expected = [every.row(index) for index in range(n_all) if (every.row(index)[1] != IGNORED).any()]
        got = [rows.row(index) for index in range(n_rows)]
        assert [(ids.tolist(), targets.tolist()) for ids, targets in got] == [
            (ids.tolist(), targets.tolist()) for ids, targets in expected
        ]
    assert ("left out" in rows.describe()) == (rows.n_without_target > 0)
    assert "left out" not in every.describe()


def test_packing_is_best_fit():
    lengths = np.array([7, 6, 4, 3, 3, 2, 10])
    rows = pack_best_fit([6, 0, 1, 2, 3, 4, 5], lengths, 10)
    assert rows == [[6], [0, 3], [1, 2], [4, 5]]
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths = rng.integers(1, 21, rng.integers(1, 60))
        rows = pack_best_fit(list(range(len(lengths))), lengths, 20)
        loads, expected = [], []  # brute force: the fullest row that still has room
        for length in lengths.tolist():
            fits = [load for load in loads if load + length <= 20]
            if fits:
                loads[loads.index(max(fits))] += length
            else:
                loads.append(length)
        expected = sorted(loads)
        assert sorted(int(lengths[row].sum()) for row in rows) == expected


def test_most_tokens_are_not_padding(tmp_path):
    talks = conversations(np.random.default_rng(4), 400)
    rows = ChatRows(stream_of(tmp_path, joined(talks)), 127, 1)
    n_rows = rows.start_epoch(0)
    assert rows.real_token_fraction() == pytest.approx(len(rows.stream) / (n_rows * 128))
    assert rows.real_token_fraction() > 0.98


def test_an_epoch_comes_back_as_it_was(tmp_path):
    rows = ChatRows(stream_of(tmp_path, joined(conversations(np.random.default_rng(4), 40))), 63, 1)
    first = [rows.row(index)[0].tolist() for index in range(rows.start_epoch(0))]
    other = [rows.row(index)[0].tolist() for index in range(rows.start_epoch(1))]
    assert first != other and first == [rows.row(index)[0].tolist() for index in range(rows.start_epoch(0))]
