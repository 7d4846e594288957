"""The GPT-2 network: configuration, layers, logits, loss and the key-value cache.

    model = GPT(PRESETS["small"])
    logits, _ = model(idx)           # ids (B, T) -> logits of the next id (B, T, n_vocab)
    _, loss = model(idx, targets)    # mean cross entropy in nats per target

After "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019, section 2.3) and the code released
with it. This file is the plain version and works alone; fast/ can replace its parts from outside with modules that
compute the same numbers faster or in less memory.

Shapes: B batch, T time (tokens), C n_embd, H n_head, D head size (C / H), V vocab_size, L n_layer.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a target that does not count; the value that F.cross_entropy ignores by default


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Raises ValueError if the numbers do not fit together."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # rows of the embedding: n_vocab padded to a multiple of 64, which GPUs multiply faster
    n_vocab: int = 50259  # ids that the tokenizer has: GPT-2's 50257 and two for ChatML; padding ids are never sampled
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # 0 is best for pretraining in a few epochs; try 0.1 or more when fine-tuning on little data
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_vocab", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.n_vocab > self.vocab_size:
            raise ValueError(f"n_vocab ({self.n_vocab}) must not exceed vocab_size ({self.vocab_size})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


def padded_vocab_size(n_vocab: int) -> int:
    """The rows of the embedding for `n_vocab` ids: the next multiple of 64."""
    return -(-n_vocab // 64) * 64


# OpenAI's four published sizes, and two that train in minutes on a laptop's CPU.
PRESETS = {
    "tiny": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128),
    "small": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256),
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


class KVCache:
    """Keys and values of the tokens seen so far, so that generating a token does not recompute those before it.

    Allocated once, for block_size tokens per row. The nth token of a row is stored at position n, so rows of different
    lengths need no padding on the left. `tokens` lists the ids in the cache for each row.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        # Zeros rather than empty memory: a masked position still enters the sum with weight 0, and 0 * NaN is NaN.
        self.keys_values = torch.zeros(shape, device=device, dtype=dtype)  # (L, 2, B, H, block_size, D)
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]

    def select(self, positions: slice | Tensor, end: int, rows: slice = slice(None)) -> None:
        """Choose where `update` writes and what it returns: `positions` of `rows`, and the first `end` positions.

        `positions` is a slice, the same for all rows, or a tensor (B,) with one position for each row.
        """
        self.positions, self.rows = positions, rows
        held = self.keys_values[:, :, rows]
        self.visible = held[..., :end, :].unbind()  # a view for each layer, made once for all of them
        if isinstance(positions, slice):
            self.target = held[..., positions, :].unbind()
        else:
            self.target = held.unbind()
            self.each_row = torch.arange(len(positions), device=positions.device)

    def update(self, layer: int, keys_values: Tensor) -> Tensor:
        """Store new keys and values (2, B, H, T, D) of a layer; returns all those that its queries may attend to."""
        target = self.target[layer]
        if isinstance(self.positions, slice):
            target.copy_(keys_values)
        else:  # T is 1: each row has its own position
            target[:, self.each_row, :, self.positions] = keys_values[:, :, :, 0].transpose(0, 1)  # (B, 2, H, D)
        return self.visible[layer]


class Attention(nn.Module):
    """Causal multi-head self-attention ("Attention Is All You Need", Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        # q, k and v in one product: one large matrix product is faster than three small ones.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)  # mixes what the heads have found

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, kv = qkv[0], qkv[1:]
        if cache is not None:
            kv = cache.update(self.layer, kv)  # (2, B, H, end, D)
        y = self.attend(q, kv[0], kv[1], mask)  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # the heads side by side: (B, T, C)
        return F.dropout(y, self.dropout, self.training)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k' / sqrt(D)) v: each query attends to the keys up to its own position, or to those in `mask`.

        sqrt(D) keeps the scores' variance near 1, because a softmax of large scores has almost no gradient.
        """
        dropout = self.dropout if self.training else 0.0
        is_causal = mask is None and q.shape[2] > 1  # a single query, the newest token, attends to all keys
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


