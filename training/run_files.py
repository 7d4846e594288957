"""The files of a run: `<name>.pt`, `<name>-best.pt`, `<name>.jsonl`, `<name>.png`, `<name>.lock`.

Nothing that another run wrote is ever overwritten, and a checkpoint is either complete or absent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.checkpoint import copy_checkpoint, keep_newest_files, read_info, save_checkpoint
from common.cli import UserError
from common.files import FileLock, remove_stale_temporaries, require_free_space, write_error
from model import GPT
from training.config import RunConfig
from training.metrics import MetricsLog, TensorBoard, draw_curves, read_metrics, require_tensorboard
from training.parallel import on_first


class RunFiles:
    """The files of the run `config.name` in `config.out_dir`, which `claim` locks. Only the first process opens them.

    `resumed` is the info of the checkpoint that the run continues, or None. `draw` draws the loss curves.
    """

    def __init__(
        self, config: RunConfig, resumed: Mapping[str, Any] | None = None, draw: Callable[..., object] = draw_curves
    ):
        self.config, self.resumed, self.draw = config, resumed, draw
        self.folder = Path(config.out_dir)
        self.path = self._file(".pt")
        self.log: MetricsLog | None = None

    def _file(self, kind: str) -> Path:
        return self.folder / f"{self.config.name}{kind}"

    # --- at the start ---

    @contextlib.contextmanager
    def claim(self, checkpoint_bytes: int) -> Iterator[None]:
        """Create the folder, lock the run, check the free space, clean up after killed runs, and open the metrics log.

        Raises UserError if another run has these files, or if the folder cannot be written or has too little space.
        """
        with contextlib.ExitStack() as stack:
            self.log = on_first(lambda: stack.enter_context(self._claim(checkpoint_bytes)))
            yield

    @contextlib.contextmanager
    def _claim(self, checkpoint_bytes: int) -> Iterator[MetricsLog]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        with FileLock(self._file(".lock"), str(self.path)):
            self._remove_stale_temporaries()
            # The last and the best checkpoint, the kept ones, and one that is being written.
            require_free_space(self.folder, checkpoint_bytes * (3 + self.config.keep), f"the run {self.config.name}")
            self._require_unchanged()
            records = self._records_so_far() if self.resumed else []
            if self.config.tensorboard:
                require_tensorboard()
            self._set_aside()
            board = TensorBoard(self._file("-tensorboard"), records) if self.config.tensorboard else None
            if self.resumed:
                self._inherit_best()
            with contextlib.closing(MetricsLog(self._file(".jsonl"), records, board)) as log:
                yield log

    def _remove_stale_temporaries(self) -> None:
        ours = re.compile(re.escape(self.config.name) + r"(-best|-iter\d+)?\.(pt|png|jsonl)\.\d+\.tmp")
        for path in self.folder.glob(f"{self.config.name}*.tmp"):
            if ours.fullmatch(path.name):
                remove_stale_temporaries(path.with_suffix("").with_suffix(""))

    def _require_unchanged(self) -> None:
        """Raise UserError if another process has continued the checkpoint since this one loaded it."""
        if self.path.is_file() and self._is_source() and read_info(self.path)["iter_num"] != self._resumed_iter:
            raise UserError(f"{self.path} was changed by another run in the meantime; run the same command again")

    def _records_so_far(self) -> list[dict]:
        """The metrics up to the checkpoint that the run continues; later steps are done again."""
        record = self.resumed and self.resumed["record"]
        done = self._resumed_iter if record is None else self._resumed_iter - 1
        source = self._source()
        for path in (source.with_suffix(".jsonl"), source.with_name(f"{self._resumed_name()}.jsonl")):
            if path.is_file():
                return [record for record in read_metrics(path) if record["iter_num"] <= done]
        print(f"note: the metrics of the first {self._resumed_iter} iterations are not next to {source}")
        return []

    def _set_aside(self) -> None:
        """Rename the files of another run with this name."""
        if not self.path.is_file() or self._is_source() or _is_untrained(self.path):
            return
        names = (f"{self.config.name}-previous{number}" for number in itertools.chain([""], itertools.count(2)))
        aside = next(self.folder / name for name in names if not (self.folder / f"{name}.pt").exists())
        if (best := self._file("-best.pt")).is_file():
            copy_checkpoint(best, f"{aside}-best.pt")
        kept = [path.name.removeprefix(self.config.name) for path in self.folder.glob(f"{self.config.name}-iter*.pt")]
        # The checkpoint last: if the run is killed before that, the next one renames what is left.
        for kind in (*kept, "-tensorboard", ".jsonl", ".png", ".pt"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._file(kind), f"{aside}{kind}")
        print(f"{self.path} belongs to another run (--resume would continue it); it is kept as {aside}.pt")

    def _inherit_best(self) -> None:
        """Copy the best checkpoint of the resumed run, if this run continues it under another name."""
        best = self._source().with_name(f"{self._resumed_name()}-best.pt")
        if best.is_file() and best.resolve() != self._file("-best.pt").resolve():
            copy_checkpoint(best, self._file("-best.pt"))

    @property
    def _resumed_iter(self) -> int:
        return self.resumed["iter_num"] if self.resumed else 0

    def _resumed_name(self) -> str:
        """The name of the run that this one continues."""
        info = self.resumed or {}
        return f"{info['dataset']}{info['config']['max_iters']}"

    def _source(self) -> Path:
        return Path(self.config.resume or "")

    def _is_source(self) -> bool:
        """Whether the run continues the checkpoint that it writes."""
        return self.resumed is not None and os.path.samefile(self.path, self._source())

    # --- while it runs ---

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Append a record to the metrics log."""
        if self.log:
            self.log.write(dict(record))

    def write_checkpoint(
        self, model: GPT, info: Mapping[str, Any], training: Mapping, weights: Mapping, is_best: bool, keep: bool
    ) -> None:
        """Write the run's checkpoint and, before it, the log and the requested copies.

        The checkpoint itself comes last: if the run is killed before that, the resumed run writes the others again.
        Raises UserError if a file cannot be written.
        """
        if self.log:
            self.log.sync()
        names = [f"-iter{info['iter_num']:08d}"] * keep + ["-best"] * is_best + [""]
        paths = [self._file(f"{name}.pt") for name in names]
        save_checkpoint(paths[0], model, info, training, weights)
        for path in paths[1:-1]:
            copy_checkpoint(paths[0], path)
        if keep:
            keep_newest_files(self.folder, f"{self.config.name}-iter*.pt", self.config.keep)
        if paths[0] != self.path:
            copy_checkpoint(paths[0], self.path)

    def draw_curves(self) -> None:
        """Draw the logged losses; if the picture cannot be written, print a warning."""
        if self.log is None:
            return
        try:
            self.draw(self._file(".png"), read_metrics(self.log.path), self.config.name)
        except UserError as error:
            print(f"warning: {error}; training continues")


def _is_untrained(path: Path) -> bool:
    """Whether a checkpoint was made before the first step, so that overwriting it loses nothing."""
    try:
        return read_info(path).get("iter_num") == 0
    except UserError:  # unreadable: it may still be valuable, so do not overwrite it
        return False
