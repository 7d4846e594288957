"""The training steps that benchmark.py times: ours, transformers', and loops like nanoGPT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmark_timing import Work, on_device

from common.cli import UserError
from common.device import allow_tf32, autocast, choose_dtype, seed_everything
from common.speedups import load_speedups
from setup_tokenizer import N_VOCAB

if TYPE_CHECKING:
    from model import GPTConfig
    from training.config import RunConfig


def gpt_config(config: Any) -> GPTConfig:
    """The GPTConfig of a RunConfig or a GenerationConfig. Raises UserError for numbers that do not fit together."""
    from model import GPTConfig, padded_vocab_size

    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    n_vocab = getattr(config, "n_vocab", N_VOCAB)
    try:
        return GPTConfig(n_vocab=n_vocab, vocab_size=padded_vocab_size(n_vocab), **shape)
    except ValueError as error:
        raise UserError(f"{error}; change --n_embd or --n_head") from error


def train_ours(options: Any, config: RunConfig) -> Work:
    """An iteration of train.py, including the optimizer steps, on random rows."""
    fast = load_speedups(options.plain)
    if fast:
        fast.keep_freed_memory()
    import numpy as np
    import torch

    from training.initialization import make_model
    from training.memory import move_model
    from training.objectives import NextToken
    from training.optimizers import init_optimizer_states, make_optimizers
    from training.step import clip_gradients, forward_backward

    allow_tf32()
    seed_everything(config.seed)
    model = make_model(gpt_config(config))
    if fast:
        fast.speed_up_training(model, config.activation_checkpointing, config.residual_dtype)
    model = move_model(model, config.device).train()
    optimizers = make_optimizers(model, config, fast)
    scaler = torch.amp.GradScaler(config.device.partition(":")[0], enabled=config.dtype == "float16")
    objective = NextToken(config)
    n_rows = config.batch_size * config.gradient_accumulation_steps
    rows = np.random.default_rng(0).integers(model.config.n_vocab, size=(n_rows, config.block_size + 1))
    ids, targets = rows[:, :-1].copy(), rows[:, 1:].copy()

    def trial_step() -> None:
        """One micro-batch, to compile."""
        few = [ids[: config.batch_size], targets[: config.batch_size]]
        forward_backward(model, config, objective, few)[0].item()
        model.zero_grad(set_to_none=True)

    if config.compile and fast:
        fast.compile_training(model, trial_step, scope=config.compile_scope)
    init_optimizer_states(optimizers)

    def step() -> int:
        forward_backward(model, config, objective, [ids, targets], scaler)
        clip_gradients(model, optimizers, scaler, config.grad_clip)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        return ids.size

    return on_device(step, config.device)


def train_transformers(options: Any, config: RunConfig) -> Work:
    """The loop that a user of transformers writes: plain float32 on a CPU, everything that makes it fast on CUDA."""
    from transformers import GPT2LMHeadModel

    seed_everything(config.seed)
    model = GPT2LMHeadModel(transformers_config(config)).to(config.device).train()
    model.loss_type = "ForCausalLM"  # without it, transformers prints that it has to guess

    def logits_and_loss(ids: Any) -> tuple:
        return None, model(input_ids=ids, labels=ids, use_cache=False).loss

    return simple_loop(model, logits_and_loss, config, tuned=config.device.startswith("cuda"))


def train_plain(options: Any, config: RunConfig) -> Work:
    """A loop like nanoGPT's with its defaults on a CPU: float32, eager."""
    return nanogpt_like(config, tuned=False)


def train_compiled(options: Any, config: RunConfig) -> Work:
    """A loop like nanoGPT's with its best flags, which are its defaults on CUDA."""
    return nanogpt_like(config, tuned=True)


def nanogpt_like(config: RunConfig, tuned: bool) -> Work:
    """Our plain network in a loop like nanoGPT's: cross entropy over all logits, which `logits, loss = ...` keeps."""
    from torch.nn.functional import cross_entropy, linear

    from model import GPT

    seed_everything(config.seed)
    model = GPT(gpt_config(config)).to(config.device).train()

    def logits_and_loss(ids: Any) -> tuple:
        logits = linear(model.hidden(ids), model.wte.weight)  # in the autocast's precision, as in nanoGPT
        return logits, cross_entropy(logits.flatten(0, 1), ids.flatten())

    return simple_loop(model, logits_and_loss, config, tuned)


def simple_loop(model: Any, logits_and_loss: Callable, config: RunConfig, tuned: bool) -> Work:
    """AdamW and clipping around a model; `tuned` adds autocast, torch.compile and the fused optimizer.

    `logits_and_loss` takes ids (B, T). As in nanoGPT, the logits of a micro-batch stay in memory until the next one's
    replace them.
    """
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True if tuned else None,
    )
    forward = torch.compile(logits_and_loss) if tuned else logits_and_loss
    dtype = choose_dtype(None, config.device) if tuned else "float32"
    scaler = torch.amp.GradScaler(config.device.partition(":")[0], enabled=dtype == "float16")
    shape = (config.batch_size, config.block_size)
    n_vocab = gpt_config(config).n_vocab
    batches = [torch.randint(n_vocab, shape, device=config.device) for _ in range(config.gradient_accumulation_steps)]
    logits = None

    def step() -> int:
        nonlocal logits
        for ids in batches:
            with autocast(config.device, dtype):
                logits, loss = forward(ids)
            scaler.scale(loss / len(batches)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return config.tokens_per_iter

    return on_device(step, config.device)


def transformers_config(config: Any) -> Any:
    """The same shape for transformers, without dropout."""
    from transformers import GPT2Config

    shape = gpt_config(config)
    return GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.block_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
