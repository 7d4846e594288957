"""The rule of --preset auto: which shape, batch and iterations suit a time and a data set.

    shape = choose_shape(Budget(flops=4e13, unique_tokens=2_300_000, n_vocab=4096), SHAPES)

A larger model learns more from each token, but reads fewer tokens in the same time. The rule compares shapes by a loss
that falls as a power of the weights and of the tokens, as in "Training Compute-Optimal Large Language Models" (Hoffmann
et al. 2022, section 3.3). docs/experiments/presets.md explains where the numbers come from. These are pure functions:
the speed of the machine and the size of the data are arguments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from common.flops import block_weights, flops_per_token
from data.epochs import FITTING_EPOCHS
from model import padded_vocab_size


@dataclasses.dataclass(frozen=True)
class Shape:
    """The part of a model's configuration that the rule chooses."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int

    def weights(self) -> int:
        """The weights in the blocks. The embeddings, whose size the vocabulary decides, are not counted."""
        return block_weights(self.n_layer, self.n_embd)

    def flops_per_token(self, n_vocab: int) -> float:
        return flops_per_token(self.n_layer, self.n_embd, padded_vocab_size(n_vocab), self.block_size)


BLOCK_SIZES = (256, 512, 1024)


def longest_block_size(n_embd: int) -> int:
    """The longest context that suits a width: at most 4 times as many tokens, but at least 256.

    >>> [longest_block_size(n_embd) for n_embd in (32, 96, 128, 768)]
    [256, 256, 512, 1024]
    """
    return max((size for size in BLOCK_SIZES if size <= 4 * n_embd), default=BLOCK_SIZES[0])


# From 0.1 to 85 million weights in the blocks; the last one is GPT-2's smallest. tiny and small are among them.
SHAPES = tuple(
    Shape(n_layer, n_head, n_embd, longest_block_size(n_embd))
    for n_layer, n_head, n_embd in (
        (2, 2, 64),
        (2, 3, 96),
        (4, 4, 128),
        (4, 6, 192),
        (4, 4, 256),
        (6, 5, 320),
        (6, 6, 384),
        (8, 8, 512),
        (10, 10, 640),
        (12, 12, 768),
    )
)
HEADS = {shape.n_embd: shape.n_head for shape in SHAPES}

