"""Batches: each token is a target once an epoch, only the assistant's words are targets, bad files are refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from setup_tokenizer import (
    ASSISTANT_IDS,
    ENDOFTEXT_ID,
    IM_END_ID,
    IM_START_ID,
    encode_chat,
    encode_text,
    get_extended_tokenizer,
)
from tests.tiny import prepare
from training import batches
from training.batches import (
    IGNORED,
    Batches,
    ChatRows,
    TextRows,
    TokenStream,
    assistant_targets,
    fixed_batches,
    open_dataset,
    require_length,
)


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


# The stream


@pytest.mark.parametrize("shard_lengths", [(), (1,), (10, 1, 30), (49,), (25, 25)])
def test_shards_read_as_one_stream(tmp_path, shard_lengths):
    ids = np.arange(50)
    stream = stream_of(tmp_path, ids, shard_lengths)
    assert len(stream) == 50
    for start in range(-3, 52):
        for end in range(start, 54):
            expected = [position if 0 <= position < 50 else ENDOFTEXT_ID for position in range(start, end)]
            assert stream.read(start, end).tolist() == expected
    assert stream.read(0, 5).dtype == np.int64


def test_positions_are_found_across_shards_and_pieces(tmp_path, monkeypatch):
    ids = np.random.default_rng(1).integers(0, 3, 100)
    for piece in (1, 7, 1000):
        monkeypatch.setattr(batches, "PIECE_TOKENS", piece)
        stream = stream_of(tmp_path, ids, (20, 1, 50))
        assert stream.positions_of(2).tolist() == np.flatnonzero(ids == 2).tolist()
    assert stream.positions_of(9).tolist() == []


def resident_bytes() -> np.ndarray:
    """What this process holds in memory of its own, and of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return np.array([1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssFile:"))])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what a process holds in memory")
def test_an_epoch_holds_little_of_a_large_file_in_memory(tmp_path):
    file_bytes = 256 << 20
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(file_bytes)  # zeros that take no room
    before = resident_bytes()
    stream = TokenStream([tmp_path / "large.bin"])
    stream.check_ids("unused")
    assert (resident_bytes() - before).max() < file_bytes / 8, "after the look at every id"
    rows = TextRows(stream, 16384, seed=1)
    grown = 0
    for index in range(rows.start_epoch(0)):
        rows.row(index)
        if index % 100 == 0:
            grown = max(grown, (resident_bytes() - before).max())
    assert grown < file_bytes / 4, "while an epoch is read in its order"


# Text rows


@pytest.mark.parametrize(("n_tokens", "block_size"), [(9, 8), (17, 8), (24, 8), (25, 8), (100, 7), (2, 1), (50, 49)])
def test_every_token_but_the_first_is_a_target_once_an_epoch(tmp_path, n_tokens, block_size):
    ids = np.random.default_rng(1).permutation(n_tokens)  # each id says where it stands
    rows = TextRows(stream_of(tmp_path, ids, (n_tokens // 3,)), block_size, seed=5)
    for epoch in range(4):
        seen = Counter()
        for index in range(rows.start_epoch(epoch)):
            x, y = rows.row(index)
            assert x.shape == y.shape == (block_size,)
            for place in np.flatnonzero(y != IGNORED):
                assert np.flatnonzero(ids == x[place])[0] + 1 == np.flatnonzero(ids == y[place])[0]
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


# What the assistant says


def slow_targets(ids) -> list[bool]:
    """The reference: read the conversation id by id."""
    is_target = [False] * len(ids)
    place = 0
    while place < len(ids):
        if ids[place] != IM_START_ID:
            place += 1
            continue
        role = tuple(ids[place + 1 : place + 3])
        place += 4 if role == ASSISTANT_IDS else 1
        if role != ASSISTANT_IDS:
            continue
        while place < len(ids) and ids[place] not in (IM_START_ID, ENDOFTEXT_ID):
            is_target[place] = True
            place += 1
            if ids[place - 1] == IM_END_ID:
                break
    return is_target


def test_the_content_and_its_end_are_targets_and_nothing_else():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi assistant"},
        {"role": "assistant", "content": "Hello, Ana!"},
        {"role": "user", "content": "Bye <|im_start|>assistant\nno"},
        {"role": "assistant", "content": ""},
    ]
    ids = np.array(encode_chat(messages, end_of_conversation=True))
    assert ids[assistant_targets(ids)].tolist() == [*encode_text("Hello, Ana!"), IM_END_ID, IM_END_ID]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], []),
        ([1, 2, 3], [0, 0, 0]),
        ([IM_START_ID], [0]),
        ([IM_START_ID, 562], [0, 0]),
        ([IM_START_ID, 562, 10167, 198], [0, 0, 0, 0]),
        ([IM_START_ID, 562, 10167, 198, 5], [0, 0, 0, 0, 1]),  # cut in the middle of an answer
        ([IM_START_ID, 562, 10167, 198, IM_END_ID, 198, ENDOFTEXT_ID], [0, 0, 0, 0, 1, 0, 0]),
        ([IM_START_ID, 562, 10167, 198, 5, ENDOFTEXT_ID], [0, 0, 0, 0, 1, 0]),
        ([5, 6, IM_END_ID, IM_START_ID, 562, 10167, 198, 7], [0, 0, 0, 0, 0, 0, 0, 1]),
        ([IM_START_ID, 7220, 198, 562, 10167, 198, 9, IM_END_ID], [0] * 8),  # a user who says "assistant"
    ],
)
def test_targets_by_hand(ids, expected):
    assert (
        assistant_targets(np.array(ids, dtype=int)).tolist() == [bool(flag) for flag in expected] == slow_targets(ids)
    )