class MLP(nn.Module):
    """Two linear layers with a GELU in between, applied to each position on its own."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2's weights were trained with the tanh approximation of GELU ("Gaussian Error Linear Units", Hendrycks and
        # Gimpel 2016); the exact GELU would give slightly different outputs.
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention and MLP, each applied to a LayerNorm of the residual stream and added to it (pre-norm).

    The residual stream itself is not normalized between layers, so gradients flow through it directly to every layer.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: token and learned position embeddings, n_layer blocks, a final LayerNorm, and a head.

    The head shares its weight with the token embedding ("Using the Output Embedding to Improve Language Models", Press
    and Wolf 2017), so there is no separate module for it. In GPT-2 124M this saves about a quarter of the parameters.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # Each block adds to the residual stream twice; this keeps its variance independent of depth.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)  # as in GPT-2's code
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        n_targets: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of ids (B, T), or with `targets` (B, T) their loss.

        Returns (logits (B, T, n_vocab) in float32, None) or (None, loss), where the loss is the mean cross entropy in
        nats over the targets that are not IGNORED. `n_targets` replaces the number to divide by: the iteration's
        number of targets, so that the losses and gradients of its micro-batches add up to those of one large batch.
        With `documents` (B, T) attention stays within the ids of a row that have the same number. `positions` (B, T)
        are 0 to T - 1 by default. Raises ValueError for more than block_size ids.
        """
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f"{idx.shape[1]} tokens exceed block_size ({self.config.block_size})")
        mask = None if documents is None else self.document_mask(documents)
        x = self.hidden(idx, positions=positions, mask=mask)
        if targets is None:
            return self.logits(x), None
        if n_targets is None:
            n_targets = (targets != IGNORED).sum().clamp(min=1)  # a batch without a target has the loss 0, not NaN
        # All V rows, the padding ids too: they are never targets, so training makes them improbable.
        logits = F.linear(x, self.wte.weight).flatten(0, 1)  # (B * T, V)
        return None, F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum") / n_targets

    def hidden(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The output of the final LayerNorm, (B, T, C), for ids (B, T).

        `positions` (T,) or (B, T) are 0 to T - 1 by default. Attention is causal unless `mask` says otherwise: bool
        (..., T, keys), True where a query may attend to a key, or numbers that are added to the scores.
        """
        return self.transform(self.wte(idx), cache, positions, mask)

    def transform(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`hidden` for token embeddings (B, T, C) instead of ids; separate, so that fast/ can replace the embedding."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        x = F.dropout(x + self.wpe(positions), self.config.dropout, self.training)
        return self.run_blocks(x, cache, mask)

    def run_blocks(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """The output of the final LayerNorm, (B, T, C), for the sum of both embeddings (B, T, C)."""
        for block in self.h:
            x = block(x, cache, mask)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., n_vocab) of `hidden`'s output (..., C); the padding ids have none.

        In float32, because bfloat16 has too few digits for a softmax over so many ids.
        """
        return F.linear(hidden, self.wte.weight[: self.config.n_vocab]).float()

    def document_mask(self, documents: Tensor) -> Tensor:
        """The mask (B, 1, T, T), the same for all layers, that keeps causal attention within documents (B, T)."""
        if documents.is_cuda:  # with a mask, cuDNN's backward pass gives NaN for some lengths (PyTorch issue 196678)
            torch.backends.cuda.enable_cudnn_sdp(False)
        T = documents.shape[1]
        is_causal = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
        return ((documents[:, :, None] == documents[:, None, :]) & is_causal)[:, None]

    def n_params(self) -> int:
        """The number of parameters; the shared embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """FLOPs of the forward and backward pass per token: 6 per weight in a product, and 12 L C T for attention.

        A weight takes one multiplication and one addition forward, and twice that backward. After "PaLM" (Chowdhery et
        al. 2022, appendix B), without the position embedding, which is only looked up.
        """
        config = self.config
        return 6 * (self.n_params() - self.wpe.weight.numel()) + 12 * config.n_layer * config.n_embd * config.block_size