EXPONENT = 0.25  # of weights and of tokens
TOKENS_PER_WEIGHT = 15.0  # at the best shape, if the head and attention cost nothing
# Tokens that were read before teach less: after this many repetitions, a third as much ("Scaling Data-Constrained
# Language Models", Muennighoff et al. 2023, section 3).
REPETITIONS = 15.0
# A model with many more weights than its data have tokens memorizes them. Models up to `tiny` may do so.
WEIGHTS_PER_TOKEN, FREE_WEIGHTS = 2.0, block_weights(4, 128)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run has: its FLOPs, the tokens of its data, and the ids of its vocabulary."""

    flops: float
    unique_tokens: float
    n_vocab: int

    def tokens_read(self, shape: Shape) -> float:
        """The tokens that a shape reads in the run: at most FITTING_EPOCHS."""
        within = self.flops / shape.flops_per_token(self.n_vocab)
        return min(within, FITTING_EPOCHS * self.unique_tokens)

    def suits(self, shape: Shape) -> bool:
        """Whether a shape is small enough for the data."""
        return shape.weights() <= max(WEIGHTS_PER_TOKEN * self.unique_tokens, FREE_WEIGHTS)


def choose_shape(budget: Budget, shapes: Sequence[Shape], fits: Callable[[Shape], bool] = lambda shape: True) -> Shape:
    """The shape with the lowest expected loss among those that suit the budget and fit into memory.

    If there is no such shape, the one with the fewest FLOPs per token.
    """
    suitable = [shape for shape in shapes if budget.suits(shape) and fits(shape)]
    if not suitable:
        return min(shapes, key=lambda shape: shape.flops_per_token(budget.n_vocab))
    return min(suitable, key=lambda shape: expected_loss(shape.weights(), budget.tokens_read(shape), budget))


def expected_loss(weights: float, tokens: float, budget: Budget) -> float:
    """What the rule minimizes: the loss above the lowest one possible, in arbitrary units."""
    return weights**-EXPONENT + (effective_tokens(tokens, budget.unique_tokens) / TOKENS_PER_WEIGHT) ** -EXPONENT


def effective_tokens(tokens: float, unique_tokens: float) -> float:
    """How many tokens, each read only once, would teach as much as `tokens` read from `unique_tokens`.

    >>> effective_tokens(1000, 1000), round(effective_tokens(4000, 1000))
    (1000.0, 3719)
    """
    repeated = max(0.0, tokens / unique_tokens - 1)
    return min(tokens, unique_tokens) + unique_tokens * REPETITIONS * (1 - math.exp(-repeated / REPETITIONS))


# --- heads, context, batch and iterations ---

# The tokens of an iteration grow with those of the run, fitted to what worked: 4,096 for 6.4 million (small models of
# stories and chats), and half a million for 10 billion (GPT-2).
KNOWN_TOKENS, KNOWN_TOKENS_PER_ITER, BATCH_EXPONENT = 6.4e6, 4096, 2 / 3
TOKENS_PER_ITER = (1024, 1 << 19)  # fewest and most
MAX_EVAL_INTERVAL = 250  # of train.py's default


def heads_of(n_embd: int) -> int:
    """The heads of a width: those of its shape or, for a width without one, the most that are at least 32 wide, or 1.

    >>> heads_of(256), heads_of(100)
    (4, 2)
    """
    most = max((heads for heads in range(1, n_embd // 32 + 1) if n_embd % heads == 0), default=1)
    return HEADS.get(n_embd, most)


def fitting_block_size(tokens: float) -> int:
    """The smallest of BLOCK_SIZES that holds this many tokens, or else the largest.

    >>> [fitting_block_size(tokens) for tokens in (0, 205, 400, 5000)]
    [256, 256, 512, 1024]
    """
    return next((size for size in BLOCK_SIZES if size >= tokens), BLOCK_SIZES[-1])


def rows_per_iter(tokens: float, block_size: int) -> int:
    """The rows of an iteration in a run that reads `tokens`: a power of two.

    >>> [rows_per_iter(tokens, 256) for tokens in (100_000, 6_400_000, 1e8)]
    [4, 16, 128]
    """
    fewest, most = TOKENS_PER_ITER
    wanted = KNOWN_TOKENS_PER_ITER * (tokens / KNOWN_TOKENS) ** BATCH_EXPONENT
    return max(1, 2 ** round(math.log2(min(most, max(fewest, wanted)) / block_size)))


def iters_within(seconds: float, iter_s: float, eval_s: float, eval_interval: int | None = None) -> int:
    """The iterations that fit into a time together with the evaluations, at least 1; rounded down to three digits.

    Training gets at least half of the time.
    """
    if eval_interval is None:
        iters = min((seconds - 6 * eval_s) / iter_s, (seconds - 2 * eval_s) / (iter_s + eval_s / MAX_EVAL_INTERVAL))
    else:
        iters = (seconds - 2 * eval_s) / (iter_s + eval_s / eval_interval)
    return max(1, round_down(int(max(iters, 0.5 * seconds / iter_s))))


def n_evaluations(iters: int, eval_interval: int | None = None) -> int:
    """How often a run is evaluated: at the start, at the end, and by default 3 times between or every 250 iterations.

    >>> n_evaluations(100), n_evaluations(2000), n_evaluations(100, 10)
    (5, 9, 11)
    """
    return 1 + math.ceil(iters / (eval_interval or min(MAX_EVAL_INTERVAL, max(1, iters // 4))))


def round_down(number: int) -> int:
    """A number rounded down to three significant digits.

    >>> round_down(97), round_down(12_345)
    (97, 12300)
    """
    unit = 10 ** max(0, len(str(number)) - 3)
    return number // unit * unit