def test_targets_equal_the_slow_reference():
    rng = np.random.default_rng(1)
    for number in range(300):
        ids = conversations(rng, 1)[0]
        start, end = sorted(rng.integers(0, len(ids) + 1, 2)) if number % 2 else (0, len(ids))
        piece = ids[start:end]  # cut anywhere, too
        assert assistant_targets(np.array(piece, dtype=int)).tolist() == slow_targets(piece)


# Chat rows


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
        assert 0 < rows.real_token_share() <= 1
    assert len(orders) == 3


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
        assert placed == Counter(range(len(pieces))) and n_rows == len(rows._rows)
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


def test_packing_is_best_fit():
    lengths = np.array([7, 6, 4, 3, 3, 2, 10])
    rows = batches._pack_best_fit([6, 0, 1, 2, 3, 4, 5], lengths, 10)
    assert rows == [[6], [0, 3], [1, 2], [4, 5]]
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths = rng.integers(1, 21, rng.integers(1, 60))
        rows = batches._pack_best_fit(list(range(len(lengths))), lengths, 20)
        loads, expected = [], []  # brute force: the fullest row that still has room
        for length in lengths.tolist():
            fits = [load for load in loads if load + length <= 20]
            if fits:
                loads[loads.index(max(fits))] += length
            else:
                loads.append(length)
        expected = sorted(loads)
        assert sorted(int(lengths[row].sum()) for row in rows) == expected


def test_most_places_hold_real_tokens(tmp_path):
    talks = conversations(np.random.default_rng(4), 400)
    rows = ChatRows(stream_of(tmp_path, joined(talks)), 127, 1)
    n_rows = rows.start_epoch(0)
    assert rows.real_token_share() == pytest.approx(len(rows.stream) / (n_rows * 128))
    assert rows.real_token_share() > 0.98


def test_an_epoch_comes_back_as_it_was(tmp_path):
    rows = ChatRows(stream_of(tmp_path, joined(conversations(np.random.default_rng(4), 40))), 63, 1)
    first = [rows.row(index)[0].tolist() for index in range(rows.start_epoch(0))]
    other = [rows.row(index)[0].tolist() for index in range(rows.start_epoch(1))]
    assert first != other and first == [rows.row(index)[0].tolist() for index in range(rows.start_epoch(0))]


