"""The work of a training step, from a model's shape alone."""

from __future__ import annotations

ROWS_MULTIPLE = 64  # the embedding's rows are padded to a multiple of this


def flops_per_token(n_layer: int, n_embd: int, n_vocab: int, block_size: int) -> float:
    """FLOPs of a training step per token, as `GPT.flops_per_token` counts them, without biases and LayerNorms.

    Six per weight of a matrix, including the head's, and 12 L C T for attention.
    """
    n_rows = -(-n_vocab // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return 6 * (block_weights(n_layer, n_embd) + n_rows * n_embd) + 12 * n_layer * n_embd * block_size


def block_weights(n_layer: int, n_embd: int) -> int:
    """The weights in the blocks' matrices.

    >>> block_weights(12, 768)
    84934656
    """
    return 12 * n_layer * n_embd**2
