"""Look inside a model: what it expects next, where each head looks, and which tokens of a text surprise it.

    python testing_tools/inspect_model.py models/story5000.pt --prompt "Once upon a time, there was a little"

Prints the likeliest next tokens and writes two files: `<checkpoint>-attention.png`, the attention of every head in
every layer, and `<checkpoint>-tokens.html`, the text coloured by the loss of each token. A model trained on chat gets
the prompt as the user's message.
"""

from __future__ import annotations

import dataclasses
import html
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from common.cli import UserError, option, parse_options, run_script
from common.device import choose_device
from common.files import atomic_write
from exchange.loading import load_model
from model import GPT
from setup_tokenizer import ENDOFTEXT_ID, encode_chat, encode_text, get_extended_tokenizer, token_text

MOST_LABELS = 32  # tokens that are named at the axes; the places of longer texts are numbered
TOP_LOSS = 8.0  # nats; the colour of this loss and of all above
COLOURS = ((255, 250, 240), (253, 187, 99), (200, 50, 40), (90, 10, 30))  # from loss 0 to TOP_LOSS


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    checkpoint: str = option(None, "the checkpoint to look into", positional=True, nargs=None)
    prompt: str | None = option(None, "the text, or for a chat model the user's message (default: a short one)")
    top_k: int = option(10, "next tokens in the table")
    layer: int | None = option(None, "draw this layer's heads alone, larger; the first is 0")
    output_dir: str | None = option(None, "folder of the two files (default: the checkpoint's)", metavar="FOLDER")
    device: str | None = option(None, "cpu, mps, cuda, cuda:N (default: asks, or takes the best one)")

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """How a model saw one token of a text: its probability, its rank (1 is the likeliest), its loss in nats."""

    token_id: int
    text: str
    probability: float
    rank: int
    loss: float


def prompt_ids(prompt: str | None, is_chat: bool) -> list[int]:
    """A prompt as gen.py gives it to the model: behind `<|endoftext|>`, or as the user's message in ChatML."""
    if is_chat:
        return encode_chat([{"role": "user", "content": prompt or "Hello! How are you?"}], add_generation_prompt=True)
    return [ENDOFTEXT_ID, *encode_text("Once upon a time, there was a little" if prompt is None else prompt)]


