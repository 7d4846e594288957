"""Many processes that train one model under torchrun: who is who, what is shared, what becomes whole again.

    torchrun --standalone --nproc_per_node=2 train.py --dataset story

Each process (a rank) has a device of its own and makes the gradients of its share of every iteration's rows. "ddp":
each holds the whole model, and gradients are averaged ("PyTorch Distributed", Li et al. 2020). "fsdp": each holds a
piece of every weight, gradient and optimizer state, and layers are made whole while they are used ("ZeRO", Rajbhandari
et al. 2020; torch's `fully_shard`). In a world of one process every function here gives back what it got.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.cli import UserError
from common.device import choose_device, n_cuda_devices
from model import GPT

# Longer than anything that one process does alone while the others wait: above all, rank 0's writing of a checkpoint.
PATIENCE = datetime.timedelta(minutes=30)
LOST_WORDS = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "gloo", "NCCL", "Socket")


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a job as one of them sees them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1
    job: str | None = None  # names this start of torchrun, the same after its restarts; None without torchrun
    restarts: int = 0  # how often torchrun has started all processes again

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def agreed(self) -> World:
        """The same world with the facts that each machine's torchrun may tell differently: restarts and job."""
        job = [self.job]
        dist.broadcast_object_list(job)
        return dataclasses.replace(self, restarts=self.largest(self.restarts), job=job[0])

    def choose_device(self, requested: str | None) -> str:
        """The device of this process, as `runtime.choose_device`; of several processes each takes its own, unasked.

        Raises UserError where the machine has fewer devices than processes.
        """
        if self.size == 1:
            return choose_device(requested)
        count = n_cuda_devices()
        if requested in (None, "auto"):
            requested = "cuda" if count else "cpu"
        kind = requested.partition(":")[0]
        if kind == "mps":
            raise UserError("--device mps: there is one such device for all processes; use --device cpu")
        if kind == "cuda" and 0 < count < self.local_size:
            raise UserError(
                f"torchrun runs {self.local_size} processes here and there are {count} CUDA devices; use "
                f"--nproc_per_node={count} or --device cpu"
            )
        device = choose_device(f"cuda:{self.local_rank}" if kind == "cuda" else kind)
        print(f"processes: {self.size}, this one on {device}")
        return device

    def micro_batches(self, config):
        """`config` with the micro-batch that a process really makes: at most its share of an iteration's rows.

        Raises UserError where the rows cannot be shared equally.
        """
        sequences = config.batch_size * config.gradient_accumulation_steps
        if sequences % self.size:
            raise UserError(
                f"--batch_size {config.batch_size} x --gradient_accumulation_steps "
                f"{config.gradient_accumulation_steps} are {sequences} sequences an iteration, which {self.size} "
                f"processes cannot share equally; change --gradient_accumulation_steps to a multiple of {self.size}"
            )
        batch_size = min(config.batch_size, sequences // self.size)
        return dataclasses.replace(
            config, batch_size=batch_size, gradient_accumulation_steps=-(-sequences // batch_size)
        )

    def share(self, rows):
        """This process's rows of an iteration's: the ranks' shares lie one behind the other."""
        n_rows = len(rows) // self.size
        return rows[self.rank * n_rows : (self.rank + 1) * n_rows]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes of a tensor on their devices."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def sum(self, *numbers: float) -> list[float]:
        """The sum over the processes of each number."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def smallest(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        return int(self._reduced([number], dist.ReduceOp.MIN)[0])

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return int(self._reduced([number], dist.ReduceOp.MAX)[0])

    def _reduced(self, numbers, operation) -> list[float]:
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: no device has to be waited for
        dist.all_reduce(values, operation)
        return values.tolist()

    def on_main(self, function: Callable):
        """What `function` returns in the main process, which alone calls it; None elsewhere. Its UserError is all's."""
        if self.size == 1:
            return function()
        result, refusal = None, [None]
        if self.is_main:
            try:
                result = function()
            except UserError as error:
                refusal = [str(error)]
        dist.broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise UserError(refusal[0])
        return result

    def seed_dropout(self, *numbers: int) -> None:
        """Give each process but the first random numbers of its own, so that dropout differs between their rows."""
        if self.rank:
            seed = np.random.SeedSequence([*numbers, self.rank]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(seed) >> 1)

    def gathered_from_others(self, thing) -> list | None:
        """What plain thing each process but the first has, in the order of their ranks; None in all but the first."""
        things = [None] * self.size if self.is_main else None
        dist.gather_object(thing, things)
        return things and things[1:]

    def gathered(self, state):
        """Nested dicts and lists with each sharded tensor made whole, for the main process; the others get none.

        All processes must call it with the same structure. Tensors that are whole already stay what they are.
        """
        if isinstance(state, dict):
            return {key: self.gathered(value) for key, value in state.items()}
        if isinstance(state, (list, tuple)):
            return type(state)(map(self.gathered, state))
        if not is_sharded(state):
            return state
        tensor = state.detach().full_tensor()
        return tensor.cpu() if self.is_main else None

    def wrap(self, model: GPT, kind: str) -> nn.Module:
        """What to call in a training step, so that the processes' gradients are averaged: "ddp", or "fsdp" as it is."""
        if self.size == 1 or kind == "fsdp":
            return model
        on_cuda = model.wte.weight.is_cuda
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.local_rank] if on_cuda else None, gradient_as_bucket_view=True
        )

    def leave(self, status: int) -> int:
        """Give `status` back; one of several processes ends with it at once, its work being done.

        Threads of torch's that are still on their way into Python when it closes down would abort it now and then.
        """
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    def lost_process_error(self, error: BaseException, checkpoint) -> UserError | None:
        """The sentence for an error that says no more than that another process is gone; None for any other."""
        is_lost = isinstance(error, dist.DistError) or any(word in str(error) for word in LOST_WORDS)
        if self.size == 1 or not (isinstance(error, RuntimeError) and is_lost):
            return None
        go_on = f"--resume {checkpoint}" if checkpoint else "the same command"
        return UserError(
            f"process {self.rank} lost another process of this job, which has ended or hangs; torchrun --max-restarts "
            f"starts all again by itself, and {go_on} goes on by hand"
        )


