"""Tensors on devices that do not exist: torch checks devices, shapes and precisions, and computes nothing.

    python -m tests.fake_device_checks guard.so    # runs every check and planted fault; prints {name: error or null}

A program of its own, because the guard of fake_devices.cpp changes torch for the whole process. In FakeTensorMode an
operation that mixes devices raises an error, and so does reading a number, for which a real device would have to be
waited for.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from typing import Any
from unittest import mock

from tests.fake_devices import load_guard

if __name__ == "__main__":
    load_guard(sys.argv[1])  # before torch is imported

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fast.cuda_graphs
import fast.document_masks
import fast.generation
import fast.tied_head
import fast.training
import generation.decoding
import generation.row_cache
import generation.sampling
import model
import training.muon
import training.step
from common.device import autocast, choose_dtype
from generation.decoding import new_cache
from generation.sampling import TEXT_SAMPLING, Sampling
from model import GPT, GPTConfig
from training.config import RunConfig, make_config
from training.objectives import NextToken
from training.optimizers import init_optimizer_states, make_optimizers
from training.options import TrainOptions


def simulate_devices() -> None:
    """What a machine with an H100 and MPS answers to questions that do not reach the guard."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.backends.mps.is_available = lambda: True
    torch.cuda.mem_get_info = lambda device=None: (80 << 30, 80 << 30)
    torch.cuda.empty_cache = torch.mps.empty_cache = lambda: None
    torch.Tensor.pin_memory = lambda self: self
    attention = torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        """Attention; on MPS its parts, because a torch without MPS does not know which of MPS's kernels would run."""
        if query.device.type != "mps":
            return attention(query, key, value, attn_mask, dropout_p, is_causal)
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal)[0]

    torch.nn.functional.scaled_dot_product_attention = attend


