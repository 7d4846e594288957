"""--minutes: how many iterations fit into that time on this machine; with --preset auto, also which shape and batch.

    options = fit_minutes(options, device, facts, configure, measure, opening_s)

Only the command line is completed here. `make_config` turns it into a RunConfig, as if the user had given the numbers,
so a run is fixed before it starts, and a resumed run measures nothing.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from common.cli import UserError
from common.numbers import duration_in_words, significant
from data.dataset import data_parts
from data.epochs import FITTING_EPOCHS, MIN_FINE_TUNING_ITERS, MIN_ITERS, Portion
from training.config import DEFAULT_BATCH_SIZE, RunConfig
from training.initialization import model_config
from training.memory import model_fits
from training.mixture import portions
from training.options import TrainOptions
from training.parallel import any_process, reduce, world_size
from training.shapes import (
    SHAPES,
    Budget,
    Shape,
    choose_shape,
    fitting_block_size,
    heads_of,
    iters_within,
    longest_block_size,
    n_evaluations,
    rows_per_iter,
)

START_S = 15.0  # to load torch, and to save at the end
MIN_SHARE = 0.5  # at least this fraction of the time is for training, however long starting takes
EVALUATION_SHARE = 1 / 3  # of the work of a training step: the forward pass alone
# What --preset auto times first: small enough to take seconds, large enough to keep the device busy.
REFERENCE, REFERENCE_ON_CUDA = (Shape(4, 4, 128, 256), 4), (Shape(8, 8, 512, 1024), 32)  # with rows
# The recipe for text that --preset auto reads at least this many times.
REPEATED_EPOCHS = 2.5
RECIPE_FOR_REPEATED_TEXT: dict[str, Any] = {
    "schedule": "cosine",
    "min_lr": 0.0,
    "muon_weight_decay": 0.1,
    "embedding_weight_decay": 0.2,
}
DROPOUTS = {6: 0.07, 16: 0.1}  # of text that --preset auto reads at least this many times
FITTING_EPOCHS_WITH_DROPOUT = 24
Configure = Callable[[TrainOptions], RunConfig]
Measure = Callable[[RunConfig, float], float]  # (a run, its mean tokens per document) -> seconds per iteration
Timed = Callable[[RunConfig], float]  # the same for the data of the run


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A run that fits the time."""

    options: TrainOptions
    config: RunConfig
    epochs: float  # of the data set that is repeated the least
    iter_s: float
    total_s: float  # with start and evaluations
    is_limited: bool  # whether the data, not the time, limits the iterations


