"""The loss and gradient norm of each step, read from the device only when needed, and checked then."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

import torch
from torch import Tensor

from common.cli import UserError
from training.run import Run


class Measurements:
    """The loss and gradient norm of steps that have not been read yet, because reading waits for the device.

    `every_step` says that each step is read before it changes the weights. On a CPU that costs nothing, and float16
    must know whether the step overflowed. Elsewhere the program would wait for the device at every step, so steps are
    read when a log line, an evaluation or a save needs them.
    """

    def __init__(self, run: Run, scaler: torch.amp.GradScaler, names: Sequence[str] = ()):
        self.run, self.scaler, self.names = run, scaler, names
        self.every_step = run.config.device == "cpu" or run.config.dtype == "float16"
        self.pending: list[tuple[int, float, Tensor]] = []
        self.others: dict[str, float] = {}  # the metrics of the step that was read last, by `names`

    def add(self, iter_num: int, learning_rate: float, numbers: Tensor, grad_norm: Tensor) -> None:
        """Keep a step's loss with its other metrics, and its gradient norm, on the device until they are read."""
        self.pending.append((iter_num, learning_rate, torch.cat([grad_norm[None], numbers])))

    def read(self) -> tuple[float, float]:
        """Read all pending steps; returns the last one's loss and gradient norm.

        Raises UserError at the first that is not finite. Under float16 the gradient norm may overflow as long as the
        scaler can still lower its factor.
        """
        values = torch.stack([numbers for _, _, numbers in self.pending]).tolist()
        for (iter_num, learning_rate, _), (grad_norm, loss, *others) in zip(self.pending, values, strict=True):
            if not math.isfinite(loss):
                raise not_finite_error(self.run, "loss", loss, iter_num, learning_rate)
            may_overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
            if not (math.isfinite(grad_norm) or may_overflow):
                raise not_finite_error(self.run, "gradient norm", grad_norm, iter_num, learning_rate)
            self.run.train_loss = loss
            self.others = dict(zip(self.names, others, strict=True))
        self.pending.clear()
        return loss, grad_norm

    def read_pending(self) -> None:
        """Read the pending steps, if there are any: only a state with finite losses is worth saving."""
        if self.pending:
            self.read()


def not_finite_error(run: Run, what: str, value: float, iter_num: int, learning_rate: float) -> UserError:
    """The UserError for a loss or gradient norm that is not finite.

    The same batch would fail again, so the suggested command resumes the last saved state with a smaller learning rate.
    """
    config = run.config
    last = "none" if run.train_loss is None else f"{run.train_loss:.4f}"
    rates = f"--learning_rate {config.learning_rate / 2:g}"
    if config.optimizer == "muon":
        rates += f" --muon_learning_rate {config.muon_learning_rate / 2:g}"
    remedy = f"start again with {rates}"
    if run.saved_path:
        command = f"python train.py --resume {shlex.quote(str(run.saved_path))} {rates}"
        remedy = f"resume the last good state, iteration {run.saved_iter}, with: {command}"
    return UserError(
        f"the {what} is {value} in iteration {iter_num} at learning rate {learning_rate:.2e} (last finite loss "
        f"{last}); {remedy}"
    )
