"""Batches: the same rows from any position, errors of the thread reach the caller, validation is always the same."""

from __future__ import annotations

import numpy as np
import pytest

from common.cli import UserError
from model import IGNORED
from setup_tokenizer import encode_chat
from tests.test_rows import conversations, joined, stream_of
from training.batches import Batches, fixed_batches
from training.rows import ChatRows, TextRows


def take(rows, n_rows: int, n: int, position=None):
    made = Batches(rows, n_rows, position)
    try:
        return [(made.next(), dict(made.position)) for _ in range(n)]
    finally:
        made.close()


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_batches_continue_from_any_position(tmp_path, kind):
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
    with pytest.raises(UserError, match=r"0.bin contain no target; use --loss_on all"):
        fixed_batches(rows, 2, 4)
    assert fixed_batches(ChatRows(rows.stream, 16, 1, "all"), 2, 4)
