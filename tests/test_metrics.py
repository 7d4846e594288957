"""The metrics log has no doubles and no gaps, and its curves are a picture."""

from __future__ import annotations

import errno
import json
import sys

import pytest

from common.cli import UserError
from training import metrics
from training.metrics import MetricsLog, draw_curves, read_metrics

RECORDS = [
    {"iter_num": 0, "val_loss": 10.8},
    {"iter_num": 1, "loss": 10.7, "learning_rate": 1e-3, "grad_norm": 2.0, "tokens_per_s": 100.0},
    {"iter_num": 2, "loss": 10.6, "learning_rate": 1e-3, "grad_norm": 1.5, "tokens_per_s": 120.0, "val_loss": 10.5},
]


def test_records_come_back_and_each_is_a_line_at_once(tmp_path):
    log = MetricsLog(tmp_path / "a.jsonl")
    for number, record in enumerate(RECORDS, 1):
        log.write(record)
        assert len((tmp_path / "a.jsonl").read_text().splitlines()) == number
    log.sync()
    log.close()
    assert read_metrics(tmp_path / "a.jsonl") == RECORDS


def test_a_log_starts_anew_with_the_records_given(tmp_path):
    (tmp_path / "a.jsonl").write_text("old\n")
    log = MetricsLog(tmp_path / "a.jsonl", RECORDS[:2])
    log.write(RECORDS[2])
    log.close()
    assert read_metrics(tmp_path / "a.jsonl") == RECORDS
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("torn", [b'{"iter_num": 3, "lo', b"\x00\x00\x00", b"[1]", b'{"loss": 3}', b"\xff\xfe"])
def test_an_unfinished_line_is_left_out(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS) + torn)
    assert read_metrics(path) == RECORDS
    assert read_metrics(tmp_path / "nowhere.jsonl") == []


def test_numbers_that_are_none_are_null(tmp_path):
    log = MetricsLog(tmp_path / "a.jsonl")
    log.write({"iter_num": 1, "loss": 2.0, "grad_norm": float("inf"), "x": float("nan")})
    log.close()
    line = (tmp_path / "a.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"iter_num": 1, "loss": 2.0, "grad_norm": None, "x": None}


class FullDisk:
    """A file on a disk with room for so many bytes more."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "full")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 5, 30, 100, 250])
def test_what_a_full_disk_refuses_is_written_later_and_once(tmp_path, capsys, room):
    log = MetricsLog(tmp_path / "a.jsonl")
    log._file = disk = FullDisk(log._file, room)
    for record in RECORDS:
        log.write(record)
    full = "a.jsonl not written: the disk is full" in capsys.readouterr().out
    assert full == (room < 250)
    if full:
        with pytest.raises(UserError, match="the disk is full"):
            log.sync()
        assert read_metrics(tmp_path / "a.jsonl") == RECORDS[: len(read_metrics(tmp_path / "a.jsonl"))]
    disk.room = 10**6
    log.sync()
    log.close()
    assert read_metrics(tmp_path / "a.jsonl") == RECORDS


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], [], [{"iter_num": 1, "loss": 2.0, "grad_norm": None}]])
def test_curves_are_drawn(tmp_path, records):
    assert draw_curves(tmp_path / "a.png", records, "story5000")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_without_matplotlib_there_are_no_curves(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not metrics.draw_curves(tmp_path / "a.png", RECORDS, "")
    assert not list(tmp_path.iterdir())
