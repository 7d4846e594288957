"""What a run prints: its data, its speed and time left, and a sample of the model's text."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Mapping

import tiktoken
import torch

from common.cli import UserError
from common.device import autocast, peak_flops
from common.numbers import significant
from common.threads import POLICY, SlowSteps
from data.dataset import data_parts
from data.epochs import in_words
from generation.decoding import generate
from generation.sampling import PREVIEW_SAMPLING
from model import GPT
from setup_tokenizer import control_ids, encode_chat, get_extended_tokenizer
from training.config import RunConfig
from training.mixture import model_format, portions
from training.options import TrainOptions
from training.parallel import world_size
from training.run import Run


def describe_data(facts: dict) -> list[str]:
    """One line each for the size, the source and the licence of every data set."""
    lines = []
    for part in data_parts(facts):
        counts = ", ".join(f"{split} {part['splits'][split]['tokens']:,} tokens" for split in ("train", "val"))
        share = f", {100 * part['weight']:.4g} % of the rows" if "weight" in part else ""
        lines.append(f"data: {part['name']} ({part['format']}){share}, {counts}")
        if part.get("source"):
            lines.append(f"source: {part['source']}")
        if part.get("licence"):
            lines.append(f"licence: {part['licence']}" + (" (non-commercial)" if part.get("non_commercial") else ""))
    return lines


def describe_config(config: RunConfig, facts: dict, options: TrainOptions) -> list[str]:
    """A line about the iterations of a run and their epochs, and when fine-tuning one about the learning rates."""
    epochs = epochs_by_part(config, facts, config.max_iters)
    sizes = {part["name"]: part["splits"]["train"]["tokens"] for part in data_parts(facts)}
    of_each = ", ".join(f"{in_words(n)} epochs of {name}'s {sizes[name]:,} tokens" for name, n in epochs.items())
    remark = " (the default for this data; --max_iters changes it)" if options.max_iters is None else ""
    lines = [f"iterations: {config.max_iters:,}, which are {of_each}{remark}"]
    if config.init_from:
        muon = f", muon_learning_rate {config.muon_learning_rate:.3g}" if config.optimizer == "muon" else ""
        lines.append(
            f"fine-tuning {config.init_from}: learning_rate {config.learning_rate:.3g} to {config.min_lr:.3g}{muon}, "
            f"warmup_iters {config.warmup_iters}, batch_size {config.batch_size}; larger rates learn faster and forget "
            "more"
        )
    return lines


def epochs_by_part(config: RunConfig, facts: dict, iter_num: int) -> dict[str, float]:
    """The epochs of each data set, by name, after `iter_num` iterations."""
    rows_per_iter = config.batch_size * config.gradient_accumulation_steps
    return {part.name: part.epochs(iter_num, config.block_size, rows_per_iter) for part in portions(facts)}


def describe_evaluation(
    iter_num: int, val_loss: float, val_losses: dict[str, float], others: Mapping[str, float], is_best: bool
) -> str:
    """The line about an evaluation: validation loss, what the objective logs with it, and the losses of the parts."""
    best = " (best)" if iter_num and is_best else ""
    parts = describe_parts(val_losses)
    return f"iter {iter_num}: validation loss {val_loss:.4f}{describe_others(others)}{best}{parts}"


def describe_others(others: Mapping[str, float]) -> str:
    """What an objective logs in addition to the loss, in words; "" if there is nothing."""
    return "".join(f", {name.replace('_', ' ')} {value:.3g}" for name, value in others.items())


def describe_parts(val_losses: dict[str, float]) -> str:
    """The losses of a mixture's parts, whose weighted mean is its validation loss; "" for a single data set."""
    if len(val_losses) == 1:
        return ""
    return "; weighted mean of " + ", ".join(f"{name} {loss:.4f}" for name, loss in val_losses.items())


def describe_end(run: Run, facts: dict, stopped_by: int) -> str:
    """How a run ended, and the command for what comes next; `stopped_by` is the signal that stopped it, or 0."""
    path = shlex.quote(str(run.files.path))
    if stopped_by:
        launcher = "python" if world_size() == 1 else "torchrun ..."
        return f"stopped at iteration {run.iter_num}; continue with: {launcher} train.py --resume {path}"
    best = "no best checkpoint" if run.best_val_loss is None else f"best validation loss {run.best_val_loss:.4f}"
    chat = " --chat" if model_format(facts["format"]) == "chat" else ""
    return f"done: {path}, {best}; next: python gen.py {path}{chat}"