ALONE = World()


@contextlib.contextmanager
def join_job() -> Iterator[World]:
    """Take one's place among torchrun's processes; without torchrun, a world of one.

    Only rank 0's output is seen, and a UserError that all processes raise is said once. Tensors on CUDA meet through
    NCCL, those on a CPU through gloo.
    """
    given = {field: int(os.environ[name]) for name, field in _FIELDS.items() if name in os.environ}
    world = World(**given, job=_job())
    if world.size == 1:
        yield world
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set and {missing[0]} is not; start several processes with torchrun")
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(_name_of_this_start(store, world), store)
    with_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if with_nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    world = world.agreed()
    with contextlib.ExitStack() as stack:
        if not world.is_main:
            silence = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            yield world
        except UserError as error:
            if not _is_first_to_say(store, str(error)):
                raise SystemExit(1) from error
            raise
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


_FIELDS = {  # what torchrun says, and what it is called here
    "RANK": "rank",
    "WORLD_SIZE": "size",
    "LOCAL_RANK": "local_rank",
    "LOCAL_WORLD_SIZE": "local_size",
    "TORCHELASTIC_RESTART_COUNT": "restarts",
}


def _job() -> str | None:
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"torchrun's process {os.getppid()}" if run_id == "none" else run_id


def _name_of_this_start(store: dist.Store, world: World) -> str:
    """A name that all processes of this start know, and none that torchrun has ended before.

    torchrun's store still holds what those wrote, the addresses of dead processes among it (PyTorch issue 135712), and
    its count of restarts is each machine's own. So rank 0 answers every process by the name that it gives itself.
    """
    own = uuid.uuid4().hex
    store.set(f"jojo/here/{world.rank}", own)
    if not world.is_main:
        name = store.get(f"jojo/welcome/{own}").decode()
        store.set(f"jojo/thanks/{name}/{world.rank}", "")
        return name
    awaited, deadline = set(range(1, world.size)), time.monotonic() + PATIENCE.total_seconds()
    while awaited := {rank for rank in awaited if not store.check([f"jojo/thanks/{own}/{rank}"])}:
        for rank in awaited:
            if store.check([f"jojo/here/{rank}"]):  # perhaps still a dead process's name: asked again
                store.set(f"jojo/welcome/{store.get(f'jojo/here/{rank}').decode()}", own)
        if time.monotonic() > deadline:
            raise UserError(f"of {world.size} processes {len(awaited)} have not come; look at their machines")
        time.sleep(0.02)
    return own


def _is_first_to_say(store: dist.Store, sentence: str) -> bool:
    try:
        return store.add(f"said: {sentence}", 1) == 1
    except RuntimeError:  # the store is gone with the process that had it
        return True


def is_main_process() -> bool:
    """Whether this process is the first of its job, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_sharded(tensor) -> bool:
    """Whether a tensor is sharded over the processes (a DTensor)."""
    if not isinstance(tensor, Tensor) or type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def shard_model(model: GPT, device: str) -> GPT:
    """Leave in each process a piece of every weight of a model on the CPU, on its device.

    A block's weights are whole on the device only while the block is at work. The embedding, which the loss uses too,
    stays whole from the forward pass to the end of the backward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


@contextlib.contextmanager
def averaging(model: nn.Module, is_last: bool) -> Iterator[None]:
    """A micro-step: in an iteration's last one the processes average their gradients; before, each adds up its own."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):  # a model in pieces
        model.set_requires_gradient_sync(is_last)
    yield


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded as a whole one, in every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's saved state, {number of the weight: {name: tensor}}, cut like its weights where these are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {
        number: {name: shard_like(value, weights[number]) for name, value in values.items()}
        for number, values in state.items()
    }


def shard_like(value, weight: Tensor):
    """This process's piece of a tensor that every process has as a whole, cut like `weight`, which may be whole too."""
    if not is_sharded(weight) or not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Each process cuts its piece out of the whole, which it has read itself.
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
