"""The GPT-2 network: configuration, layers, loss, KV cache, sampling. Ids in, ids out.

    model = GPT(PRESETS["small"])
    logits, loss = model(idx, targets)                     # training
    for ids in model.generate(idx, max_tokens=100): ...    # one id for each row at a time

After "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019, section 2.3) and the code released
with it. Legend of shapes: B batch, T time, C n_embd, H n_head, D head size (C / H), V vocab_size, N rows of a loss.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generation.cuda_decode import CapturedDecode
from training import cpu_backward
from training.tied_head import IGNORED, TiedHead, transposed

if TYPE_CHECKING:  # a large import, needed for the mask on CUDA alone
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask  # bool (True: may look), numbers added to the scores, or FlexAttention's

ACTIVATION_BUDGET = 0.9  # below 1, torch.compile computes cheap activations again in the backward pass
ENDED = -1  # what `generate` yields for a row that has drawn a stop id


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Raises ValueError where the numbers do not fit together."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # rows of the embedding: n_vocab padded to a multiple of 64, which is faster
    n_vocab: int = 50259  # ids that the tokenizer has; those above are never sampled
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_vocab", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.n_vocab > self.vocab_size:
            raise ValueError(f"n_vocab ({self.n_vocab}) must not exceed vocab_size ({self.vocab_size})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


# The four published sizes, and two that train in minutes on a laptop's CPU.
PRESETS = {
    "tiny": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128),
    "small": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256),
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class KVCache:
    """Keys and values of the tokens seen so far, in one tensor allocated once, with room for block_size tokens a row.

    `tokens` are each row's ids; the keys and values of the nth are stored at position n, so rows of different lengths
    need no padding on the left.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        # Zeros, not what the memory held: a position that is masked out still takes part, with weight 0.
        self.keys_values = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self.captured: CapturedDecode | None = None
        self.select(slice(None), slice(0), 0)

    def select(self, rows: slice | list[int] | Tensor, positions: slice | Tensor, end: int) -> None:
        """Say where the next keys and values go, and that attention looks at the first `end` positions.

        `positions` is the same slice for all `rows`, or a tensor (B,) with one position for each row of the batch.
        """
        self.rows, self.positions, self.end = rows, positions, end
        if isinstance(rows, slice):  # views, made once for all layers
            self.targets = self.keys_values[:, :, rows, :, positions].unbind()
            self.visible = self.keys_values[:, :, rows, :, :end].unbind()

    def write(self, layer: int, keys_values: Tensor) -> Sequence[Tensor]:
        """Store a layer's keys and values (2, B, H, T, D) where `select` said; returns those that attention sees."""
        if isinstance(self.rows, slice):
            self.targets[layer].copy_(keys_values)
            return self.visible[layer].unbind()
        held = self.keys_values[layer]
        if isinstance(self.positions, Tensor):
            held[:, self.rows, :, self.positions] = keys_values[:, :, :, 0].transpose(0, 1)  # (B, 2, H, D)
            return held[:, :, :, : self.end].unbind()
        held[:, self.rows, :, self.positions] = keys_values
        return held[:, self.rows, :, : self.end].unbind()


