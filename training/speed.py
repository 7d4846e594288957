"""How long an iteration takes on this machine: a few real steps of a throwaway model, timed before a run starts."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from types import ModuleType

import torch

from common.device import autocast, empty_cache, is_out_of_memory
from model import GPT, GPTConfig
from training.adapter_config import adapter_of
from training.config import RunConfig
from training.frozen_model import trial_model
from training.initialization import model_config
from training.memory import out_of_memory_error
from training.optimizers import init_optimizer_states, make_optimizers
from training.parallel import any_process, micro_batch_size, reduce, world_size

MIN_STEPS, MIN_SECONDS = 3, 2.0  # steps and seconds that are timed, after a warm-up step


def iteration_s(
    config: RunConfig,
    document_size: float = 0.0,
    checkpoint: dict | None = None,
    fast: ModuleType | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The seconds that an iteration of a run takes, in its slowest process, without evaluations.

    `document_size` is the mean number of tokens per document (0: unknown); with attention inside documents, rows of
    shorter documents take less time. `checkpoint` is what the run starts from, and `fast` the package of that name, if
    the run uses it. What is compiled here does not have to be compiled again. Raises UserError if a step does not fit
    into memory.
    """
    size = micro_batch_size(config.batch_size, config.gradient_accumulation_steps)
    n_micro_batches = math.ceil(config.batch_size * config.gradient_accumulation_steps / world_size() / size)
    try:
        batch_s, update_s = _time_steps(config, size, document_size, checkpoint, fast, clock)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory_error(size, config.batch_size * config.gradient_accumulation_steps // size) from error
    empty_cache(config.device)
    return reduce("max", n_micro_batches * batch_s + update_s)[0]


def _time_steps(
    config: RunConfig,
    size: int,
    document_size: float,
    checkpoint: dict | None,
    fast: ModuleType | None,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """The seconds of a micro-batch's forward and backward pass, and of an update of the weights: medians."""
    fields = dataclasses.asdict(config)
    shape = model_config(fields, checkpoint)
    model = trial_model(shape, adapter_of(fields), config.device, config.dtype).train()
    if fast:
        fast.speed_up_training(model, config.activation_checkpointing, config.residual_dtype)
    forward_backward = _micro_batch(model, shape, config, size, document_size)
    if config.compile and fast:
        fast.compile_training(model, forward_backward, any_process, config.compile_scope)
    optimizers = make_optimizers(model, config, fast)
    init_optimizer_states(optimizers)
    times: list[tuple[float, float]] = []
    first = clock()
    while len(times) <= MIN_STEPS or clock() - first < MIN_SECONDS:
        start = clock()
        forward_backward()
        middle = clock()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        optimizers[-1].param_groups[0]["params"][0].sum().item()  # waits for the device
        times.append((middle - start, clock() - middle))
    batches, updates = zip(*times[1:], strict=True)  # the first step also allocates
    return statistics.median(batches), statistics.median(updates)


def _micro_batch(
    model: GPT, shape: GPTConfig, config: RunConfig, size: int, document_size: float
) -> Callable[[], None]:
    """A function that runs the forward and backward pass of `size` rows of random ids, in documents of one size."""
    ids = torch.randint(shape.n_vocab, (size, shape.block_size), device=config.device)
    documents = positions = None
    if config.document_mask:
        index = torch.arange(shape.block_size, device=config.device).expand_as(ids)
        length = max(1, round(document_size)) if document_size else shape.block_size
        documents, positions = index // length, index % length

    def forward_backward() -> None:
        with autocast(config.device, config.dtype):
            _, loss = model(ids, ids, documents=documents, positions=positions)
        loss.backward()
        loss.item()  # waits for the device

    return forward_backward
