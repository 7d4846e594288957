"""Handle errors in the training loop: save the last complete step, then tell the user how to continue."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from common.cli import UserError
from common.device import is_out_of_memory
from training.measurements import Measurements
from training.memory import out_of_memory_error
from training.parallel import lost_process_error, micro_batch_size, world_size
from training.run import Run


@contextlib.contextmanager
def saving_after_errors(run: Run, measurements: Measurements) -> Iterator[None]:
    """After an error in the block, save the last complete step; out of memory and a lost process become a UserError.

    A UserError of the block itself, such as a loss that is not finite, saves nothing: the last checkpoint is better
    than the current weights.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        is_full = is_out_of_memory(error)  # NCCL's error may say both
        if not is_full and (lost := lost_process_error(error, run.saved_path)):
            raise lost from error
        if world_size() == 1:
            measurements.read_pending()
        run.rescue()
        if not is_full:
            raise
        config = run.config
        size = micro_batch_size(config.batch_size, config.gradient_accumulation_steps)
        steps = config.batch_size * config.gradient_accumulation_steps // size
        resume = f"--resume {run.saved_path} " if run.saved_path else ""
        raise out_of_memory_error(size, steps, resume) from error
