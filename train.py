"""Create a GPT-2-style model and train it on a prepared data set.

    python data/prepare-chitchat.py && python train.py --dataset chitchat --preset tiny --max_iters 900
    python train.py --resume models/chitchat900.pt --max_iters 2000
    python train.py --dataset story=0.7,chat=0.3 --batch_size auto
    torchrun --standalone --nproc_per_node=2 train.py --preset gpt2

Three acts: plan what the run does, build the model and its optimizers, and loop. Prints a line every --log_interval
iterations (loss, learning rate, tokens per second, time left), and the validation loss and a sample at each evaluation.
Writes models/{dataset}{max_iters}.pt, and next to it the metrics (.jsonl) and the loss curves (.png).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from common.checkpoint import checkpoint_bytes
from common.cli import given_options, parse_options, run_script
from common.device import allow_tf32, seed_everything, set_determinism
from common.speedups import load_speedups
from common.threads import sleep_while_waiting_if_busy
from exchange.loading import load_checkpoint, load_unmerged, read_info, split_pair
from model import GPT
from training import parallel, resume
from training.batches import Batches
from training.config import RunConfig, make_config
from training.datasets import TrainingData, open_data
from training.failures import saving_after_errors
from training.measurements import Measurements, not_finite_error
from training.memory import move_model
from training.metrics import draw_curves
from training.minutes import fit_minutes
from training.objectives import evaluate_parts, make_objective
from training.optimizers import init_optimizer_states, make_optimizers, set_rates
from training.options import TrainOptions
from training.progress import Clock, Sampler, describe_config, describe_data, describe_end, describe_evaluation
from training.run import Run
from training.run_files import RunFiles
from training.run_model import make_run_model
from training.schedule import schedule
from training.sharding import is_sharded_run, shard_model
from training.signals import StopSignal
from training.speed import iteration_s
from training.step import Objective, clip_gradients, forward_backward, try_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` decides."""

    config: RunConfig
    data: TrainingData
    checkpoint: dict | None  # loaded from what --resume or --init_from names


@dataclasses.dataclass
class Training:
    """What `build` makes and `loop` uses."""

    config: RunConfig
    data: TrainingData
    objective: Objective
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    batches: Batches
    val_batches: dict[str, list]
    run: Run
    measurements: Measurements
    sample: Callable[..., None]


# --- act 1: plan. Wrong options and data are reported here, before anything is built or written ---


def plan(options: TrainOptions, given: dict[str, Any], fast: ModuleType | None) -> Plan | None:
    """Load the checkpoint, open the data and make the configuration; None if the run is already complete."""
    started = time.monotonic()
    options, given = resume.options_after_restart(options, given, read_info)
    checkpoint = None
    if options.resume is not None:
        path = resume.find_checkpoint(options)
        checkpoint = load_unmerged(path)
        resume.require_resumable(checkpoint, path)
        options = resume.resumed_options(options, given, path, checkpoint["info"])
        if resume.print_if_complete(checkpoint["info"], options.max_iters, path):
            return None
    elif options.init_from is not None:
        checkpoint = load_checkpoint(options.init_from, ("info", "model"))
    data = open_data(options.dataset, options.data_dir)
    opening_s = time.monotonic() - started  # without the wait for an answer to the question about the device
    device = parallel.choose_devices(options.device)
    set_determinism(options.deterministic)  # before the first use of CUDA
    allow_tf32()
    speed_up, logits_rows = (fast.speed_up_training, fast.LOSS_CHUNK_ROWS) if fast else (None, None)
    if checkpoint and options.init_from is not None:
        data.require_tokenizer_of(checkpoint["info"], split_pair(options.init_from)[0] or options.init_from)

    def configure(options: TrainOptions) -> RunConfig:
        return make_config(options, given, device, data.facts, checkpoint, speed_up, logits_rows)

    if options.resume is None:
        measure = functools.partial(iteration_s, checkpoint=checkpoint, fast=fast)
        options = fit_minutes(options, device, data.facts, configure, measure, opening_s)
    config = configure(options)
    notes = [f"note: {sentence}" for sentence in data.short_splits(config.block_size)]
    if checkpoint and config.resume:
        resume.require_same_data(data.facts, checkpoint["info"], config.resume)
    print(*describe_data(data.facts), *notes, *describe_config(config, data.facts, options), sep="\n")
    return Plan(config, data, checkpoint)