class Linear(nn.Linear):
    """A linear layer with a faster backward pass for compiled low-precision training on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if is_compiled_cpu_training(self, x) and compute_dtype(self.weight).itemsize == 2:
            return cpu_backward.linear(x, self.weight, self.bias)
        return super().forward(x)


def is_compiled_cpu_training(module: nn.Module, x: Tensor) -> bool:
    """Whether the backward passes of training/cpu_backward.py serve."""
    return module.training and x.device.type == "cpu" and torch.compiler.is_compiling()


class Attention(nn.Module):
    """Causal multi-head self-attention ("Attention Is All You Need", Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Mask | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, k, v = qkv if cache is None else (qkv[0], *cache.write(self.layer, qkv[1:]))
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        """What each query takes from the values that it may look at: all up to its own place unless `mask` is given."""
        if mask is not None and not isinstance(mask, Tensor):
            from torch.nn.attention.flex_attention import flex_attention

            return flex_attention(q, k, v, block_mask=mask)
        dropout = self.dropout if self.training else 0.0
        if is_compiled_cpu_training(self, q) and not dropout:
            return cpu_backward.attention(q, k, v, mask)
        is_causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


class MLP(nn.Module):
    """Two linear layers around GPT-2's tanh approximation of GELU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's approximation of GELU ("Gaussian Error Linear Units", Hendrycks and Gimpel 2016, section 2).

    (1 + tanh(z)) / 2 is sigmoid(2 z), and compiled code makes the sigmoid's exponential in a third of tanh's time.
    """
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x))
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    """One layer: attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.compiled: Callable | None = None  # see GPT.compile_training

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Mask | None = None) -> Tensor:
        return (self.compiled if self.compiled and self.training else self.residuals)(x, cache, mask)

    def residuals(self, x: Tensor, cache: KVCache | None = None, mask: Mask | None = None) -> Tensor:
        """The input and what the layer adds to it."""
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: token and learned position embeddings, n_layer blocks, a final LayerNorm, a head tied to the embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # scaled by depth: two residual additions a layer (GPT-2, section 2.3)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
        self.compiled_transpose: Callable | None = None  # see compile_training
        self.activation_checkpointing = False  # see blocks
        self.packed_head: nn.Module | None = None  # see generation/packed_linear.py

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @torch.no_grad()
    def init_for_copying(self) -> None:
        """Give a new model embeddings from which it learns in a fraction of the steps to repeat what it has read.

        Copying wants a head that looks one token back ("In-context Learning and Induction Heads", Olsson et al. 2022):
        positions that begin as sinusoids, which neighbours share, let it be found. And in a narrow model a token whose
        embedding has a spread of 0.02, right for the published widths, can never win at the tied head unless it is
        frequent: so embeddings are longer the narrower the model is.
        """
        std = 0.02 * max(1.0, 768 / self.config.n_embd)
        self.wte.weight.mul_(std / 0.02)
        self.wpe.weight.copy_(std * math.sqrt(2) * sinusoids(self.config.block_size, self.config.n_embd))

    def n_params(self) -> int:
        """Number of parameters; the tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """FLOPs of forward and backward for one token: 6 a weight that multiplies, plus attention's 12 L C T.

        "PaLM" (Chowdhery et al. 2022, appendix B), without the position embedding, which is only looked up.
        """
        config = self.config
        return 6 * (self.n_params() - self.wpe.weight.numel()) + 12 * config.n_layer * config.n_embd * config.block_size

    def hidden(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """The last layer's output after the final LayerNorm, (B, T, C), for ids (B, T).

        `positions` (T,) or (B, T) are 0..T-1 unless given; attention is causal unless there is a `mask`.
        """
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        return self.blocks(self.positioned(self.wte(idx), positions), cache, mask)

    def positioned(self, x: Tensor, positions: Tensor) -> Tensor:
        """The tokens' embeddings (B, T, C) with those of their positions, after dropout."""
        return F.dropout(x + self.wpe(positions), self.config.dropout, self.training)

    def blocks(self, x: Tensor, cache: KVCache | None = None, mask: Mask | None = None) -> Tensor:
        """The embedded tokens (B, T, C) through all blocks and the final LayerNorm.

        With `activation_checkpointing` training keeps each block's input alone and runs the block again, with the same
        dropout, when the backward pass needs the rest ("Training Deep Nets with Sublinear Memory Cost", Chen et al.
        2016).
        """
        for block in self.h:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cache, mask, use_reentrant=False)
            else:
                x = block(x, cache, mask)
        return self.ln_f(x)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        n_targets: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, V) of ids (B, T); or, with `targets` (B, T), the mean cross entropy in nats a token.

        Returns (logits, None) or (None, loss): with targets the logits never exist as a whole, which is most of a
        small model's memory and time. Targets equal to IGNORED do not count. The sum of losses is divided by
        `n_targets` where it is given (all that count in the iteration, so that micro-batches add up), else by the
        number that counts here, or 1. With `documents` (B, T) attention stays among the ids of the same number in the
        row; positions stay those of the row.
        """
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f"{idx.shape[1]} tokens exceed block_size ({self.config.block_size})")
        mask = None if documents is None else self.document_mask(documents)
        if targets is None:
            return F.linear(self.hidden(idx, mask=mask), self.wte.weight), None
        if n_targets is None:
            n_targets = (targets != IGNORED).sum().clamp(min=1)
        head = TiedHead(self.wte.weight, targets, compute_dtype(self.wte.weight), self.compiled_transpose)
        x = self.positioned(head.embed(idx), torch.arange(idx.shape[1], device=idx.device))
        return None, head.loss(self.blocks(x, mask=mask), n_targets)

    def document_mask(self, documents: Tensor) -> Mask:
        """The mask, shared by all layers, that keeps attention causal and inside each document of the rows (B, T).

        In compiled training on CUDA a BlockMask: FlexAttention skips the blocks in which nothing counts. It has no
        dropout, and on a CPU no backward pass; there and elsewhere the mask is a tensor.
        """
        if documents.is_cuda:
            if self.training and self.h[0].compiled and not self.config.dropout:
                return block_mask(documents)
            # Under a mask cuDNN's backward pass gives NaN for some lengths (PyTorch issue 196678).
            torch.backends.cuda.enable_cudnn_sdp(False)
        return dense_mask(documents, compute_dtype(self.wte.weight))

    def compile_training(self) -> None:
        """Let torch.compile speed up the loss of `forward`; the first call then takes seconds to a minute.

        The weights keep their names, and logits and generation stay as they are. The blocks are compiled one by one,
        into code that all of them share: as fast on a CPU as one piece of all blocks, ready in half the time, and not
        all weights are copied into low precision at once. Between the blocks something may be done: weights gathered,
        gradients sent off.
        """
        if self.wte.weight.device.type == "cpu":  # what is cheap is made again in the backward pass instead of kept
            torch._functorch.config.activation_memory_budget = ACTIVATION_BUDGET
            importlib.import_module("torch._inductor.inductor_prims")  # registers what row_by_row uses
        torch._dynamo.config.optimize_ddp = False  # which would cut the blocks, each a piece already, into more
        # Without the embeddings: on a CPU their compiled gradient adds in varying order, so runs would not repeat.
        for block in self.h:
            block.compiled = torch.compile(block.residuals)
        self.compiled_transpose = torch.compile(transposed, dynamic=False)

    def uncompile(self) -> None:
        """Let the blocks run eagerly again."""
        self.compiled_transpose = None
        for block in self.h:
            block.compiled = None

    @torch.inference_mode()
    def generate(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        max_tokens: int | None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        generator: torch.Generator | None = None,
        stop_ids: Collection[int] = (),
        cache: KVCache | None = None,
        observe: Callable[[Tensor], None] | None = None,
        cuda_graph: bool = False,
    ) -> Iterator[Tensor]:
        """Continue each prompt by up to `max_tokens` ids (None: without end); yields the next ids (B,) at each step.

        A row that has drawn one of `stop_ids` yields ENDED from then on. `sample` explains the sampling settings and
        `penalise_repetition` the penalty. A `cache` from `new_cache` that lives longer than this call saves the work
        for the ids that a prompt shares with what it holds. `observe` sees the logits (B, n_vocab) of each step before
        any setting acts on them, and keeps none. `cuda_graph` captures the decode step, which pays on CUDA.

        Context: of a prompt longer than block_size its last block_size ids count. When block_size ids are in use, all
        but the last block_size // 2 are forgotten, and generation goes on: one long prefill every block_size / 2 ids
        instead of one for each id.
        """
        prompts = check_prompts(prompts, self.config)
        cache = self.new_cache(len(prompts)) if cache is None else cache
        device = self.wte.weight.device
        stops = torch.tensor(list(stop_ids), device=device, dtype=torch.long)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        seen = seen_ids(prompts, self.config.n_vocab, device) if repetition_penalty != 1 else None
        was_training = self.training
        self.eval()
        try:
            logits = self.prefill(prompts, cache)
            for step in itertools.count(1) if max_tokens is None else range(1, max_tokens + 1):
                if observe is not None:
                    observe(logits)
                scores = logits if seen is None else penalise_repetition(logits, seen, repetition_penalty)
                ids = sample(scores, temperature, top_k, top_p, min_p, generator)
                yield ids.masked_fill(ended, ENDED)
                ended |= torch.isin(ids, stops)
                if step == max_tokens or (len(stops) and ended.all()):
                    return
                if seen is not None:
                    seen.scatter_(1, ids[:, None], True)
                logits = self.decode_one(ids, cache, cuda_graph)
        finally:
            self.train(was_training)

    def new_cache(self, batch_size: int = 1) -> KVCache:
        """An empty cache for `batch_size` rows, in the weights' precision and on their device."""
        weight = self.ln_f.weight
        return KVCache(self.config, batch_size, weight.device, weight.dtype)

    def next_logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, n_vocab) in float32 of the last layer's output (B, C): the padding ids have none."""
        if self.packed_head is not None:
            return self.packed_head(hidden).float()
        return F.linear(hidden, self.wte.weight[: self.config.n_vocab]).float()

    def prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Make `cache` hold one prompt a row; returns the logits (B, n_vocab) of what follows each.

        A single row keeps what it holds of the prompt's beginning and computes the rest alone. Raises
        FloatingPointError for logits that are not finite.
        """
        prompts = [list(prompt[-self.config.block_size :]) for prompt in prompts]
        shared = 0
        if len(prompts) == 1:  # the last id is always computed: its output is wanted
            pairs = zip(cache.tokens[0], prompts[0][:-1], strict=False)
            shared = next((n for n, (held, new) in enumerate(pairs) if held != new), None)
            shared = min(len(cache.tokens[0]), len(prompts[0]) - 1) if shared is None else shared
        hidden = self._fill(list(range(len(prompts))), prompts, shared, cache)
        logits = self.next_logits(hidden)
        if not logits.isfinite().all():
            raise FloatingPointError("the model's logits are not finite")
        return logits

    def _fill(self, rows: list[int], contexts: list[list[int]], start: int, cache: KVCache) -> Tensor:
        """Let the cache's `rows` hold `contexts`, of which they hold `start` ids; the output (rows, C) at each end.

        Shorter rows are padded on the right: the causal mask hides what follows, and later ids overwrite it.
        """
        for row in rows:  # an exception on the way leaves no row that claims more than it holds
            cache.tokens[row] = cache.tokens[row][:start]
        device = self.wte.weight.device
        longest = max(map(len, contexts))
        idx = torch.tensor([context[start:] + [0] * (longest - len(context)) for context in contexts], device=device)
        positions = torch.arange(start, longest, device=device)
        cache.select(slice(None) if len(rows) == len(cache.tokens) else rows, slice(start, longest), longest)
        mask = torch.arange(longest, device=device) <= positions[:, None] if start else None
        hidden = self.hidden(idx, cache, positions, mask)
        for row, context in zip(rows, contexts, strict=True):
            cache.tokens[row] = list(context)
        return hidden[range(len(rows)), [len(context) - 1 - start for context in contexts]]

    def decode_one(self, ids: Tensor, cache: KVCache, cuda_graph: bool = False) -> Tensor:
        """Append one id to each of the cache's rows, ids (B,); returns the logits (B, n_vocab) of the next."""
        self._make_room(cache)
        lengths = [len(tokens) for tokens in cache.tokens]
        start, longest = min(lengths), max(lengths)
        if cuda_graph and ids.is_cuda:
            if cache.captured is None:
                cache.captured = CapturedDecode(self, cache)
            logits = cache.captured(ids, lengths)
        elif start < longest:
            logits = self.decode_at(ids, torch.tensor(lengths, device=ids.device), longest + 1, cache)
        else:
            cache.select(slice(None), slice(start, start + 1), start + 1)
            positions = torch.full((1,), start, device=ids.device)
            logits = self.next_logits(self.hidden(ids[:, None], cache, positions)[:, 0])
        for tokens, token in zip(cache.tokens, ids.tolist(), strict=True):
            tokens.append(token)
        return logits

    def decode_at(self, ids: Tensor, positions: Tensor, end: int, cache: KVCache) -> Tensor:
        """As `decode_one` for rows of different lengths: positions (B,) are a tensor, and shapes depend on `end`."""
        cache.select(torch.arange(len(ids), device=ids.device), positions, end)
        mask = torch.arange(end, device=ids.device) <= positions[:, None, None, None]  # (B, 1, 1, end)
        return self.next_logits(self.hidden(ids[:, None], cache, positions[:, None], mask)[:, 0])

    def _make_room(self, cache: KVCache) -> None:
        """Let the rows that are full forget all but their last block_size // 2 ids."""
        keep = self.config.block_size // 2
        full = [row for row, tokens in enumerate(cache.tokens) if len(tokens) == self.config.block_size]
        if full and keep:
            self._fill(full, [cache.tokens[row][-keep:] for row in full], 0, cache)
        elif full:  # block_size 1: each id is its own context
            cache.tokens = [[] for _ in cache.tokens]


