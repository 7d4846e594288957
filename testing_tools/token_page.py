"""A self-contained HTML page on which every token of a text has the colour of its loss.

page = losses_page("story5000: loss of each token", ids, token_losses(ids, log_probabilities), n_prompt=9)
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

from torch import Tensor

from setup_tokenizer import GPT2, Tokenizer

TOP_LOSS = 8.0  # nats; this loss and all above have the same colour
COLOURS = ((255, 250, 240), (253, 187, 99), (200, 50, 40), (90, 10, 30))  # from loss 0 to TOP_LOSS
RGB = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """What a model expected of one token: its probability, its rank (1 is the likeliest), its loss in nats."""

    token_id: int
    text: str
    probability: float
    rank: int
    loss: float


def token_losses(ids: Sequence[int], log_probabilities: Tensor, tokenizer: Tokenizer = GPT2) -> list[TokenLoss]:
    """How the model saw each id but the first, from the log probabilities (T, n_vocab) after each of T ids."""
    seen = []
    for token_id, scores in zip(ids[1:], log_probabilities[:-1], strict=True):
        loss = -scores[token_id].item()
        rank = 1 + int((scores > scores[token_id]).sum())
        seen.append(TokenLoss(token_id, tokenizer.token_text(token_id), math.exp(-loss), rank, loss))
    return seen


def shown(token_id: int, tokenizer: Tokenizer = GPT2) -> str:
    """A token as text; an id that only pads the vocabulary has none."""
    return tokenizer.token_text(token_id) if token_id < tokenizer.n_vocab else "(padding)"


def percent(probability: float) -> str:
    """A probability in percent, or as a power of ten if two decimals of a percent would show 0.

    >>> percent(0.25), percent(0.00002)
    ('25.00%', '2.0e-05')
    """
    return f"{probability:.2%}" if probability >= 0.0001 else f"{probability:.1e}"


def loss_colour(loss: float) -> RGB:
    """The background of a token, red, green and blue in 0..255, for its loss in nats."""
    position = min(max(loss, 0.0), TOP_LOSS) / TOP_LOSS * (len(COLOURS) - 1)
    index = min(int(position), len(COLOURS) - 2)
    share = position - index
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(COLOURS[index], COLOURS[index + 1], strict=True))
    return red, green, blue


def luminance(colour: RGB) -> float:
    """Relative luminance, 0 for black to 1 for white (WCAG 2.2, definition of relative luminance)."""
    channels = [c / 255 for c in colour]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def text_colour(background: RGB) -> RGB:
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
.legend span {{ display: inline-block; padding: .15em .6em; text-align: center; line-height: 1.3; }}
table {{ border-collapse: collapse; line-height: 1.4; }}
th, td {{ padding: .1em .8em; text-align: right; border-bottom: 1px solid #ccc; }}
th:last-child, td:last-child {{ text-align: left; font-family: ui-monospace, monospace; white-space: pre; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>The colour of a token shows its loss: how little the model expected it after the text before. The loss in nats is
-ln(probability), so 0 is a token that the model was sure of, and each 2.3 more is a tenth of the probability. Guessing
among all {n_vocab:,} tokens would cost {uniform:.1f} nats. Point at a token for its probability and its rank.</p>
<p class="legend">{legend}</p>
{sections}
<details>
<summary>All tokens as a table</summary>
<table>
<tr><th>position</th><th>id</th><th>probability</th><th>rank</th><th>loss (nats)</th><th>token</th></tr>
{rows}
</table>
</details>
</body>
</html>
"""


def losses_page(
    title: str, ids: Sequence[int], seen: Sequence[TokenLoss], n_prompt: int, tokenizer: Tokenizer = GPT2
) -> str:
    """The page for ids: the first `n_prompt` are the prompt, the others are the model's reply.

    `seen` are the losses of all ids but the first, which is given. Each token has its numbers as a tooltip and in a
    table.
    """
    spans = [f"<span>{html.escape(shown(ids[0], tokenizer))}</span>", *(_span(token, tokenizer) for token in seen)]
    sections = [_section("Prompt", spans[:n_prompt], seen[: n_prompt - 1])]
    if len(ids) > n_prompt:
        sections.append(_section("Reply, the likeliest token each time", spans[n_prompt:], seen[n_prompt - 1 :]))
    n_vocab = tokenizer.n_vocab
    return PAGE.format(
        title=html.escape(title),
        n_vocab=n_vocab,
        uniform=math.log(n_vocab),
        legend=_legend(),
        sections="\n".join(sections),
        rows="\n".join(_row(position, token) for position, token in enumerate(seen, 1)),
    )


def _legend() -> str:
    """The colours of whole losses, with the probabilities that they correspond to."""
    steps = [TOP_LOSS * step / 8 for step in range(9)]
    labels = [f"{loss:g}{'+' if loss == TOP_LOSS else ''}<br>{_short_percent(math.exp(-loss))}" for loss in steps]
    return " ".join(f'<span style="{style(loss)}">{label}</span>' for loss, label in zip(steps, labels, strict=True))


def _short_percent(probability: float) -> str:
    return f"{100 * probability:.2g}%" if probability < 1 else "100%"


def _section(heading: str, spans: Sequence[str], seen: Sequence[TokenLoss]) -> str:
    mean = sum(token.loss for token in seen) / max(1, len(seen))
    perplexity = math.exp(min(mean, 700))
    counts = f"{len(seen)} tokens, mean loss {mean:.3f} nats per token (perplexity {perplexity:.4g})"
    return f'<h2>{heading}</h2>\n<p>{counts}</p>\n<div class="text">{"".join(spans)}</div>'


def _span(token: TokenLoss, tokenizer: Tokenizer) -> str:
    name = html.escape(token.text)
    numbers = f"probability {percent(token.probability)}, rank {token.rank:,}, loss {token.loss:.2f} nats"
    newline = "\n" if b"\n" in tokenizer.token_bytes(token.token_id) else ""
    return f'<span style="{style(token.loss)}" title="{name}: {numbers}">{name}</span>{newline}'


def _row(position: int, token: TokenLoss) -> str:
    name = html.escape(token.text)
    cells = (position, token.token_id, percent(token.probability), f"{token.rank:,}", f"{token.loss:.3f}", name)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
