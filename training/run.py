"""A run's state and files: what is saved and when, what a resume takes over, and how a run stops."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from torch.optim import Optimizer

from common.checkpoint import (
    copy_checkpoint,
    prune_kept,
    random_states,
    read_info,
    save_checkpoint,
    set_random_states,
)
from common.cli import UserError
from common.files import FileLock, remove_stale_temporaries, require_free_space, write_error
from model import GPT
from training.metrics import PART_LOSS, MetricsLog, TensorBoard, draw_curves, read_metrics, require_tensorboard
from training.mixture import mixture_name
from training.parallel import ALONE, World, is_main_process, shard_state


class StopSignal:
    """Notes SIGINT, SIGTERM and SIGHUP so that the step in hand can end; a second Ctrl-C ends the program at once.

    A second SIGTERM changes nothing: `timeout` and batch systems send it twice.
    """

    def __init__(self):
        self.number = 0

    def __enter__(self) -> StopSignal:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else nohup runs us
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.number and number == signal.SIGINT:
            os._exit(128 + number)
        if not self.number:
            self.number = number
            # Not print(): the handler may have interrupted one, which then refuses a second.
            if is_main_process():
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, b"\nstopping after this iteration; Ctrl-C once more leaves at once\n")


class Run:
    """A run's state and its files: `<name>.pt`, `<name>-best.pt`, `<name>.jsonl`, `<name>.png`, `<name>.lock`.

    Saved is always the last complete step: `mark` notes, between two steps, where the data and the generators stand,
    and inside `updating` the weights are half-way between two steps. `record` is what the last step leaves to be
    evaluated and logged; a run that ends in between does that when it is resumed. Of several processes the
    first has the files: elsewhere the log is None, and saving only hands over what the process holds.
    """

    FACTS = ("iter_num", "tokens_seen", "skipped_steps", "train_loss", "val_loss", "best_val_loss", "record")

    def __init__(self, config, model: GPT, optimizers: list[Optimizer], scaler, facts: dict, world: World = ALONE):
        self.world = world
        self.config, self.model, self.optimizers, self.scaler, self.facts = config, model, optimizers, scaler, facts
        self.folder = Path(config.out_dir)
        self.path = self.folder / f"{config.name}.pt"
        self.started, self.elapsed_s = time.perf_counter(), 0.0
        self.iter_num = self.tokens_seen = self.skipped_steps = 0
        self.train_loss = self.val_loss = self.best_val_loss = None
        self.val_losses: dict[str, float] = {}  # of a mixture's parts
        self.record: dict | None = {"iter_num": 0}
        self.resume_point: dict = {}
        self.saved_path = self.saved_iter = None  # the last good state on the disk
        self.is_updating = False
        self._resumed_name: str | None = None  # of the run that this one goes on with

    @contextlib.contextmanager
    def claim(self, checkpoint_bytes: int) -> Iterator[MetricsLog | None]:
        """Make the folder, lock the run, check the space, clean up after dead runs; yields the metrics log.

        Raises UserError where another run has these files, or the folder cannot be written or has too little space.
        """
        with contextlib.ExitStack() as stack:
            yield self.world.on_main(lambda: stack.enter_context(self._claim_files(checkpoint_bytes)))

    @contextlib.contextmanager
    def _claim_files(self, checkpoint_bytes: int) -> Iterator[MetricsLog]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        with FileLock(self._file(".lock"), str(self.path)):
            self._remove_stale_temporaries()
            require_free_space(self.folder, checkpoint_bytes * (3 + self.config.keep), f"the run {self.config.name}")
            self._check_unchanged()
            records = [] if self.config.resume is None else self._records_so_far()
            if self.config.tensorboard:
                require_tensorboard()
            self._set_aside()
            board = TensorBoard(self._file("-tensorboard"), records) if self.config.tensorboard else None
            if self.config.resume is not None:
                self._inherit_best()
            with contextlib.closing(MetricsLog(self._file(".jsonl"), records, board)) as log:
                yield log

    def _remove_stale_temporaries(self) -> None:
        ours = re.compile(re.escape(self.config.name) + r"(-best|-iter\d+)?\.(pt|png|jsonl)\.\d+\.tmp")
        for path in self.folder.glob(f"{self.config.name}*.tmp"):
            if ours.fullmatch(path.name):
                remove_stale_temporaries(path.with_suffix("").with_suffix(""))

    def _check_unchanged(self) -> None:
        """Raise UserError where another process went on with the checkpoint after this one had loaded it."""
        if self.path.is_file() and self._is_source() and read_info(self.path)["iter_num"] != self.iter_num:
            raise UserError(f"{self.path} was changed by another run meanwhile; run the command again")

    def _records_so_far(self) -> list[dict]:
        """The metrics up to the checkpoint that the run goes on with; those behind it are made again."""
        done = self.iter_num if self.record is None else self.iter_num - 1
        source = Path(self.config.resume)
        for path in (source.with_suffix(".jsonl"), source.with_name(f"{self._resumed_name}.jsonl")):
            if path.is_file():
                return [record for record in read_metrics(path) if record["iter_num"] <= done]
        print(f"{source}: no metrics of the first {self.iter_num} iterations beside it")
        return []

    def _set_aside(self) -> None:
        """Keep the files of another run that has this name under other names: nothing is ever written over."""
        if self.path.is_file() and not self._is_source() and not _is_untrained(self.path):
            names = (f"{self.config.name}-previous{number}" for number in itertools.chain([""], itertools.count(2)))
            aside = next(self.folder / name for name in names if not (self.folder / f"{name}.pt").exists())
            if (best := self._file("-best.pt")).is_file():
                copy_checkpoint(best, f"{aside}-best.pt")
            kept = [
                path.name.removeprefix(self.config.name) for path in self.folder.glob(f"{self.config.name}-iter*.pt")
            ]
            # The checkpoint last: only then is it done.
            for kind in (*kept, "-tensorboard", ".jsonl", ".png", ".pt"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self._file(kind), f"{aside}{kind}")
            print(f"{self.path} belongs to another run (--resume would go on with it): kept as {aside}.pt")

    def _inherit_best(self) -> None:
        """A run that goes on under another name takes its best checkpoint along."""
        best = Path(self.config.resume).with_name(f"{self._resumed_name}-best.pt")
        if best.is_file() and best.resolve() != self._file("-best.pt").resolve():
            copy_checkpoint(best, self._file("-best.pt"))

    def _file(self, kind: str) -> Path:
        return self.folder / f"{self.config.name}{kind}"

    def _is_source(self) -> bool:
        """Whether the run goes on with the checkpoint that it writes."""
        return self.config.resume is not None and os.path.samefile(self.path, self.config.resume)

    def mark(self, position: dict) -> None:
        """Note where the data and the generators stand, between two steps."""
        self.resume_point = {"position": dict(position), "random": random_states(self.config.device)}

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """The block changes the weights; after an error in it there is no sound state to save."""
        self.is_updating = True
        yield
        self.is_updating = False

    def complete_step(self, n_tokens: int, position: dict, is_skipped: bool) -> None:
        """Count the step just done; `position` is where the data stands behind it."""
        self.iter_num += 1
        self.tokens_seen += n_tokens
        self.skipped_steps += is_skipped
        self.mark(position)
        self.record = {"iter_num": self.iter_num}

    def total_elapsed_s(self) -> float:
        """Seconds that the run has taken, those before a resume included."""
        return self.elapsed_s + time.perf_counter() - self.started

    def info(self) -> dict:
        """The plain facts that go into the checkpoint."""
        return {
            "dataset": mixture_name(self.config.dataset),
            "format": self.facts["format"],
            "data": self.facts,
            "tokenizer": {"name": self.facts["tokenizer"], "n_vocab": self.facts["n_vocab"]},
            "config": dataclasses.asdict(self.config),
            "elapsed_s": self.total_elapsed_s(),
            "val_losses": self.val_losses,
            "job": self.world.job,
            **{name: getattr(self, name) for name in self.FACTS},
        }

    def save(self, log: MetricsLog | None, is_best: bool = False, keep: bool = False) -> None:
        """Write the last complete step to the run's checkpoint, and before that the log and the copies if asked.

        The checkpoint itself comes last: a run killed before does the rest again when it is resumed.
        Raises UserError where that cannot be done.
        """
        weights = self.world.gathered(self.model.state_dict())
        optimizers = self.world.gathered([optimizer.state_dict() for optimizer in self.optimizers])
        training = {"optimizers": optimizers, "scaler": self.scaler.state_dict(), **self.resume_point}
        if self.world.size > 1:
            training["random_of_others"] = self.world.gathered_from_others(self.resume_point["random"])
        self.world.on_main(lambda: self._write(log, weights, training, is_best, keep))
        self.saved_path, self.saved_iter = self.path, self.iter_num

    def _write(self, log: MetricsLog, weights: dict, training: dict, is_best: bool, keep: bool) -> None:
        log.sync()
        names = [f"-iter{self.iter_num:08d}"] * keep + ["-best"] * is_best + [""]
        paths = [self._file(f"{name}.pt") for name in names]
        save_checkpoint(paths[0], self.model, self.info(), training, weights)
        for path in paths[1:-1]:
            copy_checkpoint(paths[0], path)
        if keep:
            prune_kept(self.folder, f"{self.config.name}-iter*.pt", self.config.keep)
        if paths[0] != self.path:
            copy_checkpoint(paths[0], self.path)

    def is_best(self, val_loss: float) -> bool:
        """Whether no evaluation before gave as small a loss."""
        return self.best_val_loss is None or val_loss < self.best_val_loss

    def finish_evaluation(self, log: MetricsLog | None, val_loss: float, val_losses: dict[str, float]) -> None:
        """Note the validation loss, of a mixture each part's too, log them with the step's record, save, draw curves.

        Where the disk does not take it, say so and let training go on.
        """
        before, is_best = (self.record, self.val_loss, self.best_val_loss, self.val_losses), self.is_best(val_loss)
        self.val_loss, self.best_val_loss = val_loss, val_loss if is_best else self.best_val_loss
        self.val_losses = val_losses if len(val_losses) > 1 else {}
        parts = {f"{PART_LOSS}{name}": loss for name, loss in self.val_losses.items()}
        self.write_record(log, {"val_loss": val_loss, **parts})
        try:
            self.save(log, is_best, keep=self.config.keep > 0)
        except UserError as error:
            self.best_val_loss = before[2]  # that of the file which is called the best
            print(f"warning: {error}; training goes on, and the last checkpoint is as it was")
            return
        except BaseException:  # a resumed run evaluates again
            self.record, self.val_loss, self.best_val_loss, self.val_losses = before
            raise
        if log is None:
            return
        try:
            draw_curves(self._file(".png"), read_metrics(log.path), self.config.name)
        except UserError as error:
            print(f"warning: {error}; training goes on")

    def write_record(self, log: MetricsLog | None, more: dict | None = None) -> None:
        """Log what the last step left, if it is a step to be logged."""
        record = self.record | (more or {})
        if log is not None and len(record) > 1:
            log.write({**record, "tokens_seen": self.tokens_seen, "elapsed_s": round(self.total_elapsed_s(), 3)})
        self.record = None

    def save_at_end(self, log: MetricsLog | None) -> None:
        """Save where the run stops, unless the last evaluation did. Raises UserError where that cannot be done."""
        if (self.saved_path, self.saved_iter) != (self.path, self.iter_num):
            self.save(log)

    def rescue(self, log: MetricsLog | None) -> None:
        """After an error in a step, save the state before that step, unless its weights are half updated.

        Several processes cannot: the others, whose part is needed, know nothing of the error.
        """
        if self.world.size > 1:
            print(f"an error in one of {self.world.size} processes: {self.path} stays as it was")
            return
        if self.is_updating:
            print(f"the error came while the weights were being updated: {self.path} stays as it was")
            return
        try:
            self.save(log)
        except UserError as error:
            print(f"warning: {error}")
        else:
            print(f"saved iteration {self.iter_num}, the last complete one, as {self.path}")

    def restore(self, saved: dict) -> dict:
        """Take over a loaded checkpoint's state, but for the weights; returns the position in the data.

        The optimizers keep their own settings, those of the command line.
        """
        info, training = saved["info"], saved["training"]
        for optimizer, state in zip(self.optimizers, training["optimizers"], strict=True):
            # Copied: on a CPU the loaded tensors are views into the file.
            own = copy.deepcopy(state["state"]) if self.config.device == "cpu" else state["state"]
            own = shard_state(own, optimizer)
            optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
        if training["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(training["scaler"])
        for name in self.FACTS:
            setattr(self, name, info[name])
        if info["config"].get("val_rows", self.config.val_rows) != self.config.val_rows:
            print("resume: the validation rows are others, so the best loss begins anew")
            self.best_val_loss = None
        self.elapsed_s, self.val_losses = info["elapsed_s"], info.get("val_losses", {})  # older runs had no mixtures
        self.saved_path, self.saved_iter = Path(self.config.resume), self.iter_num
        self._resumed_name = f"{info['dataset']}{info['config']['max_iters']}"
        states = [training["random"], *training.get("random_of_others", ())]
        if self.world.size == len(states) or self.world.is_main:
            set_random_states(states[self.world.rank], self.config.device)
        else:  # another number of processes: new dropout for all but the first
            self.world.seed_dropout(self.config.seed, self.iter_num)
        return training["position"]


def _is_untrained(path: Path) -> bool:
    """Whether a checkpoint was made before the first step, so that nothing is lost with it."""
    try:
        return read_info(path).get("iter_num") == 0
    except UserError:  # unreadable, and all the more not ours to write over
        return False