# --- act 2: build the model, its optimizers and its data, each from the seed or from the checkpoint ---


def build(
    plan: Plan,
    fast: ModuleType | None,
    draw: Callable[..., object] = draw_curves,
    sample: Callable[..., None] | None = None,
) -> Training:
    """Everything that the loop needs, in the state in which training starts or continues.

    `draw` draws the loss curves, and `sample` prints a text by the model.
    """
    config, checkpoint = plan.config, plan.checkpoint
    seed_everything(config.seed)
    source = config.resume or config.init_from or ""
    model = make_run_model(config, checkpoint, source)
    shape = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide"
    print(f"model: {shape}, {model.n_params():,} parameters, {config.dtype}, block size {config.block_size}")
    if fast:
        fast.speed_up_training(model, config.activation_checkpointing, config.residual_dtype)
    model = shard_model(model, config.device) if is_sharded_run(config) else move_model(model, config.device)
    model.train()
    optimizers = make_optimizers(model, config, fast)
    # float16 has a small range: the loss is scaled up so that small gradients do not become zero.
    scaler = torch.amp.GradScaler(config.device.partition(":")[0], enabled=config.dtype == "float16")
    parallel.seed_dropout(config.seed)

    resumed = checkpoint if config.resume else None
    files = RunFiles(config, resumed["info"] if resumed else None, draw)
    run = Run(config, model, optimizers, scaler, plan.data.facts, plan.data.tokenizer.to_info(), files)
    position = run.restore(resumed, source) if resumed else {"epoch": 0, "row": 0}
    objective, run.reference = make_objective(config, plan.data, model, checkpoint)
    rows, val_batches = objective.make_rows()
    return Training(
        config=config,
        data=plan.data,
        objective=objective,
        model=model,
        optimizers=optimizers,
        scaler=scaler,
        batches=Batches(rows, objective.items_per_iter, position),
        val_batches=val_batches,
        run=run,
        measurements=Measurements(run, scaler, objective.metric_names),
        sample=sample or Sampler(lambda: plan.data.tokenizer.enc),
    )


def compile_and_wrap(training: Training, fast: ModuleType | None) -> torch.nn.Module:
    """The module to call in a step, compiled if the configuration says so.

    The model is compiled before DistributedDataParallel wraps it, which could not recover from a failed backward pass.
    """
    config, model, objective = training.config, training.model, training.objective
    n_items = objective.items_per_iter // parallel.world_size()
    batch = [column[:n_items] for column in next(iter(training.val_batches.values()))[0]]
    trial_step = functools.partial(try_step, model, objective, batch, config.device)
    if config.compile and fast:
        fast.compile_training(model, trial_step, parallel.any_process, config.compile_scope)
    return model if is_sharded_run(config) else parallel.average_gradients(model, config.device)


# --- act 3: the loop ---


