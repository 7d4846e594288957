"""Rows for tokens that a trained embedding does not have."""

from __future__ import annotations

import torch
from torch import Tensor


def extended_embedding(embedding: Tensor, n_text: int, vocab_size: int) -> Tensor:
    """An embedding (V, C) with `vocab_size` rows; each new row is the mean of the first `n_text` rows, those of text.

    A new token's logit is then the mean of all logits. With a small random row it would be near 0, far above the logits
    of a trained model ("Initializing New Word Embeddings for Pretrained Language Models", Hewitt 2021).
    """
    # In float64, so that the rounded result, and with it the weights' digest, is the same on every machine.
    mean = embedding[:n_text].double().mean(0, keepdim=True).float()
    return torch.cat([embedding, mean.expand(vocab_size - len(embedding), -1)])
