"""What the steps of a run measure, looked at no more often than needed, and what to say where it is no number."""

from __future__ import annotations

import math
import shlex

import torch
from torch import Tensor

from common.cli import UserError
from training.run import Run


def needed_at_once(config) -> bool:
    """Whether each step's loss and gradient norm are looked at before the weights change.

    On a CPU that costs nothing, and float16 must know whether it overflowed. Elsewhere the device would wait for the
    program at each step: there they are looked at where a line, an evaluation or a save needs them.
    """
    return config.device == "cpu" or config.dtype == "float16"


class Measurements:
    """The steps whose loss and gradient norm nobody has looked at yet; reading them waits for the device."""

    def __init__(self, run: Run, scaler):
        self.run, self.scaler = run, scaler
        self.pending: list[tuple[int, float, Tensor]] = []

    def add(self, iter_num: int, learning_rate: float, numbers: Tensor) -> None:
        """Note a step's loss and gradient norm, (2,) on the device."""
        self.pending.append((iter_num, learning_rate, numbers))

    def read(self) -> tuple[float, float]:
        """Look at all pending steps; returns the last one's loss and gradient norm.

        Raises UserError at the first that is not finite; float16 may overflow while its scaler can scale less.
        """
        values = torch.stack([numbers for _, _, numbers in self.pending]).tolist()
        for (iter_num, learning_rate, _), (loss, grad_norm) in zip(self.pending, values, strict=True):
            if not math.isfinite(loss):
                raise not_finite_error(self.run, "loss", loss, iter_num, learning_rate)
            may_overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
            if not (math.isfinite(grad_norm) or may_overflow):
                raise not_finite_error(self.run, "gradient norm", grad_norm, iter_num, learning_rate)
            self.run.train_loss = loss
        self.pending.clear()
        return loss, grad_norm

    def read_pending(self) -> None:
        """Look at what is pending, if anything is: only a sound state is worth saving."""
        if self.pending:
            self.read()


def not_finite_error(run: Run, what: str, value: float, iter_num: int, learning_rate: float) -> UserError:
    """The sentence for a loss or gradient norm that is not finite.

    The same batch would fail again, so the state to go on from is an earlier one: the last that was saved.
    """
    config = run.config
    last = "none" if run.train_loss is None else f"{run.train_loss:.4f}"
    rates = f"--learning_rate {config.learning_rate / 2:g}"
    if config.optimizer == "muon":
        rates += f" --muon_learning_rate {config.muon_learning_rate / 2:g}"
    remedy = f"start again with {rates}"
    if run.saved_path:
        command = f"python train.py --resume {shlex.quote(str(run.saved_path))} {rates}"
        remedy = f"go on from the last good state, iteration {run.saved_iter}, with: {command}"
    return UserError(
        f"the {what} is {value} in iteration {iter_num} at learning rate {learning_rate:.2e} (last finite loss "
        f"{last}); {remedy}"
    )
