"""The stream of ids in .bin files: shards read as one, and little of a large file is in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.token_stream import TokenStream
from setup_tokenizer import ENDOFTEXT_ID
from tests.test_rows import stream_of
from training.rows import TextRows


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


def test_positions_are_found_across_shards_and_pieces(tmp_path):
    ids = np.random.default_rng(1).integers(0, 3, 100)
    for piece in (1, 7, 1000):
        stream = TokenStream(stream_of(tmp_path, ids, (20, 1, 50)).paths, piece_tokens=piece)
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
