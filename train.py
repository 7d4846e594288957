"""Create a GPT-2-style model and train it on a prepared data set.

    python data/prepare-chitchat.py && python train.py --dataset chitchat --preset tiny --max_iters 900

Prints the device, the model's size, a line every --log_interval iterations (loss, learning rate, tokens a second,
time left) and, at each evaluation, the validation loss and a sample. The run is kept in models/{dataset}{max_iters}.pt;
its metrics lie beside it as .jsonl and, as loss curves, .png.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import math
import shlex
import time
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import checkpoint_bytes, random_states, set_random_states
from common.cli import UserError, given_options, option, parse_options, run_script
from common.device import allow_tf32, autocast, choose_dtype, has_cpp_compiler, seed_everything, set_determinism
from data.dataset import open_dataset, require_length
from fast.allocator import give_back_freed_memory, keep_freed_memory
from model import GPT, IGNORED, PRESETS
from training.batches import Batches, fixed_batches
from training.measurements import Measurements, needed_at_once, not_finite_error
from training.memory import check_memory, fit_batch_size, is_out_of_memory, move_model, out_of_memory_error
from training.mixture import MixedRows, data_parts, mixture_facts, mixture_name, parse_mixture
from training.optimizers import init_optimizer_states, make_optimizers, set_rates
from training.parallel import ALONE, World, averaging, full_tensor, join_job, shard_model
from training.progress import Clock, describe_data, describe_parts, print_sample
from training.rows import ChatRows, TextRows
from training.run import Run, StopSignal
from training.start import (
    after_restart,
    check_same_data,
    is_complete,
    load_resumable,
    make_model,
    resume_config,
    shape_of_checkpoint,
)
from training.targets import document_numbers


def number_or_auto(word: str) -> int | str:
    """A number on the command line, or the word "auto"."""
    try:
        return word if word == "auto" else int(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number or auto, not {word!r}") from error


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What a run is made of; a value of None is chosen by `resolve` for the device and the model."""

    dataset: str = option(
        "story",
        "data set to train on: story, dailydialog, chat, chitchat or any prepared name; or several with their shares "
        "of the rows, story=0.7,chat=0.3",
    )
    max_iters: int = option(5000, "iterations in all; the schedule scales with it")
    seed: int = option(1337, "seed of the weights and of the data's order")

    preset: str | None = option(None, "model size (default: gpt2 on CUDA, small elsewhere)", choices=tuple(PRESETS))
    n_layer: int | None = option(None, "layers (default: the preset's)")
    n_head: int | None = option(None, "attention heads (default: the preset's)")
    n_embd: int | None = option(None, "width (default: the preset's)")
    block_size: int | None = option(None, "context length in tokens (default: the preset's)")
    dropout: float = option(0.0, "dropout probability")

    batch_size: int | str | None = option(
        None,
        "sequences in a micro-batch, or auto: the most that fit, of as many an iteration (default: 16, on CUDA fewer "
        "where 16 do not fit)",
        type=number_or_auto,
        metavar="N",
    )
    gradient_accumulation_steps: int | None = option(None, "micro-batches an iteration (default: 8 on CUDA, else 1)")
    loss_on: str | None = option(
        None, "tokens that are targets (default: assistant for chat data, else all)", choices=("assistant", "all")
    )
    document_mask: bool | None = option(
        None, "keep attention inside each document of a row (default: for chat data, unless mixed with text)"
    )

    optimizer: str = option("muon", "muon (hidden matrices; AdamW for the rest) or adamw", choices=("muon", "adamw"))
    learning_rate: float | None = option(None, "AdamW's peak learning rate (default: 3e-3 up to 384 wide, else 6e-4)")
    muon_learning_rate: float = option(0.02, "Muon's peak learning rate")
    min_lr: float | None = option(
        None, "learning rate at the end (default: learning_rate / 10); Muon's falls by the same ratio"
    )
    schedule: str | None = option(
        None,
        "how the learning rates fall after the warm-up (default: cosine for chat data, else wsd)",
        choices=("wsd", "cosine"),
    )
    warmup_iters: int | None = option(None, "iterations of linear warm-up (default: max_iters / 20)")
    weight_decay: float = option(0.1, "decay of the weight matrices under adamw; muon's AdamW part has none")
    muon_weight_decay: float = option(0.01, "decay of the weight matrices under muon")
    grad_clip: float = option(1.0, "largest gradient norm; 0 turns clipping off")

    eval_interval: int | None = option(None, "iterations between evaluations (default: max_iters / 4, at most 250)")
    eval_iters: int = option(20, "validation batches, the same ones each time")
    log_interval: int = option(10, "iterations between lines")
    keep: int = option(0, "also keep the last N checkpoints of evaluations")
    tensorboard: bool = option(False, "also write the metrics for TensorBoard (pip install tensorboard)")

    device: str | None = option(None, "cpu, mps, cuda, cuda:N (default: asks, or takes the best one)")
    dtype: str | None = option(
        None,
        "precision of the matrix work; float32 is TF32 on CUDA (default: the device's best)",
        choices=("float32", "bfloat16", "float16"),
    )
    compile: bool | None = option(
        None, "use torch.compile (default: on CUDA, and from 200 iterations on a CPU with g++)"
    )
    activation_checkpointing: bool = option(
        False, "keep less for the backward pass and compute it again: less memory, up to a third more work"
    )
    parallel: str = option(
        "ddp",
        "under torchrun: ddp (each process holds the whole model) or fsdp (a piece of it)",
        choices=("ddp", "fsdp"),
    )
    deterministic: bool = option(False, "make CUDA repeat itself exactly, at some cost in speed")
    data_dir: str = option("data", "folder of the prepared data")
    out_dir: str = option("models", "folder of the checkpoints")
    resume: str | None = option(
        None,
        "go on with a checkpoint (default: that of --dataset and --max_iters)",
        nargs="?",
        const="",
        metavar="PATH",
    )
    init_from: str | None = option(
        None,
        "start from weights: a checkpoint, a folder in the Hugging Face layout, or gpt2, gpt2-medium, gpt2-large, "
        "gpt2-xl from the hub",
        metavar="CHECKPOINT",
    )
    val_rows: int | None = None  # no option: eval_iters x batch_size at the start, whatever batch_size becomes

    def __post_init__(self):
        parse_mixture(self.dataset)  # which refuses what is none
        at_least_one = ("max_iters", "eval_interval", "eval_iters", "log_interval", "batch_size", "block_size")
        for name in (*at_least_one, "gradient_accumulation_steps", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) not in (None, "auto") and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        at_least_zero = ("learning_rate", "muon_learning_rate", "min_lr", "warmup_iters", "weight_decay")
        for name in (*at_least_zero, "muon_weight_decay", "grad_clip", "keep", "seed"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, not {self.seed}")
        if self.init_from == "":
            raise ValueError("init_from must name a checkpoint, not be empty")
        if self.resume is not None and self.init_from is not None:
            raise ValueError("resume and init_from exclude each other: one goes on with a run, the other starts one")

    @property
    def name(self) -> str:
        """What the run's files are called."""
        return f"{mixture_name(self.dataset)}{self.max_iters}"

    @property
    def tokens_per_iter(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.block_size


def resolve(config: TrainConfig, device: str, chat: bool, mixed: bool = False) -> TrainConfig:
    """`config` with a value for every option that was left to the program; `mixed` says that there is text too."""
    on_cuda = device.startswith("cuda")
    preset = config.preset or ("gpt2" if on_cuda else "small")
    shape = PRESETS[preset]
    width = config.n_embd or shape.n_embd
    chosen = {
        "preset": preset,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.n_embd,
        "block_size": shape.block_size,
        "batch_size": 16,
        "gradient_accumulation_steps": 8 if on_cuda else 1,
        "loss_on": "assistant" if chat else "all",
        "document_mask": chat and not mixed,
        "learning_rate": 3e-3 if width <= 384 else 6e-4,
        "schedule": "cosine" if chat else "wsd",
        "warmup_iters": max(1, config.max_iters // 20),
        "eval_interval": max(1, min(250, config.max_iters // 4)),
        "dtype": choose_dtype(config.dtype, device),
        "compile": on_cuda or (device == "cpu" and config.max_iters >= 200 and has_cpp_compiler()),
        "device": device,
    }
    config = dataclasses.replace(
        config, **{key: value for key, value in chosen.items() if getattr(config, key) in (None, "auto")}
    )
    if config.val_rows is None:
        config = dataclasses.replace(config, val_rows=config.eval_iters * config.batch_size)
    if config.min_lr is None:
        config = dataclasses.replace(config, min_lr=config.learning_rate / 10)
    return dataclasses.replace(config, device=device)


def schedule(iter_num: int, config: TrainConfig) -> float:
    """The learning rate of an iteration as a share of its peak: linear warm-up, then down to min_lr.

    "wsd", warm-up, stable, decay: the peak until a fifth of the iterations is left, then down by the square root of the
    part of these that is done ("MiniCPM", Hu et al. 2024, section 4; the root: Haegele et al. 2024, section 3).
    "cosine": half a wave of it ("SGDR", Loshchilov and Hutter 2017, section 3, without restarts).
    """
    if iter_num < config.warmup_iters:
        return (iter_num + 1) / config.warmup_iters
    lowest = min(1.0, config.min_lr / config.learning_rate) if config.learning_rate else 0.0
    if config.schedule == "wsd":
        start = max(config.warmup_iters, round(0.8 * config.max_iters))
        fall = math.sqrt(min(1.0, max(0, iter_num - start) / max(1, config.max_iters - start)))
    else:
        done = min(1.0, (iter_num - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters))
        fall = 0.5 * (1 - math.cos(math.pi * done))
    return 1 - (1 - lowest) * fall


@torch.no_grad()
def evaluate(model: GPT, batches: list, config: TrainConfig, world: World = ALONE) -> float:
    """Mean validation loss in nats a target token over fixed batches of (ids, targets), shared by the processes."""
    model.eval()
    losses, counts = [], []
    for number in range(world.rank, math.ceil(len(batches) / world.size) * world.size, world.size):
        ids, targets = batches[number % len(batches)]
        # A sharded forward pass needs every process: one that has no batch left repeats one that does not count.
        count = int((targets != IGNORED).sum()) if number < len(batches) else 0
        with autocast(config.device, config.dtype):
            x, y, documents = inputs(config, ids, targets)
            _, loss = model(x, y, documents=documents)
        losses.append(loss)
        counts.append(count)
    loss_sum = sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True))
    loss_sum, n_targets = world.sum(loss_sum, sum(counts))
    model.train()
    return loss_sum / max(1, n_targets)


def to_device(device: str, *arrays) -> list[torch.Tensor]:
    """NumPy arrays as tensors on the device; copied to CUDA without waiting."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.startswith("cuda"):
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return [tensor.to(device) for tensor in tensors]


def inputs(config: TrainConfig, ids, targets) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows on the device: ids, targets and, where attention is to stay inside them, the documents' numbers."""
    if not config.document_mask:
        return (*to_device(config.device, ids, targets), None)
    return tuple(to_device(config.device, ids, targets, document_numbers(ids)))


def make_rows(stream, config: TrainConfig, is_chat: bool) -> TextRows | ChatRows:
    """How a stream is cut into rows: chat by whole conversations, text by pieces of block_size."""
    if is_chat:
        return ChatRows(stream, config.block_size, config.seed, config.loss_on, end_pieces=config.document_mask)
    return TextRows(stream, config.block_size, config.seed)


def rows_and_batches(parts: dict, shares: dict, config: TrainConfig) -> tuple[TextRows | ChatRows | MixedRows, dict]:
    """The rows to train on, mixed where there are several parts, and each part's validation batches by its name."""
    rows, val_batches = [], {}
    for name, (streams, info) in parts.items():
        is_chat = info.format == "chat"
        train_rows, val_rows = (make_rows(streams[split], config, is_chat) for split in streams)
        if is_chat:
            n_rows, share = train_rows.start_epoch(0), train_rows.real_token_fraction()
            print(f"rows: {name}'s conversations make {n_rows:,}; {share:.1%} of their places are no padding")
        rows.append(train_rows)
        val_batches[name] = fixed_batches(val_rows, config.batch_size, config.val_rows)
    return (MixedRows(rows, list(shares.values()), config.seed) if len(rows) > 1 else rows[0]), val_batches


def compile_or_eager(model: GPT, config: TrainConfig, ids, targets, world: World = ALONE) -> None:
    """Compile the model by running it once; where that fails, say so and go on without. Changes no state.

    Each process compiles for its micro-batch, before DistributedDataParallel is around the model: that could not go on
    after a backward pass that failed.
    """
    config = world.micro_batches(config)
    ids, targets = (np.resize(rows, (config.batch_size, rows.shape[1])) for rows in (ids, targets))
    states = random_states(config.device)
    start, failure = time.perf_counter(), None
    model.compile_training()
    try:
        forward_backward(model, config, ids, targets).tolist()  # waits for it
    except Exception as error:  # compilers fail in many ways; without one the same work runs, only slower
        if is_out_of_memory(error):
            raise
        failure = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
    if world.largest(failure is not None):
        print(f"warning: torch.compile failed ({failure or 'in another process'}); going on without it")
        model.uncompile()
    else:
        print(f"torch.compile: ready after {time.perf_counter() - start:.1f} s")
    model.zero_grad(set_to_none=True)
    set_random_states(states, config.device)
    gc.collect()  # the compiler leaves hundreds of thousands of objects, here and there in what the step has freed
    give_back_freed_memory()


def forward_backward(
    model: torch.nn.Module, config: TrainConfig, ids, targets, optimizers=(), scaler=None, world: World = ALONE
) -> torch.Tensor:
    """Gradients of one iteration's rows, in micro-batches, clipped; the mean loss a target and their norm, (2,).

    Of several processes each takes its share of the rows, and the gradients and losses are averaged. Nothing here waits
    for the device.
    """
    # The average over the processes is the mean over all targets where each divides by an equal part of their number.
    part = max(1, int((targets != IGNORED).sum())) / world.size
    n_targets = torch.full((), part, device=config.device)  # torch.tensor would wait for the device
    total = torch.zeros((), device=config.device)
    ids, targets = world.share(ids), world.share(targets)
    for first in range(0, len(ids), config.batch_size):
        rows = slice(first, first + config.batch_size)
        x, y, documents = inputs(config, ids[rows], targets[rows])
        with averaging(model, is_last=rows.stop >= len(ids)):
            with autocast(config.device, config.dtype):
                _, loss = model(x, y, n_targets, documents)
            (scaler.scale(loss) if scaler else loss).backward()
        total += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))
    return torch.stack([world.mean(total), grad_norm])


def fit_micro_batch(model: GPT, config: TrainConfig, given: dict, world: World) -> TrainConfig:
    """`config` with the micro-batch that fits: the largest with --batch_size auto, by default on CUDA at most 16.

    A number that the command line gives stays, and so does the one of a run that is resumed.
    """
    is_auto = given.get("batch_size") == "auto"
    if not is_auto:
        check_memory(model, config, world)
    if not is_auto and ("batch_size" in given or config.resume is not None or not config.device.startswith("cuda")):
        return config
    if world.size > 1 and config.parallel == "fsdp":
        if is_auto:
            raise UserError("--batch_size auto cannot try sizes with --parallel fsdp; give a number")
        return config
    states = random_states(config.device)
    batch_size, steps = fit_batch_size(model, config, forward_backward, world, None if is_auto else config.batch_size)
    set_random_states(states, config.device)
    if is_auto or batch_size != config.batch_size:
        kind = "auto" if is_auto else f"the default of {config.batch_size} does not fit"
        print(f"batch size ({kind}): {batch_size} x {steps} sequences, {config.tokens_per_iter:,} tokens an iteration")
    return dataclasses.replace(config, batch_size=batch_size, gradient_accumulation_steps=steps)


def train(config: TrainConfig, given: dict, world: World = ALONE) -> int:
    """Run the training that `config` describes; returns the exit status (128 + signal where one stopped it).

    `given` holds the options that the command line really names, which a resumed run takes over. Each process of
    `world` runs this alike: the first one prints and writes, and what needs all of them is asked of `world`.
    """
    keep_freed_memory()
    config, given = after_restart(config, given, world)
    # What to train: a new model, another run's weights, or a run that goes on. All that can fail, fails before a step.
    saved = None
    if config.resume is not None:
        source = Path(config.resume or f"{config.out_dir}/{config.name}.pt")
        saved = load_resumable(source)
        config = resume_config(config, given, source, saved["info"])
        if is_complete(saved["info"], config.max_iters):
            print(
                f"{source} is complete: iteration {saved['info']['iter_num']} of {config.max_iters}; go on with a "
                "larger --max_iters"
            )
            return 0
    elif config.init_from is not None:
        config = shape_of_checkpoint(config, given)
    if config.optimizer == "muon" and "weight_decay" in given:
        raise UserError("--weight_decay is for --optimizer adamw; with muon use --muon_weight_decay")
    shares = parse_mixture(config.dataset)
    parts = {name: open_dataset(Path(config.data_dir), name) for name in shares}
    facts = mixture_facts({name: info.to_json() for name, (_, info) in parts.items()}, shares)
    is_chat = facts["format"] == "chat"
    formats = dict.fromkeys(part["format"] for part in data_parts(facts))  # each once, in order
    if config.loss_on == "assistant" and "chat" not in formats:
        raise UserError(f"--loss_on assistant: {config.dataset} is text, which has no assistant; leave it out")
    config = resolve(config, world.choose_device(config.device), is_chat, mixed=len(formats) > 1)
    world.micro_batches(config)  # raises UserError where the processes cannot share the work
    for streams, _ in parts.values():
        require_length(streams, config.block_size)
    if saved:
        check_same_data(facts, saved["info"], source)
    for line in describe_data(facts):
        print(line)

    # The model, its optimizers and its data, each from the seed or from the checkpoint.
    set_determinism(config.deterministic)
    allow_tf32()
    seed_everything(config.seed)
    model = make_model(config, saved)
    shape = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide"
    print(f"model: {shape}, {model.n_params():,} parameters, {config.dtype}, block size {config.block_size}")
    model.activation_checkpointing = config.activation_checkpointing
    is_sharded = world.size > 1 and config.parallel == "fsdp"
    model = shard_model(model, config.device) if is_sharded else move_model(model, config.device)
    model.train()
    config = fit_micro_batch(model, config, given, world)
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(config.device.partition(":")[0], enabled=config.dtype == "float16")
    world.seed_dropout(config.seed)
    run = Run(config, model, optimizers, scaler, facts, world)
    position = run.restore(saved) if saved else {"epoch": 0, "row": 0}
    train_rows, val_batches = rows_and_batches(parts, shares, config)
    batches = Batches(train_rows, config.batch_size * config.gradient_accumulation_steps, position)
    del saved

    with StopSignal() as stop, run.claim(checkpoint_bytes(model)) as log, contextlib.closing(batches):
        if config.resume:
            print(f"resume: {config.resume}, iteration {run.iter_num} of {config.max_iters}, goes on as {run.path}")
        run.mark(batches.position)
        clock = Clock(model, config, run.iter_num, world.size)
        measurements = Measurements(run, scaler)
        try:
            if config.compile:
                compile_or_eager(model, config, *next(iter(val_batches.values()))[0], world)
            module = world.wrap(model, config.parallel)
            if not config.resume:
                init_optimizer_states(optimizers)
            clock.restart(run.iter_num)
            while True:
                scale = schedule(run.iter_num, config)
                learning_rate = scale * config.learning_rate
                set_rates(optimizers, config, scale)

                # Evaluate, log and save what the last step made, once: also where a run failed in between.
                is_last = run.iter_num >= config.max_iters
                if run.record and (run.iter_num % config.eval_interval == 0 or is_last):
                    val_losses = {name: evaluate(model, own, config, world) for name, own in val_batches.items()}
                    val_loss = sum(float(shares[name]) * loss for name, loss in val_losses.items())
                    if not math.isfinite(val_loss):
                        raise not_finite_error(run, "validation loss", val_loss, run.iter_num, learning_rate)
                    best = " (best)" if run.iter_num and run.is_best(val_loss) else ""
                    print(f"iter {run.iter_num}: validation loss {val_loss:.4f}{best}{describe_parts(val_losses)}")
                    if run.iter_num and world.is_main and not is_sharded:
                        for kind in formats:
                            print_sample(model, config, kind == "chat", run.iter_num)
                    run.finish_evaluation(log, val_loss, val_losses)
                    clock.restart(run.iter_num)
                elif run.record:
                    run.write_record(log)
                stopped_by = world.largest(stop.number)  # all stop, whichever was told to
                if is_last or stopped_by:
                    break

                ids, targets = batches.next()
                step = run.iter_num + 1
                numbers = forward_backward(module, config, ids, targets, optimizers, scaler, world)
                measurements.add(step, learning_rate, numbers)
                is_logged = step % config.log_interval == 0 or step in (1, config.max_iters)
                is_sound = True
                if is_logged or step % config.eval_interval == 0 or needed_at_once(config):
                    loss, grad_norm = measurements.read()
                    is_sound = math.isfinite(grad_norm)

                with run.updating():
                    if is_sound:  # else float16 overflowed: no optimizer steps, and the scaler scales less
                        for optimizer in optimizers:
                            scaler.step(optimizer)
                    scaler.update()
                    model.zero_grad(set_to_none=True)
                    run.complete_step(ids.size, batches.position, is_skipped=not is_sound)
                    if is_logged:
                        run.record |= {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
                if is_logged:
                    tokens_per_s = clock.log(run.iter_num, loss, learning_rate, grad_norm, run.skipped_steps)
                    run.record["tokens_per_s"] = tokens_per_s
        except UserError:  # such as a loss that is not finite: the last checkpoint is better than what the weights are
            raise
        except BaseException as error:
            is_full = is_out_of_memory(error)
            if not is_full and (lost := world.lost_process_error(error, run.saved_path)):
                raise lost from error
            if world.size == 1:
                measurements.read_pending()
            run.rescue(log)
            if is_full:
                tried = world.micro_batches(config)
                raise out_of_memory_error(tried, f"--resume {run.saved_path} " if run.saved_path else "") from error
            raise
        measurements.read_pending()
        run.save_at_end(log)
        if stopped_by:
            launcher = "python" if world.size == 1 else "torchrun ..."
            command = f"{launcher} train.py --resume {shlex.quote(str(run.path))}"
            print(f"stopped at iteration {run.iter_num}; go on with: {command}")
            return 128 + stopped_by
        best = "no best one kept" if run.best_val_loss is None else f"best validation loss {run.best_val_loss:.4f}"
        next_command = f"python gen.py {shlex.quote(str(run.path))}{' --chat' if is_chat else ''}"
        print(f"done: {run.path}, {best}; next: {next_command}")
    return 0


def main() -> int:
    config, given = parse_options(TrainConfig, __doc__), given_options(TrainConfig)
    with join_job() as world:
        status = train(config, given, world)
    return world.leave(status)


if __name__ == "__main__":
    run_script(main, needs_output=False)  # a log on a full disk is no reason to stop training