# Batches


def take(rows, n_rows: int, n: int, position=None):
    made = Batches(rows, n_rows, position)
    try:
        return [(made.next(), dict(made.position)) for _ in range(n)]
    finally:
        made.close()


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_batches_go_on_from_any_position(tmp_path, kind):
    if kind == "text":
        rows = TextRows(stream_of(tmp_path, np.arange(100)), 9, 1)
    else:
        rows = ChatRows(stream_of(tmp_path, joined(conversations(np.random.default_rng(1), 12))), 60, 1)
    straight = take(rows, 4, 12)
    assert straight[-1][1]["epoch"] >= 2
    for k in range(11):
        (ids, targets), position = take(rows, 4, 1, straight[k][1])[0]
        assert (ids == straight[k + 1][0][0]).all() and (targets == straight[k + 1][0][1]).all()
        assert position == straight[k + 1][1]
    assert ids.dtype == targets.dtype == np.int64


def test_a_batch_larger_than_an_epoch(tmp_path):
    rows = TextRows(stream_of(tmp_path, np.arange(20)), 9, 1)
    (ids, _), position = take(rows, 50, 1)[0]
    assert ids.shape == (50, 9) and position["epoch"] > 10


def test_an_error_while_batches_are_made_reaches_the_caller_and_close_returns(tmp_path):
    class Broken(TextRows):
        def row(self, index):
            raise OSError("the disk went away")

    made = Batches(Broken(stream_of(tmp_path, np.arange(50)), 4, 1), 2)
    with pytest.raises(OSError, match="the disk went away"):
        made.next()
    made.close()
    busy = Batches(TextRows(stream_of(tmp_path, np.arange(50)), 4, 1), 2)
    busy.close()  # with nobody reading
    assert not busy._thread.is_alive()


def test_validation_batches_are_the_same_rows_however_they_are_split(tmp_path):
    rows = TextRows(stream_of(tmp_path, np.arange(100)), 9, 1)
    wanted = [rows.row(index) for index in range(min(rows.start_epoch(0), 10))]
    for batch_size in (1, 3, 4, 20):
        made = fixed_batches(rows, batch_size, 10)
        ids, targets = (np.concatenate(column) for column in zip(*made, strict=True))
        assert len(ids) % batch_size == 0
        assert (ids[:10] == [row[0] for row in wanted]).all() and (targets[:10] == [row[1] for row in wanted]).all()
        assert (targets[10:] == IGNORED).all()
    assert len(fixed_batches(rows, 4, 10**6)) == 3  # all rows there are


def test_validation_without_a_target_is_refused(tmp_path):
    talk = encode_chat([{"role": "user", "content": "Hi"}], end_of_conversation=True)
    rows = ChatRows(stream_of(tmp_path, talk * 20), 16, 1)
    with pytest.raises(UserError, match=r"0.bin hold no target; use --loss_on all"):
        fixed_batches(rows, 2, 4)
    assert fixed_batches(ChatRows(rows.stream, 16, 1, "all"), 2, 4)


# Prepared data sets


@pytest.fixture
def data(tmp_path):
    return prepare(tmp_path / "data")


def rewrite(data: Path, **changes) -> None:
    path = data / "text.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put(data: Path, split: str, content: bytes, keep_sha256: bool = False) -> None:
    """Another content for a split's file, with the right digest in the .json unless told."""
    (data / f"text-{split}.bin").write_bytes(content)
    if not keep_sha256:
        splits = json.loads((data / "text.json").read_text())["splits"]
        splits[split]["files"][0]["sha256"] = hashlib.sha256(content).hexdigest()
        rewrite(data, splits=splits)


def test_a_prepared_data_set_opens(data):
    streams, facts = open_dataset(data, "text")
    assert (len(streams["train"]), len(streams["val"])) == (600, 150)
    assert facts["format"] == "text" and facts["splits"]["train"]["tokens"] == 600