@torch.inference_mode()
def look(model: GPT, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The log probabilities (T, n_vocab) after each of T ids, and the attention (n_layer, H, T, T) on the CPU.

    Row t of a map says how much place t looks at each place up to it; it sums to 1. The maps are computed again from
    what each layer's c_attn gives, because the fused attention of the model never holds them.
    """
    projections: list[Tensor] = []
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda module, inputs, output: projections.append(output))
        for block in model.h
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


def token_losses(ids: Sequence[int], log_probabilities: Tensor) -> list[TokenLoss]:
    """How the model saw each id but the first, from the log probabilities (T, n_vocab) that `look` gives."""
    seen = []
    for token_id, scores in zip(ids[1:], log_probabilities[:-1], strict=True):
        loss = -scores[token_id].item()
        rank = 1 + int((scores > scores[token_id]).sum())
        seen.append(TokenLoss(token_id, token_text(token_id), math.exp(-loss), rank, loss))
    return seen


def print_next_tokens(log_probabilities: Tensor, top_k: int) -> None:
    """Print the likeliest ids of one place (n_vocab,) as a table."""
    values, ids = log_probabilities.topk(min(top_k, len(log_probabilities)))
    print(f"{'rank':>4} {'id':>6} {'probability':>11}  token")
    for rank, (value, token_id) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), 1):
        print(f"{rank:>4} {token_id:>6} {percent(math.exp(value)):>11}  {shown(token_id)!r}")


def shown(token_id: int) -> str:
    """A token as text; an id that only pads the vocabulary has none."""
    return token_text(token_id) if token_id < get_extended_tokenizer().n_vocab else "(padding)"


def draw_attention(path: Path, maps: Tensor, ids: Sequence[int], title: str, first_layer: int = 0) -> None:
    """Draw attention maps (layers, H, T, T) as a PNG: a row for each layer, a column for each head.

    Raises UserError where matplotlib is missing.
    """
    try:
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib; run: pip install -r requirements.txt") from error
    n_layer, n_head, T, _ = maps.shape
    is_labelled = T <= MOST_LABELS
    panel = max(1.5, 0.15 * T) if is_labelled else 3.0 if n_layer == 1 else 1.8  # inches
    figure = Figure(figsize=(n_head * panel + 2.5, n_layer * panel + 1.7), layout="constrained", dpi=100)
    is_later = torch.ones(T, T, dtype=torch.bool).triu(1)
    grid = figure.subplots(n_layer, n_head, squeeze=False, sharex=True, sharey=True)
    for layer, row in enumerate(grid):
        for head, axes in enumerate(row):
            # The square root spreads the small weights, of which a long text has many.
            weights = maps[layer, head].masked_fill(is_later, math.nan).numpy()  # what comes later stays white
            image = axes.imshow(weights, norm=PowerNorm(0.5, 0, 1), cmap="viridis")
            axes.set_title(f"layer {first_layer + layer}, head {head}", fontsize=9)
            if is_labelled:
                names = [axis_label(token_id) for token_id in ids]
                axes.set_xticks(range(T), names, rotation=90, fontsize=7, parse_math=False)
                axes.set_yticks(range(T), names, fontsize=7, parse_math=False)
    what, unit = ("token", "") if is_labelled else ("place", " (tokens)")
    figure.supxlabel(f"{what} that is looked at{unit}", fontsize=10)
    figure.supylabel(f"{what} that looks{unit}", fontsize=10)
    figure.suptitle(title, fontsize=11, parse_math=False)
    bar = figure.colorbar(image, ax=grid, fraction=0.03, aspect=30, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.set_label("attention weight", fontsize=10)
    bar.ax.set_yticklabels(["0", "0.01", "0.05", "0.1", "0.25", "0.5", "1"], fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def axis_label(token_id: int) -> str:
    """A token as a short label in characters that matplotlib's own font has."""
    text = token_text(token_id)
    text = "".join(c if ord(c) < 0x250 else c.encode("ascii", "backslashreplace").decode() for c in text)
    text = text if len(text) <= 14 else text[:13] + "\u2026"
    return text if text.strip() else repr(text)


def percent(probability: float) -> str:
    """A probability for people: in percent, or as a power of ten where two decimals of a percent would say 0."""
    return f"{probability:.2%}" if probability >= 0.0001 else f"{probability:.1e}"


def loss_colour(loss: float) -> tuple[int, int, int]:
    """The background of a token, red, green and blue in 0..255, by its loss in nats."""
    place = min(max(loss, 0.0), TOP_LOSS) / TOP_LOSS * (len(COLOURS) - 1)
    index = min(int(place), len(COLOURS) - 2)
    share = place - index
    return tuple(round(a + (b - a) * share) for a, b in zip(COLOURS[index], COLOURS[index + 1], strict=True))


def luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance, 0 black to 1 white (WCAG 2.2, definition of relative luminance)."""
    channels = [c / 255 for c in colour]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def text_colour(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has more contrast with the background; at least 4.5 to 1."""
    light = luminance(background)
    return (0, 0, 0) if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else (255, 255, 255)


def style(loss: float) -> str:
    """The colours of a loss in CSS."""
    background = loss_colour(loss)
    return f"background:rgb{background};color:rgb{text_colour(background)}"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.9 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #000; background: #fff; }}
.text {{ font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
.text span, .legend span {{ padding: .15em 0; }}
.legend span {{ display: inline-block; padding: .15em .6em; }}
table {{ border-collapse: collapse; line-height: 1.4; }}
th, td {{ padding: .1em .8em; text-align: right; border-bottom: 1px solid #ccc; }}
th:last-child, td:last-child {{ text-align: left; font-family: ui-monospace, monospace; white-space: pre; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<p class="legend">Loss in nats: {legend}</p>
<div class="text">{text}</div>
<details>
<summary>All tokens as a table</summary>
<table>
<tr><th>place</th><th>id</th><th>probability</th><th>rank</th><th>loss (nats)</th><th>token</th></tr>
{rows}
</table>
</details>
</body>
</html>
"""


def losses_page(title: str, first_id: int, seen: Sequence[TokenLoss]) -> str:
    """A self-contained HTML page: each token on the colour of its loss, its numbers as a tooltip and in a table."""
    enc = get_extended_tokenizer()
    mean = sum(token.loss for token in seen) / max(1, len(seen))
    summary = (
        f"{len(seen)} tokens, mean loss {mean:.3f} nats a token (perplexity {math.exp(min(mean, 700)):.2f}). The first "
        "token is given and has no colour. Rest the pointer on a token for its probability and its rank among all."
    )
    legend = " ".join(
        f'<span style="{style(loss)}">{loss:g}{" and more" if loss == TOP_LOSS else ""}</span>'
        for loss in [TOP_LOSS * step / 8 for step in range(9)]
    )
    text = [f"<span>{html.escape(shown(first_id))}</span>"]
    rows = []
    for place, token in enumerate(seen, 1):
        name = html.escape(token.text)
        numbers = f"probability {percent(token.probability)}, rank {token.rank:,}, loss {token.loss:.2f} nats"
        line_end = "\n" if "\n" in enc.decode([token.token_id]) else ""
        text.append(f'<span style="{style(token.loss)}" title="{name}: {numbers}">{name}</span>{line_end}')
        cells = (place, token.token_id, percent(token.probability), f"{token.rank:,}", f"{token.loss:.3f}", name)
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return PAGE.format(
        title=html.escape(title), summary=summary, legend=legend, text="".join(text), rows="\n".join(rows)
    )


def inspect(options: InspectOptions) -> list[Path]:
    """Print the table and write the two files; returns their paths."""
    path = Path(options.checkpoint)
    model, info = load_model(path, choose_device(options.device))
    ids = prompt_ids(options.prompt, info.get("format") == "chat")
    if max(ids) >= model.config.n_vocab:
        raise UserError(f"{path} has {model.config.n_vocab} ids and the prompt needs more; its tokenizer is another")
    if len(ids) > model.config.block_size:
        print(f"note: the prompt has {len(ids)} tokens; the last {model.config.block_size} are looked at")
        ids = ids[-model.config.block_size :]
    if options.layer is not None and not 0 <= options.layer < model.config.n_layer:
        raise UserError(f"--layer {options.layer}: {path} has the layers 0 to {model.config.n_layer - 1}")
    folder = Path(options.output_dir) if options.output_dir else path.parent
    if not folder.is_dir():
        raise UserError(f"--output_dir {folder}: no such folder; make it first or name another")
    log_probabilities, maps = look(model, ids)
    if not log_probabilities.isfinite().all():
        raise UserError(f"the logits of {path} are not finite; use another checkpoint")
    print_next_tokens(log_probabilities[-1], options.top_k)
    written = [folder / f"{path.stem}-attention.png", folder / f"{path.stem}-tokens.html"]
    first_layer, last_layer = (0, None) if options.layer is None else (options.layer, options.layer + 1)
    draw_attention(
        written[0],
        maps[first_layer:last_layer],
        ids,
        f"{path.stem}: attention weights, each row sums to 1",
        first_layer,
    )
    page = losses_page(f"{path.stem}: loss of each token", ids[0], token_losses(ids, log_probabilities))
    with atomic_write(written[1], "w", encoding="utf-8") as file:
        file.write(page)
    for file_path in written:
        print(f"wrote {file_path}")
    return written


def main() -> None:
    inspect(parse_options(InspectOptions, __doc__))


if __name__ == "__main__":
    run_script(main)
