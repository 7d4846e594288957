"""A run's metrics: one JSON line per logged iteration, and the loss curves as a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import atomic_write, write_error

PART_LOSS = "val_loss/"  # followed by the name of a mixture's part, the key of its validation loss in a record


class MetricsLog:
    """Appends records, each a dict with "iter_num", to a file that starts with `records`.

    Records that cannot be written because the disk is full are buffered and written as soon as there is space, so the
    log has no gaps. `board` gets the same records.
    """

    def __init__(self, path: Path, records: Iterable[dict] = (), board: TensorBoard | None = None):
        self.path, self._board = path, board
        with atomic_write(path, "wb") as file:
            file.writelines(map(_line, records))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, PTH123
        self._unwritten = b""

    def write(self, record: dict) -> None:
        """Append a record and write it to the file; if that fails, print a warning and keep the record."""
        self._unwritten += _line(record)
        if self._board:
            self._board.write(record)
        try:
            self._flush()
        except OSError as error:
            print(f"warning: {write_error(self.path, error)}; training continues, and the records are written later")

    def _flush(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]  # perhaps only a part of it

    def sync(self) -> None:
        """Wait until all records are on the disk, before a checkpoint that relies on them. Raises UserError."""
        try:
            self._flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._board:
            self._board.close()


class TensorBoard:
    """Copies a run's records into event files for TensorBoard, in a folder that starts with `records`.

    Raises UserError if the package is missing.
    """

    def __init__(self, folder: Path, records: Iterable[dict] = ()):
        summary_writer = require_tensorboard()
        try:
            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()
            self._writer = summary_writer(folder)
        except OSError as error:
            raise write_error(folder, error) from error
        for record in records:
            self.write(record)

    def write(self, record: dict) -> None:
        """Add every number of a record at its iteration."""
        for name, value in record.items():
            if name != "iter_num" and value is not None:
                self._writer.add_scalar(name, value, record["iter_num"])

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()


def require_tensorboard() -> type:
    """TensorBoard's writer of event files. Raises UserError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package; run: pip install tensorboard") from error
    return SummaryWriter


def _line(record: dict) -> bytes:
    """A record as a line of JSON, in which a number that is not finite becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def read_metrics(path: Path) -> list[dict]:
    """The records of a log, without lines that a killed run or a power cut left unfinished."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a kill in the middle of a write
                continue
            if isinstance(record, dict) and isinstance(record.get("iter_num"), int):
                records.append(record)
    return records


def draw_curves(path: Path, records: list[dict], title: str) -> bool:
    """Draw loss, learning rate and gradient norm over the iterations as a PNG; False if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
    except ImportError:
        return False
    figure = Figure(figsize=(8, 7), layout="constrained", dpi=110)
    losses, rates, norms = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    parts = dict.fromkeys(key for record in records for key in record if key.startswith(PART_LOSS))
    dashed: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 3}
    curves: tuple[tuple[Any, str, str | None, dict[str, Any]], ...] = (
        (losses, "loss", "training", {"color": "tab:blue", "alpha": 0.7, "linewidth": 1}),
        (losses, "val_loss", "validation", {"color": "tab:orange", "marker": "o", "markersize": 3}),
        *((losses, key, f"validation, {key.removeprefix(PART_LOSS)}", dashed) for key in parts),
        (rates, "learning_rate", None, {"color": "tab:green"}),
        (norms, "grad_norm", None, {"color": "tab:red", "linewidth": 1}),
    )
    for axes, key, label, style in curves:
        points = [(record["iter_num"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    losses.set_title(title)
    is_of_pairs = any("reward_margin" in record for record in records)
    losses.set_ylabel("loss (nats per pair)" if is_of_pairs else "loss (nats per token)")
    if losses.lines:
        losses.legend()
    rates.set_ylabel("learning rate")
    norms.set_ylabel("gradient norm")
    norms.set_yscale("log")
    is_wide = norms.dataLim.y1 > 8 * norms.dataLim.y0
    norms.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_wide else MaxNLocator(4))
    norms.yaxis.set_major_formatter("{x:g}")
    norms.yaxis.set_minor_locator(NullLocator())
    norms.set_xlabel("iteration")
    for axes in (losses, rates, norms):
        axes.grid(alpha=0.3)
    figure.align_ylabels()
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
    return True
