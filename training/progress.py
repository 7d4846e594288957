"""What a run tells on the terminal: its data, its speed, and what the model says by now."""

from __future__ import annotations

import functools
import time

import torch

from common.cli import UserError
from common.device import peak_flops
from generation.decoding import generate
from generation.sampling import Sampling
from model import GPT
from training.mixture import data_parts


def describe_data(facts: dict) -> list[str]:
    """What is trained on, in lines: of each part the counts, source and licence."""
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


def describe_parts(val_losses: dict[str, float]) -> str:
    """Of what a mixture's validation loss is the mean; nothing for one data set."""
    if len(val_losses) == 1:
        return ""
    return "; weighted mean of " + ", ".join(f"{name} {loss:.4f}" for name, loss in val_losses.items())


class Clock:
    """Speed, time left, and the line that shows them."""

    def __init__(self, model: GPT, config, iter_num: int, n_devices: int = 1):
        self.config = config
        self.flops_per_iter = model.flops_per_token() * config.tokens_per_iter
        on_cuda = config.device.startswith("cuda")
        peak = peak_flops(torch.cuda.get_device_name(config.device)) if on_cuda else None
        self.peak_flops = peak and peak * n_devices
        self.restart(iter_num)

    def restart(self, iter_num: int) -> None:
        """Measure from here: what came before (an evaluation, a save) is not training speed."""
        self.start, self.start_iter = time.perf_counter(), iter_num

    def log(self, iter_num: int, loss: float, learning_rate: float, grad_norm: float, skipped: int) -> float:
        """Print a line on the iteration just done; returns tokens a second."""
        s_per_iter = (time.perf_counter() - self.start) / max(1, iter_num - self.start_iter)
        self.restart(iter_num)
        max_iters = self.config.max_iters
        tokens_per_s = self.config.tokens_per_iter / s_per_iter
        mfu = f"{self.flops_per_iter / s_per_iter / self.peak_flops:.1%}" if self.peak_flops else "n/a"
        filled = 20 * iter_num // max_iters
        left = int(s_per_iter * (max_iters - iter_num))
        print(
            f"iter {iter_num:>{len(str(max_iters))}}/{max_iters} [{'#' * filled}{'.' * (20 - filled)}] "
            f"loss {loss:.4f}, lr {learning_rate:.2e}, norm {grad_norm:.2f}, {tokens_per_s:,.0f} tokens/s, mfu {mfu}, "
            f"{left // 60}:{left % 60:02d} left" + (f", {skipped} skipped" if skipped else ""),
            flush=True,
        )
        return tokens_per_s


@functools.cache
def tokenizer_if_there():
    """The tokenizer; None where it cannot be loaded, which is tried once and not at each evaluation."""
    import setup_tokenizer

    try:
        return setup_tokenizer.get_extended_tokenizer()
    except UserError:
        return None


def sample_text(model: GPT, config, chat: bool, iter_num: int) -> str | None:
    """A short text from the model as it stands, None where the tokenizer is missing; leaves the global seeds alone."""
    import setup_tokenizer

    enc = tokenizer_if_there()
    if enc is None:
        return None
    if chat:
        prompt = setup_tokenizer.encode_chat([{"role": "user", "content": "Hello! How are you?"}], True)
    else:
        prompt = [setup_tokenizer.ENDOFTEXT_ID]
    generator = torch.Generator(config.device).manual_seed(config.seed + iter_num)
    stop_ids = (setup_tokenizer.ENDOFTEXT_ID, setup_tokenizer.IM_END_ID)
    max_tokens = min(60, config.block_size - len(prompt))
    steps = generate(model, [prompt], max_tokens, Sampling(0.8, 50), generator=generator, stop_ids=stop_ids)
    ids = [int(step[0]) for step in steps]
    return enc.decode([token_id for token_id in ids if token_id not in stop_ids])


def print_sample(model: GPT, config, chat: bool, iter_num: int) -> None:
    """Show at an evaluation what the model says by now. On CUDA the running sums of sampling have no exact repetition,
    and torch would refuse them."""
    torch.use_deterministic_algorithms(False)
    text = sample_text(model, config, chat, iter_num)
    torch.use_deterministic_algorithms(config.deterministic)
    if text is not None:
        print(f"  sample: {text.strip()!r}")
