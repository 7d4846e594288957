"""The micro-batch that fits, found before a run starts: by trying on a GPU, by an estimate on a CPU."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch

from common.cli import UserError
from model import GPT, GPTConfig
from tests.fake_job import fake_job
from tests.tiny import OPTIONS, load_checkpoint, run
from training import memory
from training.memory import (
    StepMemory,
    fits,
    largest_by_trying,
    out_of_memory_error,
    sizes_to_try,
    smaller_micro_batch,
    step_bytes,
)

SHAPE = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def free_bytes(monkeypatch):
    """Sets what the system reports as free memory; None: nothing."""

    def set_free(value: int | None) -> None:
        monkeypatch.setattr(memory, "available_memory_bytes", lambda: value)

    return set_free


@pytest.mark.parametrize(
    ("batch_size", "steps", "smaller"), [(16, 1, (8, 2)), (9, 2, (3, 6)), (7, 1, (1, 7)), (1, 8, None)]
)
def test_the_smaller_micro_batch_keeps_the_sequences(batch_size, steps, smaller):
    assert smaller_micro_batch(batch_size, steps) == smaller


def test_one_sequence_that_does_not_fit_needs_a_smaller_model():
    assert "use a smaller --block_size" in str(out_of_memory_error(1, 4))


# By trying


class Card:
    """A GPU on which micro-batches of more than `most` rows do not fit; the meta device stands for its memory."""

    def __init__(self, most: int):
        self.most, self.tried = most, []

    def speed_up(self, model: GPT, activation_checkpointing: bool, residual_dtype: str) -> None:
        """Applied to the model that is tried: notes what it is given."""

        def watch(module, arguments, settings):
            rows = len(arguments[0])
            self.tried.append(rows)
            if rows > self.most:
                raise OUT_OF_MEMORY

        model.register_forward_pre_hook(watch, with_kwargs=True)


STEP = StepMemory(SHAPE, "meta", "float32")


def test_the_largest_micro_batch_that_fits_is_found_by_trying():
    card = Card(most=5)
    assert memory.find_micro_batch(STEP, "auto", 16, 3, card.speed_up) == (4, 12)
    assert card.tried == [48, 24, 16, 12, 8, 6, 4]


@pytest.mark.parametrize(
    ("sizes", "most", "expected"), [([16, 8, 4, 2, 1], 64, 16), ([16, 8, 4, 2, 1], 5, 4), ([2, 1], 0, 1)]
)
def test_the_first_size_that_fits_is_taken(sizes, most, expected):
    assert largest_by_trying(STEP, sizes, Card(most).speed_up) == expected


@pytest.mark.parametrize(
    ("device", "requested", "sizes"),
    [
        ("cuda:0", None, [32, 16, 8, 4, 2, 1]),  # the default, or what a small card can do
        ("cuda:0", 16, []),  # a number is the user's
        ("cuda:0", "auto", [128, 64, 32, 16, 8, 4, 2, 1]),
        ("mps", None, []),
        ("mps", "auto", [128, 64, 32, 16, 8, 4, 2, 1]),
        ("cpu", None, []),
    ],
)
def test_sizes_are_tried_by_default_on_cuda_and_with_auto(device, requested, sizes):
    assert sizes_to_try(device, requested, 40, 128) == sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_first_run_on_a_small_card_finds_its_micro_batch(capsys):
    step = StepMemory(SHAPE, "cuda:0", "float32")
    assert memory.find_micro_batch(step, None, 16, 8, Card(5).speed_up) == (4, 32)
    assert "the default of 16 does not fit): 4 x 32 sequences, 2,048 tokens" in capsys.readouterr().out
    assert memory.find_micro_batch(step, None, 16, 8) == (128, 1)
    assert memory.find_micro_batch(step, None, 16, 8, may_grow=False) == (16, 8)


class Taken(torch.overrides.TorchFunctionMode):
    """Notes the memory that is taken for a try, without keeping it."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_function__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        if function is torch.empty_like:
            self.tensors.append(weakref.ref(result))
        return result


def test_memory_is_kept_for_the_optimizers_and_the_averaging():
    with torch.device("meta"):
        gpt = GPT(SHAPE)
    n_weights = len(list(gpt.parameters()))
    with Taken() as taken:
        assert fits(gpt, lambda: None, "meta")
    assert len(taken.tensors) == 2 * n_weights
    with fake_job(size=2), Taken() as taken:
        assert fits(gpt, lambda: None, "meta")
    assert len(taken.tensors) == 3 * n_weights


def test_a_try_that_fails_has_freed_its_memory_before_the_devices_cache_is_emptied():
    left = []

    def step():
        raise OUT_OF_MEMORY

    def note(phase, info):
        if phase == "start":
            left.append(sum(reference() is not None for reference in taken.tensors))

    with torch.device("meta"):
        gpt = GPT(SHAPE)
    gc.collect()
    gc.disable()  # only the collection that `fits` asks for
    with Taken() as taken:
        gc.callbacks.append(note)
        try:
            assert not fits(gpt, step, "meta")
        finally:
            gc.callbacks.remove(note)
            gc.enable()
    assert taken.tensors and left == [0]


# By an estimate


def test_on_a_cpu_the_micro_batch_follows_from_the_free_memory(
    data, tmp_path, free_bytes, one_thread, quick_disk, capsys
):
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=16)
    free_bytes(int(step_bytes(shape, 2, 2048) / memory.HEADROOM) + 1)
    assert run(data, tmp_path / "a", batch_size="auto", gradient_accumulation_steps=1) == 0
    assert "batch size (auto): 2 x 8 sequences, 256 tokens per iteration" in capsys.readouterr().out
    config = load_checkpoint(tmp_path / "a" / "text10.pt")["info"]["config"]
    assert (config["batch_size"], config["gradient_accumulation_steps"], config["val_rows"]) == (2, 8, 32)
    free_bytes(None)
    assert run(data, tmp_path / "a", resume=tmp_path / "a" / "text10.pt", batch_size="auto", max_iters=11) == 0
    assert "this system does not report its free memory" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_linux_reports_its_free_memory():
    assert 0 < memory.available_memory_bytes() < 2**50


def test_a_step_that_cannot_fit_into_the_cpus_memory_is_refused_and_a_large_one_is_a_warning(
    data, tmp_path, free_bytes, one_thread, quick_disk, capsys
):
    shape = GPTConfig(**{name: OPTIONS[name] for name in ("n_layer", "n_head", "n_embd", "block_size")})
    most = step_bytes(shape, 2, 2048)
    free_bytes(most // 3)
    with pytest.raises(UserError, match="out of memory with --batch_size 2; run again with --batch_size 1"):
        run(data, tmp_path)
    free_bytes(most - 1)
    assert run(data, tmp_path) == 0
    assert "warning: a step with --batch_size 2 may need" in capsys.readouterr().out


def test_all_logits_at_once_need_more_than_a_chunk_of_them():
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=256)
    assert step_bytes(shape, 32, None) - step_bytes(shape, 32, 2048) > 4 * (2 * 32 * 256 - 2048) * shape.vocab_size - 1
    assert step_bytes(shape, 1, 2048) == step_bytes(shape, 1, 256)


def test_processes_on_one_machine_share_its_memory(free_bytes):
    free_bytes(int(2 * (step_bytes(SHAPE, 4) / memory.HEADROOM + 1)))
    with fake_job(size=2, local_size=2):
        assert memory.find_micro_batch(StepMemory(SHAPE, "cpu", "float32"), "auto", 16, 1) == (4, 4)
