"""Look inside a model: what it expects next, where each head looks, and which tokens of a text surprise it.

    python testing_tools/inspect_model.py models/story5000.pt --prompt "Once upon a time, there was a little"

Prints the likeliest next tokens and writes two files: `<checkpoint>-attention.png`, the attention of every head in
every layer, and `<checkpoint>-tokens.html`, the prompt and the model's reply with each token coloured by its loss.
A model trained on chat gets the prompt as the user's message.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from token_page import losses_page, percent, shown, token_losses

from common.cli import UserError, check_options, option, parse_options, run_script
from common.device import choose_device, device_option
from common.files import atomic_write
from exchange.loading import load_model
from generation.decoding import generate
from generation.sampling import GREEDY
from model import GPT
from setup_tokenizer import GPT2, Tokenizer

MAX_LABELS = 32  # with more tokens, the axes show positions instead of tokens


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Which model to inspect, and with what."""

    checkpoint: str = option(None, "the checkpoint to inspect", positional=True, nargs=None)
    prompt: str | None = option(None, "the text, or for a chat model the user's message (default: a short one)")
    max_tokens: int = option(40, "longest reply on the page; 0 for none", at_least=0)
    top_k: int = option(10, "next tokens in the table", at_least=1)
    layer: int | None = option(None, "draw only the heads of this layer, larger; the first is 0", at_least=0)
    output_dir: str | None = option(None, "folder of the two files (default: the checkpoint's)", metavar="DIR")
    device: str | None = device_option(None)

    def __post_init__(self) -> None:
        check_options(self)


def prompt_ids(prompt: str | None, is_chat: bool, tokenizer: Tokenizer = GPT2) -> list[int]:
    """A prompt as gen.py gives it to the model: after `<|endoftext|>`, or as the user's message in ChatML."""
    if is_chat:
        message = {"role": "user", "content": prompt or "Hello! How are you?"}
        return tokenizer.encode_chat([message], add_generation_prompt=True)
    text = "Once upon a time, there was a little" if prompt is None else prompt
    return [tokenizer.endoftext, *tokenizer.encode_text(text)]


def reply_ids(model: GPT, prompt: list[int], max_tokens: int, tokenizer: Tokenizer = GPT2) -> list[int]:
    """What the model replies, the likeliest token each time, up to and including the token that ends the reply."""
    room = model.config.block_size - len(prompt)
    stop_ids = (tokenizer.endoftext, tokenizer.im_end)
    if not min(max_tokens, room):
        return []
    steps = generate(model, [prompt], min(max_tokens, room), GREEDY, stop_ids=stop_ids)
    return [int(ids[0]) for ids in steps]


@torch.inference_mode()
def look(model: GPT, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The log probabilities (T, n_vocab) after each of T ids, and the attention (n_layer, H, T, T), on the CPU.

    Row t of a map says how much position t attends to each position up to t; it sums to 1. The maps are computed again
    from the output of each layer's c_attn, because the model's fused attention never stores them.
    """
    projections: list[Tensor] = []
    blocks: Any = model.h
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda module, inputs, output: projections.append(output))
        for block in blocks
    ]
    try:
        hidden = model.hidden(torch.tensor([ids], device=model.wte.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    maps = [attention_map(projection[0], model.config.n_head) for projection in projections]
    return model.logits(hidden[0]).log_softmax(-1).cpu(), torch.stack(maps).cpu()


def attention_map(projection: Tensor, n_head: int) -> Tensor:
    """The causal attention (H, T, T) of one layer from its queries, keys and values (T, 3 C).

    softmax(q k / sqrt(D)), "Attention Is All You Need" (Vaswani et al. 2017, section 3.2.1).
    """
    T = len(projection)
    q, k, _ = projection.float().view(T, 3, n_head, -1).permute(1, 2, 0, 3)  # (H, T, D)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    is_later = torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(is_later, -math.inf).softmax(-1)


def print_next_tokens(log_probabilities: Tensor, top_k: int, tokenizer: Tokenizer = GPT2) -> None:
    """Print the likeliest ids at one position (n_vocab,) as a table."""
    values, ids = log_probabilities.topk(min(top_k, len(log_probabilities)))
    print(f"{'rank':>4} {'id':>6} {'probability':>11}  token")
    for rank, (value, token_id) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), 1):
        print(f"{rank:>4} {token_id:>6} {percent(math.exp(value)):>11}  {shown(token_id, tokenizer)!r}")


def draw_attention(path: Path, maps: Tensor, labels: Sequence[str], title: str, first_layer: int = 0) -> None:
    """Draw attention maps (layers, H, T, T) as a PNG: one row per layer, one column per head, T labels of the tokens.

    Raises UserError if matplotlib is missing.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib; run: pip install -r requirements.txt") from error
    n_layer, n_head, T, _ = maps.shape
    is_labelled = T <= MAX_LABELS
    panel = max(1.5, 0.15 * T) if is_labelled else 3.0 if n_layer == 1 else 1.8  # inches
    figure = Figure(figsize=(n_head * panel + 2.5, n_layer * panel + 1.7), layout="constrained", dpi=100)
    is_later = torch.ones(T, T, dtype=torch.bool).triu(1)
    norm = PowerNorm(0.5, 0, 1)  # the square root makes the many small weights of a long text visible
    grid = figure.subplots(n_layer, n_head, squeeze=False, sharex=True, sharey=True)
    for layer, row in enumerate(grid):
        for head, axes in enumerate(row):
            weights = maps[layer, head].masked_fill(is_later, math.nan).numpy()  # later positions stay white
            axes.imshow(weights, norm=norm, cmap="viridis")
            axes.set_title(f"layer {first_layer + layer}, head {head}", fontsize=9)
            if is_labelled:
                axes.set_xticks(range(T), labels, rotation=90, fontsize=7, parse_math=False)
                axes.set_yticks(range(T), labels, fontsize=7, parse_math=False)
    what = "token" if is_labelled else "position"
    figure.supxlabel(f"{what} attended to", fontsize=10)
    figure.supylabel(f"attending {what}", fontsize=10)
    figure.suptitle(title, fontsize=11, parse_math=False)
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=grid, fraction=0.03, aspect=30, ticks=ticks)
    bar.set_label("attention weight", fontsize=10)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks], fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def axis_label(text: str) -> str:
    """A token's text as a short label, in characters that matplotlib's own font has."""
    text = "".join(c if ord(c) < 0x250 else c.encode("ascii", "backslashreplace").decode() for c in text)
    text = text if len(text) <= 14 else text[:13] + "\u2026"
    return text if text.strip() else repr(text)


