"""Data-parallel training under torchrun: who this process is, and what the processes exchange.

    torchrun --standalone --nproc_per_node=2 train.py --dataset story

Each process (a rank) has its own device and computes the gradients of its share of every iteration's rows. With "ddp"
each process holds the whole model and the gradients are averaged ("PyTorch Distributed", Li et al. 2020); "fsdp" is
in training/sharding.py. Without torchrun there is one process, and every function here returns what it was given.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.cli import UserError
from common.device import choose_device, n_cuda_devices

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")

# Longer than anything that the first process does while the others wait, in particular writing a checkpoint.
TIMEOUT = datetime.timedelta(minutes=30)
# Phrases in the errors that NCCL and gloo raise when another process is gone.
LOST_PROCESS_PHRASES = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "gloo", "NCCL", "Socket")


# --- who this process is ---


def rank() -> int:
    """The number of this process in its job."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process among those on the same machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def is_first() -> bool:
    """Whether this process prints and writes files; also correct before the job has been joined."""
    return os.environ.get("RANK", "0") == "0"


def job_name() -> str | None:
    """A name for this start of torchrun that stays the same when it restarts its processes; None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"torchrun's process {os.getppid()}" if run_id == "none" else run_id


def n_restarts() -> int:
    """How often torchrun has restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def choose_devices(requested: str | None) -> str:
    """`choose_device`, except that each of several processes uses its own device and never asks.

    Raises UserError if the machine has fewer devices than processes.
    """
    if world_size() == 1:
        return choose_device(requested)
    count = n_cuda_devices()
    if requested in (None, "auto"):
        requested = "cuda" if count else "cpu"
    kind = str(requested).partition(":")[0]
    if kind == "mps":
        raise UserError("--device mps: all processes would share one device; use --device cpu")
    if kind == "cuda" and 0 < count < local_world_size():
        raise UserError(
            f"torchrun started {local_world_size()} processes on this machine, which has {count} CUDA devices; use "
            f"--nproc_per_node={count} or --device cpu"
        )
    device = choose_device(f"cuda:{local_rank()}" if kind == "cuda" else kind)
    print(f"processes: {world_size()}, this one on {device}")
    return device


# --- joining and leaving ---


@contextlib.contextmanager
def join_job() -> Iterator[None]:
    """Join the processes that torchrun started; without torchrun, do nothing.

    Only the first process prints, and a UserError that all processes raise is printed once. CUDA tensors are exchanged
    through NCCL, CPU tensors through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set but {missing[0]} is not; start several processes with torchrun")
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    # After a restart torchrun's store still holds the addresses of the dead processes (PyTorch issue 135712).
    store = dist.PrefixStore(f"restart {n_restarts()}", store)
    with_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if with_nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    with contextlib.ExitStack() as stack:
        if rank:
            devnull = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
            stack.enter_context(contextlib.redirect_stdout(devnull))
        try:
            yield
        except UserError as error:
            if not _is_first_to_report(store, str(error)):
                raise SystemExit(1) from error
            raise
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def _is_first_to_report(store: dist.Store, sentence: str) -> bool:
    try:
        return store.add(f"reported: {sentence}", 1) == 1
    except RuntimeError:  # the store ended with the process that held it
        return True


def leave_job(status: int) -> int:
    """Return `status`; with several processes, exit with it at once.

    Threads of torch that call into Python while it shuts down would sometimes abort the process.
    """
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


# --- exchanging numbers and objects ---


def reduce(operation: str, *numbers: float) -> list[float]:
    """Each number's "sum", "min" or "max" over the processes."""
    if world_size() == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, so that no device has to be waited for
    dist.all_reduce(values, getattr(dist.ReduceOp, operation.upper()))
    return values.tolist()


def any_process(condition: bool) -> bool:
    """Whether the condition holds in at least one process."""
    return bool(reduce("max", condition)[0])


def average_(value: Tensor) -> Tensor:
    """Average a tensor over the processes, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(value)
        value /= world_size()
    return value


def broadcast(thing: T) -> T:
    """The first process's object, in every process."""
    if world_size() == 1:
        return thing
    things = [thing]
    dist.broadcast_object_list(things)
    return things[0]


def gather(thing: Any) -> list | None:
    """Every process's object, by rank, in the first process; None in the others."""
    if world_size() == 1:
        return [thing]
    things: list | None = [None] * world_size() if is_first() else None
    dist.gather_object(thing, things)
    return things


def on_first(function: Callable[[], T]) -> T | None:
    """Call `function` only in the first process and return its result there; None in the others.

    A UserError is raised in every process.
    """
    if world_size() == 1:
        return function()
    result, message = None, None
    if is_first():
        try:
            result = function()
        except UserError as error:
            message = str(error)
    if (message := broadcast(message)) is not None:
        raise UserError(message)
    return result


# --- dividing an iteration's rows ---


def own_share(rows: np.ndarray) -> np.ndarray:
    """This process's part of an iteration's rows."""
    n_rows = len(rows) // world_size()
    return rows[rank() * n_rows : (rank() + 1) * n_rows]


def own_indices(n: int) -> Iterator[tuple[int, bool]]:
    """The indices below `n` that this process handles, and whether each counts.

    All processes get the same number, because a sharded forward pass needs every process: a process without an index
    left repeats one, which does not count.
    """
    for number in range(rank(), math.ceil(n / world_size()) * world_size(), world_size()):
        yield number % n, number < n


def micro_batch_size(batch_size: int, gradient_accumulation_steps: int) -> int:
    """The rows of one micro-batch in each process: `batch_size`, or the process's share of an iteration if smaller.

    Raises UserError if the rows cannot be shared equally.
    """
    sequences, size = batch_size * gradient_accumulation_steps, world_size()
    if sequences % size:
        raise UserError(
            f"--batch_size {batch_size} x --gradient_accumulation_steps {gradient_accumulation_steps} are {sequences} "
            f"sequences per iteration, which {size} processes cannot share equally; change "
            f"--gradient_accumulation_steps to a multiple of {size}"
        )
    return min(batch_size, sequences // size)


def average_gradients(model: nn.Module, device: str) -> nn.Module:
    """The module to call in a training step, so that its backward pass averages the gradients over the processes."""
    if world_size() == 1:
        return model
    device_ids = [local_rank()] if device.startswith("cuda") else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


@contextlib.contextmanager
def synchronizing(model: nn.Module, is_last: bool) -> Iterator[None]:
    """The context of one micro-step: gradients are accumulated locally, and averaged only in the last one."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):  # a sharded model
        cast("FSDPModule", model).set_requires_gradient_sync(is_last)
    yield


def seed_dropout(*numbers: int) -> None:
    """Give every process except the first a new seed, so that their rows get different dropout."""
    if rank():
        seed = np.random.SeedSequence([*numbers, rank()]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed) >> 1)


def lost_process_error(error: BaseException, checkpoint: object | None) -> UserError | None:
    """The UserError for an error that only says that another process is gone; None for any other error."""
    is_lost = isinstance(error, dist.DistError) or any(phrase in str(error) for phrase in LOST_PROCESS_PHRASES)
    if world_size() == 1 or not (isinstance(error, RuntimeError) and is_lost):
        return None
    command = f"--resume {checkpoint}" if checkpoint else "the same command"
    return UserError(
        f"process {rank()} lost contact with another process of this job; run torchrun again with {command}, or start "
        "it with --max-restarts to do that automatically"
    )
