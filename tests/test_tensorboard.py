"""--tensorboard: every logged number is written, and a resumed run has no gap."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import tiny

from common.cli import UserError
from training.metrics import read_metrics


class FakeWriter:
    """A replacement for tensorboard's SummaryWriter, which need not be installed."""

    written: ClassVar[dict] = {}

    def __init__(self, folder):
        self.file = Path(folder) / f"events.out.tfevents.{len(self.written)}"
        self.file.parent.mkdir(exist_ok=True)
        self.file.touch()
        self.scalars = self.written[self.file] = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.scalars.append("closed")


def test_tensorboard_gets_every_number_of_the_log_and_a_resumed_run_has_no_gap(tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(FakeWriter, "written", {})
    tiny.prepare(tmp_path)
    for settings in ({"tensorboard": True, "max_iters": 4}, {"resume": tmp_path / "text4.pt", "max_iters": 6}):
        assert tiny.run(tmp_path, tmp_path, **settings) == 0
    for iters in (4, 6):
        folder, records = tmp_path / f"text{iters}-tensorboard", read_metrics(tmp_path / f"text{iters}.jsonl")
        (file,) = folder.glob("*")
        expected = [
            (name, value, record["iter_num"])
            for record in records
            for name, value in record.items()
            if name != "iter_num" and value is not None
        ]
        assert FakeWriter.written[file] == [*expected, "closed"] and expected[-1][2] == iters


def test_a_missing_tensorboard_is_reported_before_anything_changes(tmp_path, monkeypatch):
    tiny.prepare(tmp_path)
    assert tiny.run(tmp_path, tmp_path, max_iters=1) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        tiny.run(tmp_path, tmp_path, max_iters=1, tensorboard=True)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys() and after["text1.pt"] == before["text1.pt"]