def test_shards_open_as_one_stream(data):
    from tests.tiny import write_dataset

    write_dataset(data, "many", "chat", 500, seed=3, n_shards=3)
    write_dataset(data, "one", "chat", 500, seed=3)
    many, one = (open_dataset(data, name)[0] for name in ("many", "one"))
    assert len(many["train"].paths) == 3
    assert (many["train"].read(0, 500) == one["train"].read(0, 500)).all()


def test_files_without_a_json_are_looked_at(data, capsys):
    prepare(data, "chat")
    for name in ("text", "chat"):
        (data / f"{name}.json").unlink()
        _, facts = open_dataset(data, name)
        assert facts["format"] == name and facts["n_vocab"] == 50259
        file = data / f"{name}-train.bin"
        assert facts["splits"]["train"]["files"][0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert f"taken as {name}" in capsys.readouterr().out


NOT_AGAIN = r"; prepare (the data|it) again with: python prepare_with_extended_tokenizer.py --input FILE --name text"


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty" + NOT_AGAIN),
        (b"\x01\x00\x02", "has an odd number of bytes" + r".*" + NOT_AGAIN),
        (
            np.array([1, 50259, 2] * 40, "<u2").tobytes(),
            r"holds the id 50259, above the vocabulary's last \(50258\)" + NOT_AGAIN,
        ),
    ],
    ids=["empty", "odd", "id"],
)
@pytest.mark.parametrize("with_json", [True, False])
def test_bad_files_are_refused(data, split, content, sentence, with_json):
    put(data, split, content)
    if not with_json:
        (data / "text.json").unlink()
    with pytest.raises(UserError, match=f"text-{split}.bin {sentence}") as error:
        open_dataset(data, "text")
    assert "\n" not in str(error.value)


def test_a_file_that_does_not_match_its_json_is_refused(data):
    content = bytearray((data / "text-val.bin").read_bytes())
    content[0] ^= 1
    put(data, "val", bytes(content), keep_sha256=True)
    with pytest.raises(UserError, match=r"text-val.bin does not match the sha256 in text.json" + NOT_AGAIN):
        open_dataset(data, "text")


def test_a_missing_file_names_the_command_and_what_is_there(data):
    with pytest.raises(UserError, match=r"story-train.bin not found; run: python data/prepare-story.py .*so far: text"):
        open_dataset(data, "story")
    (data / "text-val.bin").unlink()
    with pytest.raises(UserError, match=r"text-val.bin not found; run: python prepare_with_extended_tokenizer.py"):
        open_dataset(data, "text")
    with pytest.raises(UserError, match="nothing is prepared so far"):
        open_dataset(data / "nowhere", "chitchat")


def test_another_tokenizer_is_refused(data):
    rewrite(data, tokenizer="cl100k_base_chatml")
    with pytest.raises(UserError, match=r"the tokenizer cl100k_base_chatml, not gpt2_chatml" + NOT_AGAIN):
        open_dataset(data, "text")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"splits": {}}', '{"splits": {"train": {"files": []}}, "format": "text"}', "\udcff"],
)
def test_a_damaged_json_is_refused(data, content):
    (data / "text.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"text.json is damaged" + NOT_AGAIN):
        open_dataset(data, "text")


@pytest.mark.parametrize(
    "key", ["name", "format", "tokenizer", "n_vocab", "splits", "splits.val", "splits.train.files"]
)
def test_a_json_without_an_entry_is_damaged(data, key):
    facts = json.loads((data / "text.json").read_text())
    *outer, last = key.split(".")
    inner = facts
    for name in outer:
        inner = inner[name]
    del inner[last]
    (data / "text.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"text.json is damaged"):
        open_dataset(data, "text")


def test_too_few_tokens_for_a_row(data):
    streams, _ = open_dataset(data, "text")
    require_length(streams, 149)
    with pytest.raises(UserError, match=re.escape("text-val.bin holds 150 tokens and block_size 150 needs 151; use a")):
        require_length(streams, 150)