def loop(training: Training, model: torch.nn.Module, stop: StopSignal) -> int:
    """Train until the last iteration or until a signal asks to stop; returns the signal's number, or 0.

    `model` is the module to call in a step: training.model, perhaps wrapped.
    """
    config, run, measurements, objective = training.config, training.run, training.measurements, training.objective
    optimizers, scaler, batches, facts = training.optimizers, training.scaler, training.batches, training.data.facts
    clock = Clock(training.model, config, facts, objective.tokens_per_iter, run.iter_num, parallel.world_size())
    while True:
        # The learning rate of this iteration: each optimizer's peak times the schedule.
        scale = schedule(run.iter_num, config)
        learning_rate = scale * config.learning_rate
        set_rates(optimizers, config, scale)

        # Evaluate, log and save the last step. `run.record` is None after that, so this happens exactly once, even if
        # the run fails in between and is resumed.
        is_last = run.iter_num >= config.max_iters
        if run.record and (run.iter_num % config.eval_interval == 0 or is_last):
            evaluate_and_save(training, learning_rate)
            clock.restart(run.iter_num)
        elif run.record:
            run.write_record()
        stopped_by = int(parallel.reduce("max", stop.number)[0])  # all processes stop if any of them got the signal
        if is_last or stopped_by:
            return stopped_by

        # Forward and backward over the iteration's rows. A thread prepares the batches ahead of time.
        batch = batches.next()
        step = run.iter_num + 1
        numbers_on_device = forward_backward(model, config, objective, batch, scaler)
        norm_on_device = clip_gradients(training.model, optimizers, scaler, config.grad_clip)
        measurements.add(step, learning_rate, numbers_on_device, norm_on_device)

        # `read` waits for the device, so it is called only for numbers that are needed. It raises if one is not finite.
        is_logged = step % config.log_interval == 0 or step in (1, config.max_iters)
        is_needed = is_logged or step % config.eval_interval == 0 or measurements.every_step
        loss, grad_norm = measurements.read() if is_needed else (0.0, 0.0)

        # Update the weights, unless float16 overflowed: then the step is skipped, and the scaler lowers its factor.
        is_finite = math.isfinite(grad_norm)
        with run.updating():
            if is_finite:
                for optimizer in optimizers:
                    scaler.step(optimizer)
            scaler.update()
            training.model.zero_grad(set_to_none=True)  # None frees the memory until the next backward pass
            run.complete_step(batch[0].size, batches.position, is_skipped=not is_finite)

        if is_logged:
            tokens_per_s = clock.log(step, loss, learning_rate, grad_norm, run.skipped_steps, measurements.others)
            run.record = {"iter_num": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
            run.record |= {"tokens_per_s": tokens_per_s, **measurements.others}


def evaluate_and_save(training: Training, learning_rate: float) -> None:
    """Print the validation loss and a sample of the current model, then save the run."""
    config, data, run, model = training.config, training.data, training.run, training.model
    val_losses, others = evaluate_parts(training.objective, model, training.val_batches)
    val_loss = data.mean_loss(val_losses)
    if not math.isfinite(val_loss):
        raise not_finite_error(run, "validation loss", val_loss, run.iter_num, learning_rate)
    print(describe_evaluation(run.iter_num, val_loss, val_losses, others, run.is_best(val_loss)))
    if run.iter_num and parallel.is_first() and not is_sharded_run(config):  # a shard alone cannot generate
        for kind in data.formats:
            training.sample(model, config, kind != "text", run.iter_num)
    run.finish_evaluation(val_loss, val_losses, others)


# --- the whole run ---


def train(options: TrainOptions, given: dict[str, Any]) -> int:
    """Run the training that `options` describe; returns the exit status (128 + signal if one stopped it).

    `given` holds only the options on the command line: a resumed run changes only these. Under torchrun, every process
    calls this function.
    """
    fast = load_speedups(options.plain)
    if fast:
        fast.keep_freed_memory()  # before the first tensor is allocated
    planned = plan(options, given, fast)
    return run_to_end(build(planned, fast), fast) if planned else 0


def run_to_end(training: Training, fast: ModuleType | None, stop_signal: Callable[[], StopSignal] = StopSignal) -> int:
    """Train, with everything around the loop: the run's files, signals, errors, and saving at the end."""
    config, run = training.config, training.run
    claim = run.files.claim(checkpoint_bytes(training.model))
    with stop_signal() as stop, claim, contextlib.closing(training.batches):
        if config.resume:
            print(f"resume: {config.resume}, iteration {run.iter_num} of {config.max_iters}, as {run.files.path}")
        run.mark(training.batches.position)
        with saving_after_errors(run, training.measurements):
            model = compile_and_wrap(training, fast)
            if not config.resume:  # a resumed run has loaded them
                init_optimizer_states(training.optimizers)
            stopped_by = loop(training, model, stop)
        training.measurements.read_pending()
        run.save_at_end()
    print(describe_end(run, training.data.facts, stopped_by))
    return 128 + stopped_by if stopped_by else 0


def main() -> int:
    options, given = parse_options(TrainOptions, __doc__), given_options(TrainOptions)
    with parallel.join_job():
        status = train(options, given)
    return parallel.leave_job(status)


if __name__ == "__main__":
    sleep_while_waiting_if_busy()
    run_script(main, needs_output=False)  # training continues if its output goes to a full disk