def fit_minutes(
    options: TrainOptions,
    device: str,
    facts: Mapping[str, Any],
    configure: Configure,
    measure: Measure,
    opening_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> TrainOptions:
    """The options with what --minutes and --preset auto choose; unchanged without them. Prints the choice.

    `facts` are those of the run's data (see `mixture_facts`), `configure` makes a configuration, and `measure` returns
    the seconds per iteration for a configuration and a mean document size. `opening_s` is how long loading a checkpoint
    and the data has taken. Options on the command line take precedence. Raises UserError for options that cannot be
    combined.
    """
    if options.minutes is None and options.preset != "auto":
        return options
    started, time_s, size = clock() - opening_s, _time_s(options), mean_document_size(facts)

    def timed(config: RunConfig) -> float:
        return measure(config, size)

    def planned(chosen: TrainOptions) -> _Plan:
        return _plan(chosen, facts, configure, timed, time_s, lambda: clock() - started)

    if options.preset == "auto":
        shaped = _with_shape(_with_mask(options, facts), device, facts, configure, timed, time_s)
        plan = _with_dropout(planned(shaped), shaped, planned, facts)
        chosen = _with_recipe(plan, facts)
    else:
        plan = planned(options)
        chosen = plan.options
    print(_describe(options, plan))
    if plan.is_limited:
        print(
            f"note: this is less than --minutes {options.minutes:g}, because with more than "
            f"{most_epochs(chosen, facts)} epochs a model mostly memorizes its data; to train longer, replace "
            f"{_replacement(options, chosen)}"
        )
    return chosen


def _plan(
    options: TrainOptions,
    facts: Mapping[str, Any],
    configure: Configure,
    timed: Timed,
    time_s: float,
    elapsed_s: Callable[[], float],
) -> _Plan:
    """The run of a shape and a batch that fits into `time_s`, of which `elapsed_s` has passed once it is timed."""
    iter_s = timed(configure(_for_timing(options)))
    config = configure(dataclasses.replace(options, max_iters=max(1, int(time_s / iter_s))))
    if config.compile:  # because it pays off in this many iterations
        iter_s = timed(config)
    begun_s = START_S + reduce("max", elapsed_s())[0]  # the same in all processes, so that all choose the same
    parts, rows = portions(facts), config.batch_size * config.gradient_accumulation_steps
    eval_s = EVALUATION_SHARE * iter_s * len(parts) * config.val_rows / rows  # each part is evaluated
    within = iters_within(max(MIN_SHARE * time_s, time_s - begun_s), iter_s, eval_s, options.eval_interval)
    limit = most_iters(parts, most_epochs(options, facts), config.block_size, rows, options.init_from is not None)
    iters = min(within, limit)
    total_s = begun_s + iters * iter_s + n_evaluations(iters, options.eval_interval) * eval_s
    return _Plan(
        options=dataclasses.replace(options, max_iters=iters, compile=config.compile),
        config=config,
        epochs=min(part.epochs(iters, config.block_size, rows) for part in parts),
        iter_s=iter_s,
        total_s=total_s,
        is_limited=limit < within,
    )


def _time_s(options: TrainOptions) -> float:
    """The seconds that the run may take. Raises UserError for options that --minutes cannot be combined with."""
    if options.minutes is None:
        raise UserError("--preset auto chooses a model for the time that you have; add it, for example: --minutes 15")
    if options.max_iters is not None:
        raise UserError("--minutes and --max_iters both say how long to train; leave one out")
    if options.objective != "next_token":
        raise UserError(f"--minutes cannot time the steps of --objective {options.objective}; use --max_iters")
    if options.parallel == "fsdp":
        raise UserError("--minutes cannot time the steps of a sharded model (--parallel fsdp); use --max_iters")
    if options.preset == "auto" and options.init_from is not None:
        raise UserError(f"--preset auto chooses a shape, but {options.init_from} already has one; leave --preset out")
    return 60 * options.minutes


def most_epochs(options: TrainOptions, facts: Mapping[str, Any]) -> int:
    """How often a run may read its data; more often with dropout, which was tried on text (see `_with_dropout`)."""
    has_dropout = options.preset == "auto" and is_text(facts) and options.dropout
    return FITTING_EPOCHS_WITH_DROPOUT if has_dropout else FITTING_EPOCHS


def most_iters(parts: list[Portion], epochs: int, block_size: int, rows: int, is_fine_tuning: bool) -> int:
    """The most iterations that a run may have: `epochs` passes over its data, but at least a few steps.

    As without --minutes, the least repeated part of a mixture decides, or with --init_from the most repeated one.
    """
    iters = [epochs / part.epochs(1, block_size, rows) for part in parts]
    if is_fine_tuning:
        return max(MIN_FINE_TUNING_ITERS, math.ceil(min(iters)))
    return max(MIN_ITERS, math.ceil(max(iters)))


def _for_timing(options: TrainOptions) -> TrainOptions:
    """The options of a run that is only timed, without compiling it first."""
    return dataclasses.replace(options, max_iters=1, compile=False, compile_scope="block")


def _replacement(options: TrainOptions, chosen: TrainOptions) -> str:
    """Which options to replace, and with what, for the same run with a given number of iterations."""
    names = [field.name for field in dataclasses.fields(chosen) if field.name not in ("max_iters", "compile")]
    values = {name: getattr(chosen, name) for name in names if getattr(chosen, name) != getattr(options, name)}
    same = "".join(f"--{name} " if value is True else f"--{name} {value} " for name, value in values.items())
    return f"{'--preset auto ' * (options.preset == 'auto')}--minutes {options.minutes:g} with {same}--max_iters N"


def _describe(options: TrainOptions, plan: _Plan) -> str:
    config = plan.config
    shape = f"{config.n_layer} layers x {config.n_embd}, block size {config.block_size}, "
    return (
        f"{'auto: ' + shape if options.preset == 'auto' else 'minutes: '}{plan.options.max_iters:,} iterations of "
        f"{config.tokens_per_iter:,} tokens, {duration_in_words(plan.total_s)} (measured "
        f"{significant(config.tokens_per_iter / plan.iter_s, 2)} tokens/s)"
    )


# --- the shape ---


def _with_shape(
    options: TrainOptions,
    device: str,
    facts: Mapping[str, Any],
    configure: Configure,
    timed: Timed,
    time_s: float,
) -> TrainOptions:
    """The options with the shape and the batch that suit the time."""
    on_cuda, n_vocab = device.startswith("cuda"), facts["n_vocab"]
    shape, rows = REFERENCE_ON_CUDA if on_cuda else REFERENCE
    reference = {**dataclasses.asdict(shape), "batch_size": rows, "gradient_accumulation_steps": world_size()}
    config = configure(_for_timing(dataclasses.replace(options, **reference)))
    flops = time_s * config.tokens_per_iter * shape.flops_per_token(n_vocab) / timed(config)
    budget = Budget(flops, max(part.tokens / part.share for part in portions(facts)), n_vocab)

    def fits(shape: Shape) -> bool:
        model = model_config({**dataclasses.asdict(shape), "n_vocab": n_vocab, "dropout": options.dropout or 0.0})
        given = options.batch_size if isinstance(options.batch_size, int) else None
        # On CUDA the micro-batch shrinks until it fits. All processes choose the same shape.
        return not any_process(not model_fits(model, device, given or (1 if on_cuda else DEFAULT_BATCH_SIZE)))

    best = choose_shape(budget, candidates(options, document_size(facts)), fits)
    chosen = dataclasses.replace(options, **dataclasses.asdict(best))
    if options.batch_size is None and options.gradient_accumulation_steps is None:
        batch = _batch(rows_per_iter(budget.tokens_read(best), best.block_size), on_cuda)
        chosen = dataclasses.replace(chosen, **batch)
    return chosen


def _with_mask(options: TrainOptions, facts: Mapping[str, Any]) -> TrainOptions:
    """The options with attention inside documents for text, unless its losses are to be compared with published ones.

    On stories, it lowers the loss (docs/experiments/presets.md). train.py itself uses the mask only for chat data.
    """
    is_masked = options.document_mask is None and is_text(facts)
    if not is_masked or any(part.get("yardstick") for part in data_parts(facts)):
        return options
    return dataclasses.replace(options, document_mask=True)


def is_text(facts: Mapping[str, Any]) -> bool:
    """Whether all data sets of a run are text."""
    return {part["format"] for part in data_parts(facts)} == {"text"}


def _with_dropout(
    plan: _Plan, options: TrainOptions, planned: Callable[[TrainOptions], _Plan], facts: Mapping[str, Any]
) -> _Plan:
    """A run with dropout if it reads its text often enough even then, otherwise the `plan` without dropout.

    Dropout takes time, and helps only with much repeated text (docs/experiments/presets.md).
    """
    if options.dropout is not None or not is_text(facts) or plan.epochs < min(DROPOUTS):
        return plan
    dropped = planned(dataclasses.replace(options, dropout=min(DROPOUTS.values())))
    fitting = [dropout for epochs, dropout in DROPOUTS.items() if dropped.epochs >= epochs]
    if not fitting:
        return plan
    if max(fitting) != dropped.options.dropout:  # timed again, because it may be compiled for its dropout
        dropped = planned(dataclasses.replace(options, dropout=max(fitting)))
    return dropped


def _with_recipe(plan: _Plan, facts: Mapping[str, Any]) -> TrainOptions:
    """A run's options with what is best for text that is read several times; options on the command line stay.

    In shorter runs, the defaults give a lower loss (docs/experiments/presets.md). AdamW was not tried.
    """
    options = plan.options
    if not is_text(facts) or options.optimizer != "muon" or plan.epochs < REPEATED_EPOCHS:
        return options
    recipe = {name: value for name, value in RECIPE_FOR_REPEATED_TEXT.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **recipe)


def _batch(rows: int, on_cuda: bool) -> dict[str, Any]:
    """The options for `rows` rows per iteration: on CUDA in the largest micro-batches that fit."""
    size = min(rows, DEFAULT_BATCH_SIZE)
    steps = math.ceil(rows / size / world_size()) * world_size()
    is_default = on_cuda and size == DEFAULT_BATCH_SIZE
    return {"batch_size": "auto" if is_default else size, "gradient_accumulation_steps": steps}


def document_size(facts: Mapping[str, Any]) -> int:
    """The block size that suits the documents of the data: a row should hold two of them.

    Conversations are packed into rows, and text is cut into rows, which leaves about half of the documents whole.
    """
    return fitting_block_size(2 * mean_document_size(facts))


def mean_document_size(facts: Mapping[str, Any]) -> float:
    """The mean number of tokens per document, of the data set in which it is largest; 0 if it is not known."""
    splits = [part["splits"]["train"] for part in data_parts(facts)]
    return max((split["tokens"] / split["documents"] for split in splits if split.get("documents")), default=0.0)


def candidates(options: TrainOptions, block_size: int) -> list[Shape]:
    """The SHAPES, changed as the command line says; their blocks are no longer than `block_size`."""
    made = []
    for shape in SHAPES:
        n_embd = options.n_embd or shape.n_embd
        n_head = options.n_head or heads_of(n_embd)
        if n_embd % n_head == 0:
            block = options.block_size or min(block_size, longest_block_size(n_embd))
            made.append(Shape(options.n_layer or shape.n_layer, n_head, n_embd, block))
    if not made:
        raise UserError(
            f"--n_head {options.n_head} does not divide a width that --preset auto could choose; leave it out"
        )
    return list(dict.fromkeys(made))