def document_mask_mod(documents: Tensor) -> Callable:
    """FlexAttention's mask_mod of documents (B, T): whether a row's position `query` may look at its position `key`."""

    def mask_mod(row, head, query, key):
        return (key <= query) & (documents[row, query] == documents[row, key])

    return mask_mod


def dense_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores, (B, 1, T, T): 0 where a query may look at a key, else minus infinity."""
    B, T = documents.shape
    rows, positions = torch.arange(B, device=documents.device), torch.arange(T, device=documents.device)
    visible = document_mask_mod(documents)(rows[:, None, None, None], None, positions[:, None], positions)
    # Not left as bool, (B, 1, T, T): every layer would make its own copy of the numbers for its backward pass.
    return torch.zeros(visible.shape, device=documents.device, dtype=dtype).masked_fill_(~visible, -math.inf)


def block_mask(documents: Tensor):
    """The same for FlexAttention ("Flex Attention", Dong et al. 2024): a BlockMask of documents (B, T)."""
    from torch.nn.attention.flex_attention import create_block_mask

    B, T = documents.shape
    return create_block_mask(document_mask_mod(documents), B, None, T, T, device=documents.device)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which matrices are multiplied with `tensor` now."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def check_prompts(prompts: Tensor | Sequence[Sequence[int]], config: GPTConfig) -> list[list[int]]:
    """Prompts as lists of ids. Raises ValueError for none, an empty one, or an id that the tokenizer has not."""
    prompts = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    if not prompts:
        raise ValueError("there is no prompt")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} has no id")
        if min(prompt) < 0 or max(prompt) >= config.n_vocab:
            raise ValueError(f"prompt {number} has an id outside 0 to {config.n_vocab - 1}")
    return prompts


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id a row, (B,), from logits (B, V).

    The logits are divided by `temperature`; 0 takes the likeliest id instead. Then stay, one after another: the
    `top_k` likeliest ids; the fewest likeliest whose probabilities reach `top_p` together ("nucleus sampling",
    Holtzman et al. 2020, section 3.1); those at least `min_p` times as likely as the likeliest ("min-p", Nguyen et
    al. 2024, section 3).
    """
    if temperature == 0:
        return logits.max(-1).indices  # the first of several; on a CPU in a third of argmax's time
    probabilities, ids = candidates(logits, temperature, top_k, top_p, min_p)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = probabilities.to(exact).cumsum(-1)
    # A number in (0, 1], so that the first place to reach it is never one of probability 0.
    threshold = 1 - torch.rand(len(logits), 1, generator=generator, device=logits.device)
    choice = torch.searchsorted(cumulative, threshold * cumulative[:, -1:])
    return (choice if ids is None else ids.gather(1, choice))[:, 0]


