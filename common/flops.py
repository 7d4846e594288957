"""The FLOPs of a training step, computed from a model's shape alone."""

from __future__ import annotations


def flops_per_token(n_layer: int, n_embd: int, vocab_size: int, block_size: int) -> float:
    """FLOPs of a training step per token, as `GPT.flops_per_token` counts them, without biases and LayerNorms.

    Six per weight of a matrix, including the head's, and 12 L C T for attention. `vocab_size` counts the embedding's
    rows, with their padding (`model.padded_vocab_size`).
    """
    return 6 * (block_weights(n_layer, n_embd) + vocab_size * n_embd) + 12 * n_layer * n_embd * block_size


def block_weights(n_layer: int, n_embd: int) -> int:
    """The weights in the blocks' matrices.

    >>> block_weights(12, 768)
    84934656
    """
    return 12 * n_layer * n_embd**2