def inspect(options: InspectOptions) -> list[Path]:
    """Print the table and write the two files; returns their paths."""
    path = Path(options.checkpoint)
    model, info = load_model(path, choose_device(options.device))
    tokenizer = Tokenizer.from_info(info, options.checkpoint)
    prompt = prompt_ids(options.prompt, info.get("format") == "chat", tokenizer)
    folder = check_inspection(options, path, model, prompt)
    if len(prompt) > model.config.block_size:
        print(f"note: the prompt has {len(prompt)} tokens; only the last {model.config.block_size} are used")
        prompt = prompt[-model.config.block_size :]
    n_prompt = len(prompt)
    try:
        ids = [*prompt, *reply_ids(model, prompt, options.max_tokens, tokenizer)]
    except FloatingPointError as error:
        raise UserError(f"the logits of {path} are not finite; use another checkpoint") from error
    log_probabilities, maps = look(model, ids)
    if not log_probabilities.isfinite().all():
        raise UserError(f"the logits of {path} are not finite; use another checkpoint")
    print_next_tokens(log_probabilities[n_prompt - 1], options.top_k, tokenizer)

    picture, page = folder / f"{path.stem}-attention.png", folder / f"{path.stem}-tokens.html"
    first_layer, last_layer = (0, None) if options.layer is None else (options.layer, options.layer + 1)
    maps = maps[first_layer:last_layer, :, :n_prompt, :n_prompt]
    labels = [axis_label(tokenizer.token_text(token_id)) for token_id in prompt]
    draw_attention(picture, maps, labels, f"{path.stem}: attention weights, each row sums to 1", first_layer)
    title = f"{path.stem}: loss of each token"
    with atomic_write(page, "w", encoding="utf-8") as file:
        file.write(losses_page(title, ids, token_losses(ids, log_probabilities, tokenizer), n_prompt, tokenizer))
    for file_path in (picture, page):
        print(f"wrote {file_path}")
    return [picture, page]


def check_inspection(options: InspectOptions, path: Path, model: GPT, prompt: list[int]) -> Path:
    """The folder to write into. Raises UserError for options that do not fit the model, or a missing folder."""
    if max(prompt) >= model.config.n_vocab:
        raise UserError(f"{path} has only {model.config.n_vocab} ids, too few for this prompt; use another checkpoint")
    if options.layer is not None and options.layer >= model.config.n_layer:
        raise UserError(
            f"--layer {options.layer} does not exist; {path} has the layers 0 to {model.config.n_layer - 1}"
        )
    folder = Path(options.output_dir) if options.output_dir else path.parent
    if not folder.is_dir():
        raise UserError(f"--output_dir {folder} does not exist; run: mkdir -p {folder}")
    return folder


def main() -> None:
    inspect(parse_options(InspectOptions, __doc__))


if __name__ == "__main__":
    run_script(main)