def candidates(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, N), not normalised, and ids (B, N) of what may be drawn; ids None: all of 0..V-1."""
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities, ids = scores.softmax(-1), None
    if top_k is not None:
        probabilities, ids = probabilities.topk(min(top_k, probabilities.shape[-1]))  # likeliest first
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if top_p is not None:
        if ids is None:
            # All ids rarer than (1 - top_p) / V have less than 1 - top_p together, so the nucleus has none of them.
            may_stay = probabilities >= (1 - top_p) / probabilities.shape[-1]
            probabilities, ids = probabilities.topk(int(may_stay.sum(-1).max()))
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(likelier >= top_p, 0)
    if min_p is not None:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0)
    return probabilities, ids


def seen_ids(prompts: list[list[int]], n_vocab: int, device: torch.device) -> Tensor:
    """True (B, n_vocab) for the ids that stand in each prompt."""
    seen = torch.zeros(len(prompts), n_vocab, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    return seen


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the ids already seen less likely ("CTRL", Keskar et al. 2019, section 4.1): logits divided by `penalty`.

    Negative logits are multiplied by it, so that they too become less likely.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines (length, width) of rising wavelength ("Attention Is All You Need", section 3.5)."""
    wavelengths = 10000 ** (torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] / wavelengths  # (length, width / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]