class OnlyMPSNumbers(TorchDispatchMode):
    """Raises an error for float64 on MPS, which has none; a fake device would accept it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.device.type == "mps" and one.dtype == torch.float64:
                raise TypeError(f"{func} makes a float64 tensor on MPS")
        return result


# --- what is checked ---


SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 128}


def config_of_run(device: str, **options: Any) -> RunConfig:
    options = {**SHAPE, "batch_size": 2, "gradient_accumulation_steps": 2, "max_iters": 10, **options}
    data = {"format": "text", "n_vocab": 50259}
    return make_config(TrainOptions(**options), options, device, data, speed_up=fast.training.speed_up_training)


def model_for(config: RunConfig, plain: bool = False, compiled: str | None = None) -> GPT:
    with torch.device(config.device):
        gpt = GPT(GPTConfig(**SHAPE, dropout=config.dropout)).train()
    if not plain:
        fast.training.speed_up_training(gpt, config.activation_checkpointing, config.residual_dtype)
    if compiled:  # what is compiled runs eagerly, because a compiler would need the device
        fast.training._compile_blocks(gpt, compiled, "eager", 1.0)
        assert gpt.compiled_losses is not None, "on CUDA, the losses are compiled too"
        gpt.compiled_losses, gpt.compiled_transpose = fast.tied_head.fused_losses_and_gradient_, None
        if compiled == "model":
            gpt.compiled_blocks = gpt.plain_blocks
        for block in gpt.h if compiled == "block" else ():
            block.compiled = block.plain_forward  # FlexAttention's mask needs the branch
    return gpt


def training_step(device: str = "cuda:0", plain: bool = False, compiled: str | None = None, **options: Any) -> None:
    """Two micro-batches, clipping and the optimizers, without reading a number."""
    config = config_of_run(device, **options)
    gpt = model_for(config, plain, compiled)
    optimizers = make_optimizers(gpt, config)
    init_optimizer_states(optimizers)
    ids = np.random.default_rng(0).integers(0, 50259, (4, config.block_size + 1))
    scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=False)  # it reads its factor
    batch = [ids[:, :-1].copy(), ids[:, 1:].copy()]
    (loss,) = training.step.forward_backward(gpt, config, NextToken(config), batch, scaler)
    norm = training.step.clip_gradients(gpt, optimizers, scaler, config.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
    assert loss.device == norm.device == gpt.wte.weight.device and loss.shape == norm.shape == ()
    for name, weight in gpt.named_parameters():
        assert weight.grad is not None and weight.grad.dtype == weight.dtype == torch.float32, name
        assert weight.grad.device == weight.device, name


def default_micro_batch(**options: Any) -> tuple[int, int]:
    """The micro-batch that a run on CUDA tries first; on a fake device every size fits."""
    config = config_of_run("cuda:0", **{"batch_size": None, "gradient_accumulation_steps": None, **options})
    assert config.val_rows == 20 * 16, "validation does not depend on it"
    return config.batch_size, config.gradient_accumulation_steps


def micro_batches() -> None:
    assert default_micro_batch(block_size=1024) == (64, 2)
    assert default_micro_batch(block_size=256) == (128, 1)
    assert default_micro_batch(block_size=16384) == (16, 8), "never fewer than before"
    assert default_micro_batch(block_size=1024, gradient_accumulation_steps=4) == (16, 4)


def forward_and_optimizers(**options: Any) -> None:
    """A training step on MPS without its backward pass, in which torch would wait for a real stream of MPS."""
    config = config_of_run("mps", **options)
    gpt = model_for(config)
    ids = np.random.default_rng(0).integers(0, 50259, (2, config.block_size))
    inputs = training.step.model_inputs(config, ids, ids)
    with autocast(config.device, config.dtype):
        _, loss = gpt(**inputs, n_targets=torch.full((), 2.0, device="mps"))
    assert loss is not None and loss.requires_grad and loss.device.type == "mps"
    init_optimizer_states(make_optimizers(gpt, config))  # a step with gradients of zero


def evaluation(device: str = "cuda:0", **options: Any) -> None:
    """What an evaluation and evaluate.py compute on the device; both then read the losses."""
    config = config_of_run(device, **options)
    gpt = model_for(config).eval()
    ids = np.random.default_rng(0).integers(0, 50259, (2, config.block_size))
    inputs = training.step.model_inputs(config, ids, ids)
    with torch.no_grad(), autocast(config.device, config.dtype):
        _, loss = gpt(**inputs)
        logits = gpt.logits(gpt.hidden(inputs["idx"]))
    assert loss.device.type == logits.device.type == device.partition(":")[0]
    assert logits.dtype == torch.float32


def generating_model(device: str) -> GPT:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        gpt = GPT(GPTConfig(**SHAPE)).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return gpt


class Replayed:
    """A captured graph that does nothing."""

    def replay(self) -> None:
        pass


@torch.inference_mode()
def decoding(device: str = "cuda:0", sampling: Sampling = TEXT_SAMPLING) -> None:
    """Prefill, decode steps for rows of one and of different lengths, and sampling."""
    gpt = generating_model(device)
    if device.startswith("cuda"):
        with mock.patch.dict(sys.modules, {"fast.triton_attention": None}):  # Triton cannot run on a fake device
            assert fast.generation.speed_up_generation(gpt).description == "plain layers, CUDA graphs"
    for lengths in ((5, 5), (4, 9)):
        cache = new_cache(gpt, 2)
        # `prefill` reads whether the logits are finite, so this calls what it consists of.
        contexts = [list(range(length)) for length in lengths]
        logits = gpt.logits(generation.decoding._fill(gpt, slice(None), contexts, 0, cache))
        generator = None  # a generator of the device would need the device
        ids = generation.sampling.sample(logits, sampling, generator)
        logits = generation.decoding.decode_step(gpt, ids, list(lengths), cache)
        assert logits.dtype == torch.float32 and logits.device == gpt.wte.weight.device
        captured = fast.cuda_graphs.CapturedDecode(capture=lambda step, device: (Replayed(), step()))
        for more in range(2):  # the second call advances the positions on the device
            logits = captured(gpt, ids, [length + more for length in lengths], cache)
        if device.startswith("cuda"):
            ids = generation.sampling.sample(logits, sampling, generator, captured.draw)
        later = generation.decoding.decode_at(gpt, ids, ids * 0 + 9, 16, cache)
        assert later.shape == logits.shape == (2, 50259)


@torch.inference_mode()
def serving(device: str = "cuda:0") -> None:
    """A prompt's piece and a decode step of chosen rows."""
    gpt = generating_model(device)
    cache = generation.row_cache.RowCache(gpt.config, 4, torch.device(device), torch.bfloat16)
    hidden = generation.row_cache.prefill_chunk(gpt, cache, 3, [1, 2, 3])
    hidden = generation.row_cache.prefill_chunk(gpt, cache, 3, [4, 5])
    ids = torch.zeros(2, dtype=torch.long, device=device)
    logits = generation.row_cache.decode_rows(gpt, ids, [3, 1], [5, 0], cache)
    assert hidden.device == logits.device


