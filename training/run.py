"""The state of a run between two steps: what a checkpoint stores, and how a resumed run restores it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from common.checkpoint import random_states, set_random_states
from common.cli import UserError
from common.lora import trained_weights
from model import GPT
from training.adapter_config import adapter_of
from training.config import RunConfig
from training.metrics import PART_LOSS
from training.mixture import mixture_name, model_format
from training.parallel import gather, is_first, job_name, on_first, rank, seed_dropout, world_size
from training.run_files import RunFiles
from training.sharding import gather_full, shard_state


class Run:
    """The counters, losses and resume point of a run, and saving them with the weights.

    A checkpoint always holds the last complete step. Between two steps, `mark` stores the position in the data and the
    states of the random generators; inside `updating`, the weights belong to neither step and are not saved. `record`
    is what remains to be logged, and perhaps evaluated, for the last step; if the run ends before that, it is done on
    --resume. Every process has a Run; only the first one writes files.
    """

    FACTS = ("iter_num", "tokens_seen", "skipped_steps", "train_loss", "val_loss", "best_val_loss", "record")

    def __init__(
        self,
        config: RunConfig,
        model: GPT,
        optimizers: Sequence[Optimizer],
        scaler: torch.amp.GradScaler,
        data: Mapping[str, Any],
        tokenizer: Mapping[str, Any],
        files: RunFiles,
    ):
        self.config, self.model, self.optimizers, self.scaler = config, model, optimizers, scaler
        self.data, self.tokenizer, self.files = data, tokenizer, files
        self.started, self.elapsed_s = time.perf_counter(), 0.0
        self.iter_num = self.tokens_seen = self.skipped_steps = 0
        self.train_loss: float | None = None
        self.val_loss: float | None = None
        self.best_val_loss: float | None = None
        self.val_losses: dict[str, float] = {}  # of a mixture's parts
        self.reference: str | None = None  # the digest of DPO's reference log probabilities
        self.record: dict | None = {"iter_num": 0}
        self.resume_point: dict[str, Any] = {}
        self.saved_path: Path | None = None  # the last good state on the disk, and its iteration
        self.saved_iter: int | None = None
        self.is_updating = False

    # --- between and in steps ---

    def mark(self, position: Mapping[str, int]) -> None:
        """Store the position in the data and the states of the random generators, between two steps."""
        self.resume_point = {"position": dict(position), "random": random_states(self.config.device)}

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """The context in which the weights change; after an error in it there is no consistent state to save."""
        self.is_updating = True
        yield
        self.is_updating = False

    def complete_step(self, n_tokens: int, position: Mapping[str, int], is_skipped: bool) -> None:
        """Count the step just done; `position` is the position in the data after it."""
        self.iter_num += 1
        self.tokens_seen += n_tokens
        self.skipped_steps += is_skipped
        self.mark(position)
        self.record = {"iter_num": self.iter_num}

    def write_record(self, more: Mapping[str, float] | None = None) -> None:
        """Log the record of the last step together with `more`, if there is anything to log."""
        record = {**(self.record or {}), **(more or {})}
        if len(record) > 1:
            elapsed_s = round(self.total_elapsed_s(), 3)
            self.files.write_record({**record, "tokens_seen": self.tokens_seen, "elapsed_s": elapsed_s})
        self.record = None

    def is_best(self, val_loss: float) -> bool:
        """Whether the loss is smaller than in every earlier evaluation."""
        return self.best_val_loss is None or val_loss < self.best_val_loss

    def finish_evaluation(
        self, val_loss: float, val_losses: dict[str, float], others: Mapping[str, float] | None = None
    ) -> None:
        """Log the validation loss, that of each part of a mixture, and `others`; then save and draw the curves.

        If the checkpoint cannot be written, print a warning and let training continue.
        """
        before, is_best = (self.record, self.val_loss, self.best_val_loss, self.val_losses), self.is_best(val_loss)
        self.val_loss, self.best_val_loss = val_loss, val_loss if is_best else self.best_val_loss
        self.val_losses = val_losses if len(val_losses) > 1 else {}
        measured = {f"val_{name}": value for name, value in (others or {}).items()}
        measured |= {f"{PART_LOSS}{name}": loss for name, loss in self.val_losses.items()}
        self.write_record({"val_loss": val_loss, **measured})
        try:
            self.save(is_best, keep=self.config.keep > 0)
        except UserError as error:
            self.best_val_loss = before[2]  # still that of the -best file
            print(f"warning: {error}; training continues, and the last checkpoint is unchanged")
            return
        except BaseException:  # a resumed run evaluates again
            self.record, self.val_loss, self.best_val_loss, self.val_losses = before
            raise
        self.files.draw_curves()

    # --- saving ---

    def total_elapsed_s(self) -> float:
        """Seconds that the run has taken, including those before a resume."""
        return self.elapsed_s + time.perf_counter() - self.started

    def info(self) -> dict[str, Any]:
        """The plain facts that go into the checkpoint."""
        adapter = adapter_of(dataclasses.asdict(self.config))
        return {
            "dataset": mixture_name(self.config.dataset),
            "format": model_format(self.data["format"]),
            "data": self.data,
            "tokenizer": self.tokenizer,
            "config": dataclasses.asdict(self.config),
            "elapsed_s": self.total_elapsed_s(),
            "val_losses": self.val_losses,
            "job": job_name(),
            **({"adapter": dataclasses.asdict(adapter)} if adapter else {}),
            **({"reference": self.reference} if self.reference else {}),
            **{name: getattr(self, name) for name in self.FACTS},
        }

    def save(self, is_best: bool = False, keep: bool = False) -> None:
        """Write the last complete step to the run's checkpoint. Raises UserError if that fails."""
        weights = gather_full(trained_weights(self.model))
        optimizers = gather_full([optimizer.state_dict() for optimizer in self.optimizers])
        training = {"optimizers": optimizers, "scaler": self.scaler.state_dict(), **self.resume_point}
        if world_size() > 1:
            states = gather(self.resume_point["random"])
            training["random_of_others"] = states and states[1:]
        on_first(lambda: self.files.write_checkpoint(self.model, self.info(), training, weights, is_best, keep))
        self.saved_path, self.saved_iter = self.files.path, self.iter_num

    def save_at_end(self) -> None:
        """Save when the run stops, unless the last evaluation did. Raises UserError if that fails."""
        if (self.saved_path, self.saved_iter) != (self.files.path, self.iter_num):
            self.save()

    def rescue(self) -> None:
        """After an error in a step, save the state before that step, unless the weights were already changing.

        With several processes this is impossible: the others, whose shards are needed, do not know about the error.
        """
        path = self.files.path
        if world_size() > 1:
            print(f"an error in one of {world_size()} processes: {path} is unchanged")
            return
        if self.is_updating:
            print(f"the error occurred while the weights were being updated: {path} is unchanged")
            return
        try:
            self.save()
        except UserError as error:
            print(f"warning: {error}")
        else:
            print(f"saved iteration {self.iter_num}, the last complete one, as {path}")

    # --- resuming ---

    def restore(self, checkpoint: Mapping[str, Any], path: str) -> dict[str, int]:
        """Restore the state of the checkpoint loaded from `path`, except the weights; returns the position in the data.

        The optimizers keep their new settings, which the command line may have changed.
        """
        info, training = checkpoint["info"], checkpoint["training"]
        for optimizer, state in zip(self.optimizers, training["optimizers"], strict=True):
            # Copied: on a CPU the loaded tensors are views of the file.
            own = copy.deepcopy(state["state"]) if self.config.device == "cpu" else state["state"]
            own = shard_state(own, optimizer)
            optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
        if training["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(training["scaler"])
        for name in self.FACTS:
            setattr(self, name, info[name])
        if info["config"].get("val_rows", self.config.val_rows) != self.config.val_rows:
            print("resume: the validation rows have changed, so the best loss is reset")
            self.best_val_loss = None
        self.elapsed_s, self.val_losses = info["elapsed_s"], info.get("val_losses", {})
        self.saved_path, self.saved_iter = Path(path), self.iter_num
        self._restore_random_states([training["random"], *training.get("random_of_others", ())])
        return training["position"]

    def _restore_random_states(self, states: list[dict]) -> None:
        if world_size() == len(states) or is_first():
            set_random_states(states[rank()], self.config.device)
        else:  # a different number of processes than before: new dropout in all but the first
            seed_dropout(self.config.seed, self.iter_num)