class Clock:
    """The speed of training, and the log line that shows it. `facts` are those of the run's data."""

    def __init__(
        self, model: GPT, config: RunConfig, facts: dict, tokens_per_iter: int, iter_num: int, n_devices: int = 1
    ):
        self.config, self.facts, self.tokens_per_iter = config, facts, tokens_per_iter
        # A frozen weight needs no gradient, which accounts for two of a weight's six operations per token.
        n_frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
        n_looked_up = 0 if model.wpe.weight.requires_grad else model.wpe.weight.numel()
        flops_per_token = model.flops_per_token() - 2 * (n_frozen - n_looked_up)
        self.flops_per_iter = flops_per_token * tokens_per_iter
        on_cuda = config.device.startswith("cuda")
        peak = peak_flops(torch.cuda.get_device_name(config.device), config.dtype) if on_cuda else None
        self.peak_flops = peak and peak * n_devices
        self.slow_steps = SlowSteps()
        self.restart(iter_num)

    def restart(self, iter_num: int) -> None:
        """Start measuring now, so that an evaluation or a save does not count as training time."""
        self.start, self.start_iter = time.perf_counter(), iter_num

    def log(
        self,
        iter_num: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        skipped: int,
        others: Mapping[str, float] | None = None,
    ) -> float:
        """Print a line about the iteration just completed, with `others` after the loss; returns tokens per second.

        MFU, model FLOPs utilization, is the fraction of the device's peak that the model's own products use ("PaLM",
        Chowdhery et al. 2022, appendix B). It is left out if the peak is not known.
        """
        s_per_iter = (time.perf_counter() - self.start) / max(1, iter_num - self.start_iter)
        self.restart(iter_num)
        max_iters = self.config.max_iters
        tokens_per_s = self.tokens_per_iter / s_per_iter
        speed = f"{significant(tokens_per_s, 3)} tokens/s"
        if self.peak_flops:
            speed += f", mfu {self.flops_per_iter / s_per_iter / self.peak_flops:.1%}"
        filled = 20 * iter_num // max_iters
        left = int(s_per_iter * (max_iters - iter_num))
        bar = "#" * filled + "." * (20 - filled)
        epochs = "+".join(map(in_words, epochs_by_part(self.config, self.facts, iter_num).values()))
        print(
            f"iter {iter_num:>{len(str(max_iters))}}/{max_iters} (epoch {epochs}) [{bar}] "
            f"loss {loss:.4f}{describe_others(others or {})}, lr {learning_rate:.2e}, norm {grad_norm:.2f}, {speed}, "
            f"{left // 60}:{left % 60:02d} left" + (f", {skipped} skipped" if skipped else ""),
            flush=True,
        )
        if self.config.device == "cpu" and self.slow_steps.is_disturbed(s_per_iter):
            path = shlex.quote(f"{self.config.out_dir}/{self.config.name}.pt")
            print(
                "note: training is far slower than before because another program uses the processor; to speed it "
                f"up, stop training with Ctrl-C and run: {POLICY}=PASSIVE python train.py --resume {path}"
            )
        return tokens_per_s


def sample_text(model: GPT, config: RunConfig, enc: tiktoken.Encoding, chat: bool, iter_num: int) -> str:
    """A short text by the current model, decoded with `enc`; does not change the global random states."""
    endoftext, _, im_end = control_ids(config.n_vocab)
    if chat:
        prompt = encode_chat([{"role": "user", "content": "Hello! How are you?"}], True, enc=enc)
    else:
        prompt = [endoftext]
    generator = torch.Generator(config.device).manual_seed(config.seed + iter_num)
    stop_ids = (endoftext, im_end)
    max_tokens = min(60, config.block_size - len(prompt))
    steps = generate(model, [prompt], max_tokens, PREVIEW_SAMPLING, generator=generator, stop_ids=stop_ids)
    is_frozen = config.lora_rank is not None  # then the matrices have the precision of the products
    with autocast(config.device, config.dtype if is_frozen else "float32"):
        ids = [int(step[0]) for step in steps]
    return enc.decode([token_id for token_id in ids if token_id not in stop_ids])


class Sampler:
    """Prints a sample of the model at an evaluation, or nothing if the tokenizer cannot be loaded.

    `load` returns the encoding or raises UserError; it is called once.
    """

    def __init__(self, load: Callable[[], tiktoken.Encoding] = get_extended_tokenizer):
        self.load = load
        self.enc: tiktoken.Encoding | None = None
        self.is_loaded = False

    def __call__(self, model: GPT, config: RunConfig, chat: bool, iter_num: int) -> None:
        if not self.is_loaded:
            self.is_loaded = True
            with contextlib.suppress(UserError):
                self.enc = self.load()
        if self.enc is None:
            return
        # torch has no deterministic cumsum for CUDA, so with determinism sampling would raise an error.
        torch.use_deterministic_algorithms(False)
        text = sample_text(model, config, self.enc, chat, iter_num)
        torch.use_deterministic_algorithms(config.deterministic)
        print(f"  sample: {text.strip()!r}")