CHECKS: dict[str, Callable[[], None]] = {
    "step": training_step,
    "step, float32": lambda: training_step(dtype="float32"),
    "step, float16": lambda: training_step(dtype="float16"),
    "step, AdamW": lambda: training_step(optimizer="adamw"),
    "step, dropout": lambda: training_step(dropout=0.1),
    "step, dense mask": lambda: training_step(document_mask=True),
    "step, dense mask and dropout": lambda: training_step(document_mask=True, dropout=0.1),
    "step, block mask": lambda: training_step(document_mask=True, compiled="block"),
    "step, block mask and one piece": lambda: training_step(document_mask=True, compiled="model"),
    "step, checkpointing": lambda: training_step(activation_checkpointing=True),
    "step, checkpointing and block mask": lambda: training_step(
        activation_checkpointing=True, document_mask=True, compiled="block"
    ),
    "step, plain": lambda: training_step(plain=True, document_mask=True),
    "micro-batches": micro_batches,
    "evaluation": evaluation,
    "evaluation, mask": lambda: evaluation(document_mask=True),
    "decoding": decoding,
    "decoding, top_p and min_p": lambda: decoding(sampling=Sampling(top_k=20, top_p=0.9, min_p=0.1)),
    "serving": serving,
    "MPS step": lambda: forward_and_optimizers(dtype="float32"),
    "MPS step, float16": lambda: forward_and_optimizers(dtype="float16"),
    "MPS step, mask": lambda: forward_and_optimizers(document_mask=True, optimizer="adamw", dtype="float32"),
    "MPS evaluation": lambda: evaluation("mps", dtype="float32"),
    "MPS decoding": lambda: decoding("mps"),
    "MPS serving": lambda: serving("mps"),
}

# (the check that must fail, where the function is, its name, what is replaced in its source, by what)
FAULTS: list[tuple[str, Any, str, str, str]] = [
    ("step", model.GPT, "transform", "device=x.device", 'device="cpu"'),
    ("step", fast.tied_head.TiedHead, "__init__", "device=weight.device, ", ""),
    ("step", fast.tied_head, "losses_and_gradient_", "missed = missed.float()", "missed.sum().item()"),
    ("step", training.step, "forward_backward", "names), device=config.device)", "names))"),
    ("step", training.muon, "orthogonalised_", "clamp(min=eps)", "clamp(min=float(x.sum()))"),
    ("step, block mask", fast.tied_head, "fused_losses_and_gradient_", "device=logits.device", 'device="cpu"'),
    ("step, dense mask", model.GPT, "document_mask", ", device=documents.device", ""),
    ("step, dense mask and dropout", fast.training, "dense_mask", "device=visible.device, ", ""),
    ("step, plain", training.step, "arrays_to_device", "non_blocking=True) for", "non_blocking=True).cpu() for"),
    ("decoding", generation.decoding, "decode_step", "start, device=ids.device)", "start)"),
    ("decoding", generation.decoding, "_fill", "for context in contexts], device=device)", "for context in contexts])"),
    (
        "serving",
        generation.row_cache,
        "decode_rows",
        "torch.tensor(lengths, device=ids.device)",
        "torch.tensor(lengths)",
    ),
    ("MPS decoding", generation.sampling, "draw", 'device.type == "mps"', 'device.type == "never"'),
]


def planted(owner: Any, name: str, old: str, new: str) -> mock._patch:
    """A patch with a copy of a function in whose source `old` is replaced."""
    real = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(real))
    assert source.count(old) == 1, f"{name} contains {old!r} {source.count(old)} times"
    names = dict(real.__globals__)
    if inspect.isclass(owner):
        names[owner.__name__] = owner
    exec(source.replace(old, new), names)
    return mock.patch.object(owner, name, names[name])


def error_of(check: Callable[[], None], is_mps: bool) -> str | None:
    """The error that a check raises, or None."""
    try:
        with FakeTensorMode():
            if is_mps:
                with OnlyMPSNumbers():
                    check()
            else:
                check()
    except Exception as error:  # whatever torch raises is what the test reports
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_default_dtype(torch.float32)
    return None


def main() -> None:
    simulate_devices()
    assert choose_dtype(None, "cuda:0") == "bfloat16"
    found: dict[str, dict[str, str | None]] = {"checks": {}, "faults": {}}
    for name, check in CHECKS.items():
        found["checks"][name] = error_of(check, name.startswith("MPS"))
    for name, owner, function, old, new in FAULTS:
        with planted(owner, function, old, new):
            found["faults"][f"{function}: {old} -> {new}"] = error_of(CHECKS[name], name.startswith("MPS"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
