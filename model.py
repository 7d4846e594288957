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

if TYPE_CHECKING:  # a large import, needed for the mask on CUDA alone
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask

IGNORED = -100  # a target that does not count, as in F.cross_entropy
HEAD_CHUNK = 2048  # rows whose logits exist at the same time while the loss is computed
ACTIVATION_BUDGET = 0.9  # below 1 torch.compile keeps no activation that one pass over memory makes
KEY_BLOCK = 256  # keys whose weights exist at the same time in a backward pass on a CPU
ENDED = -1  # what `generate` yields for a row that has drawn a stop id
GRAPH_PLACES = 256  # context for which one CUDA graph of the decode step serves


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

    `tokens` are each row's ids; the keys and values of the nth stand at its place n, so rows of different lengths lie
    side by side without padding on the left.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        # Zeros, not what the memory held: a place that is masked out still takes part, with weight 0.
        self.keys_values = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self.captured: CapturedDecode | None = None
        self.aim(slice(None), slice(0), 0)

    def aim(self, rows: slice | list[int] | Tensor, places: slice | Tensor, end: int) -> None:
        """Say where the next keys and values go, and that attention looks at the first `end` places.

        `places` is the same slice for all `rows`, or a tensor (B,) with one place for each row of the batch.
        """
        self.rows, self.places, self.end = rows, places, end
        if isinstance(rows, slice):  # the places are views, made once for all layers
            self.targets = self.keys_values[:, :, rows, :, places].unbind()
            self.visible = self.keys_values[:, :, rows, :, :end].unbind()

    def write(self, layer: int, keys_values: Tensor) -> Sequence[Tensor]:
        """Store a layer's keys and values (2, B, H, T, D) where `aim` said; returns those that attention looks at."""
        if isinstance(self.rows, slice):
            self.targets[layer].copy_(keys_values)
            return self.visible[layer].unbind()
        held = self.keys_values[layer]
        if isinstance(self.places, Tensor):
            held[:, self.rows, :, self.places] = keys_values[:, :, :, 0].transpose(0, 1)  # (B, 2, H, D)
            return held[:, :, :, : self.end].unbind()
        held[:, self.rows, :, self.places] = keys_values
        return held[:, self.rows, :, : self.end].unbind()


class Linear(nn.Linear):
    """A linear layer, which in compiled low-precision training on a CPU makes its weight's gradient otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        is_cpu_training = self.training and x.device.type == "cpu" and torch.compiler.is_compiling()
        if is_cpu_training and compute_dtype(self.weight).itemsize == 2:
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)


class _Linear(torch.autograd.Function):
    """F.linear; the gradient of its weight is a product whose first matrix, the smaller of the two, is copied before.

    torch's own product takes that matrix transposed as it lies, and twice as long.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, y_grad):
        x, weight = ctx.saved_tensors
        n_out, n_in = weight.shape
        rows, row_grads = x.to(y_grad.dtype).flatten(0, -2), y_grad.flatten(0, -2)  # (N, n_in), (N, n_out)
        if n_in < n_out:
            weight_grad = (row_by_row(rows.T) @ row_grads).T
        elif n_in > n_out:
            weight_grad = row_by_row(row_grads.T) @ rows
        else:  # too small to gain
            weight_grad = row_grads.T @ rows
        x_grad = (row_grads @ weight.to(y_grad.dtype)).view_as(x).to(x.dtype)
        bias_grad = row_grads.sum(0, dtype=weight.dtype) if ctx.has_bias else None
        return x_grad, weight_grad.to(weight.dtype).contiguous(), bias_grad


def row_by_row(matrix: Tensor) -> Tensor:
    """A copy of a matrix that lies row by row; unlike `contiguous`, the compiler does not take it for a view."""
    return torch.ops.prims.inductor_force_stride_order(matrix, (matrix.shape[1], 1))


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
        if self.training and torch.compiler.is_compiling() and q.device.type == "cpu" and not dropout:
            return _Attention.apply(q, k, v, mask)
        is_causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


class _Attention(torch.autograd.Function):
    """Causal attention for compiled training on a CPU: torch's forward pass, and a backward pass of large products.

    torch's own backward pass takes half as long again to three times as long, for its products are small. As in
    "FlashAttention" (Dao et al. 2022, appendix B.4) the weights are made again from the scores and each query's
    logarithm of the sum of their exponentials; here for KEY_BLOCK keys at a time, whose row is the key's so that but
    one product needs a transposed matrix.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # (B, H, T, D)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y, log_total = flash(q, k, v, 0.0, mask is None, attn_mask=mask)
        ctx.save_for_backward(q, k, v, y, log_total, mask)
        return y

    @staticmethod
    def backward(ctx, y_grad):
        q, k, v, y, log_total, mask = ctx.saved_tensors
        T, scale = q.shape[2], 1 / math.sqrt(q.shape[3])
        y_grad = y_grad.contiguous()
        mean = (y_grad.float() * y.float()).sum(3)  # (B, H, T), of the weights' gradients
        q_grad, k_grads, v_grads = None, [], []
        for start in range(0, T, KEY_BLOCK):  # queries before the block do not look at it
            keys, values = k[:, :, start : start + KEY_BLOCK], v[:, :, start : start + KEY_BLOCK]
            queries, wanted = q[:, :, start:], y_grad[:, :, start:]
            scores = (keys @ queries.transpose(2, 3)).float() * scale - log_total[:, :, None, start:]
            if mask is None:
                visible = torch.arange(keys.shape[2])[:, None] <= torch.arange(T - start)
                weights = torch.where(visible, scores.exp(), 0.0)
            else:
                weights = (scores + mask[:, :, start:, start : start + KEY_BLOCK].transpose(2, 3)).exp()
            weights_grad = (values @ wanted.transpose(2, 3)).float() - mean[:, :, None, start:]
            scores_grad = (weights * weights_grad * scale).to(q.dtype)
            k_grads.append(scores_grad @ queries)
            v_grads.append(weights.to(q.dtype) @ wanted)
            part = scores_grad.transpose(2, 3) @ keys  # (B, H, T - start, D)
            q_grad = part if start == 0 else torch.cat([q_grad[:, :, :start], q_grad[:, :, start:] + part], 2)
        return q_grad, torch.cat(k_grads, 2), torch.cat(v_grads, 2), None


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
    def start_to_copy(self) -> None:
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
        weight_grads: list[Tensor] | None = None,
    ) -> Tensor:
        """The last layer's output after the final LayerNorm, (B, T, C), for ids (B, T).

        `positions` (T,) or (B, T) are 0..T-1 unless given; `mask`, causal unless given, is True where a query may look
        at a key, or what `document_mask` makes. `weight_grads` will hold the head's gradient of the tied embedding.
        """
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        if weight_grads is None:
            x = self.wte(idx)
        else:
            x = _TiedEmbedding.apply(self.wte.weight, idx, weight_grads)
        x = F.dropout(x + self.wpe(positions), self.config.dropout, self.training)
        return self.blocks(x, cache, mask)

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
        weight, weight_grads = self.wte.weight, []
        memory = HeadMemory(weight, targets, compute_dtype(weight), self.compiled_transpose)
        hidden = self.hidden(idx, mask=mask, weight_grads=weight_grads).flatten(0, 1)  # (N, C)
        if n_targets is None:
            n_targets = (targets != IGNORED).sum().clamp(min=1)
        return None, linear_cross_entropy(hidden, weight, targets.flatten(), n_targets, memory, weight_grads)

    def document_mask(self, documents: Tensor) -> Mask:
        """The mask, shared by all layers, that keeps attention causal and inside each document of the rows (B, T).

        In compiled training on CUDA a BlockMask: FlexAttention skips the blocks in which nothing counts. It has no
        dropout, and on a CPU no backward pass; there and elsewhere the mask is a tensor.
        """
        if documents.is_cuda and self.training and self.h[0].compiled and not self.config.dropout:
            return block_mask(documents)
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

    def compile_nothing(self) -> None:
        """Undo `compile_training`."""
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
        cache.aim(slice(None) if len(rows) == len(cache.tokens) else rows, slice(start, longest), longest)
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
            cache.aim(slice(None), slice(start, start + 1), start + 1)
            positions = torch.full((1,), start, device=ids.device)
            logits = self.next_logits(self.hidden(ids[:, None], cache, positions)[:, 0])
        for tokens, token in zip(cache.tokens, ids.tolist(), strict=True):
            tokens.append(token)
        return logits

    def decode_at(self, ids: Tensor, positions: Tensor, end: int, cache: KVCache) -> Tensor:
        """As `decode_one` for rows of different lengths: the places (B,) are a tensor, the shapes depend on `end`."""
        cache.aim(torch.arange(len(ids), device=ids.device), positions, end)
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


class CapturedDecode:
    """The decode step of one model and cache as CUDA graphs: one launch instead of a few hundred kernels'.

    There is a graph for each GRAPH_PLACES places of context, so that a short context does not pay for a long one.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache = model, cache
        device = model.wte.weight.device
        self.ids = torch.zeros(len(cache.tokens), device=device, dtype=torch.long)
        self.positions = torch.zeros_like(self.ids)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """Logits (B, n_vocab) after ids (B,) at places `lengths`; the next call overwrites them."""
        end = min(-(-(max(lengths) + 1) // GRAPH_PLACES) * GRAPH_PLACES, self.model.config.block_size)
        self.ids.copy_(ids)
        self.positions.copy_(torch.tensor(lengths))
        if end not in self.graphs:
            self.graphs[end] = self._capture(end)
        graph, logits = self.graphs[end]
        graph.replay()
        return logits

    def _capture(self, end: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        with torch.cuda.device(self.ids.device):  # whose streams are meant
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):  # libraries make their workspaces at the first calls, not in the graph
                for _ in range(2):
                    self.model.decode_at(self.ids, self.positions, end, self.cache)
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.model.decode_at(self.ids, self.positions, end, self.cache)
        return graph, logits


def is_visible(documents: Tensor) -> Callable:
    """Whether, in a row, the place `query` may look at the place `key`, in FlexAttention's form; documents (B, T)."""

    def mask_mod(row, head, query, key):
        return (key <= query) & (documents[row, query] == documents[row, key])

    return mask_mod


def dense_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores, (B, 1, T, T): 0 where a query may look at a key, else minus infinity."""
    B, T = documents.shape
    rows, places = torch.arange(B, device=documents.device), torch.arange(T, device=documents.device)
    visible = is_visible(documents)(rows[:, None, None, None], None, places[:, None], places)  # (B, 1, T, T)
    # Not left as bool: every layer would make its own copy of the numbers for its backward pass.
    return torch.zeros(visible.shape, device=documents.device, dtype=dtype).masked_fill_(~visible, -math.inf)


def block_mask(documents: Tensor):
    """The same for FlexAttention ("Flex Attention", Dong et al. 2024): a BlockMask of documents (B, T)."""
    from torch.nn.attention.flex_attention import create_block_mask

    B, T = documents.shape
    return create_block_mask(is_visible(documents), B, None, T, T, device=documents.device)


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


class HeadMemory:
    """What the head takes in large pieces: a copy of its weight, and room for the logits of one chunk of rows.

    It is made before the blocks run. Between the activations there is no place so large, and the process would grow.
    """

    def __init__(self, weight: Tensor, targets: Tensor, dtype: torch.dtype, transpose: Callable | None = None):
        counts = targets.flatten() != IGNORED
        self.rows = torch.arange(len(counts), device=weight.device)
        if weight.device.type == "cpu":  # elsewhere counting the rows would wait for the device
            self.rows = self.rows[counts]
        self.transpose = transpose or transposed
        self.weight = self.transpose(weight.detach(), dtype)  # (C, V)
        self.is_copy = self.weight.is_contiguous() and self.weight.data_ptr() != weight.data_ptr()
        self.logits = torch.empty(min(HEAD_CHUNK, len(self.rows)), len(weight), device=weight.device, dtype=dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_targets: Tensor,
    memory: HeadMemory | None = None,
    weight_grads: list[Tensor] | None = None,
) -> Tensor:
    """Sum over rows of cross_entropy(hidden @ weight.T, targets) / n_targets, without the whole logits.

    hidden (N, C), weight (V, C), targets (N,), n_targets a tensor of one number. The logits of HEAD_CHUNK rows exist
    at a time, in `memory`, where their gradient then takes their place; rows whose target is IGNORED are left out on a
    CPU. The weight's gradient is appended to `weight_grads`, where that is given, for somebody who adds to it and
    passes it on.
    """
    memory = memory or HeadMemory(weight, targets, compute_dtype(hidden))
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, n_targets, memory, wants_gradient, weight_grads)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, chunk by chunk, so that no chunk's logits need to be kept."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, n_targets, memory, wants_gradient, weight_grads):
        counts = targets != IGNORED
        loss = torch.zeros((), device=hidden.device)
        hidden_grad, weight_grad = torch.zeros_like(hidden) if wants_gradient else None, None
        with torch.autocast(hidden.device.type, enabled=False):
            low_hidden = hidden.to(memory.logits.dtype)
            chunks = memory.rows.split(HEAD_CHUNK)
            for number, chunk in enumerate(chunks, 1):
                chunk_hidden = low_hidden[chunk] * counts[chunk, None]  # (N, C)
                logits = torch.mm(chunk_hidden, memory.weight, out=memory.logits[: len(chunk)])
                losses = losses_and_gradient_(logits, targets[chunk].clamp(min=0))
                loss += (losses * counts[chunk]).sum()
                if wants_gradient:
                    hidden_grad[chunk] = (logits @ memory.weight.T * counts[chunk, None]).to(hidden.dtype)
                    # The last product takes the place of the weight's copy, which has served.
                    place = memory.weight if memory.is_copy and number == len(chunks) else None
                    product = torch.mm(chunk_hidden.T.contiguous(), logits, out=place)  # (C, V)
                    weight_grad = product if weight_grad is None else weight_grad.to(weight.dtype).add_(product)
        ctx.transpose, ctx.weight_grads, ctx.dtype = memory.transpose, weight_grads, weight.dtype
        ctx.save_for_backward(hidden_grad, weight_grad, n_targets)
        return loss / n_targets

    @staticmethod
    def backward(ctx, loss_grad):
        hidden_grad, weight_grad, n_targets = ctx.saved_tensors
        scale = loss_grad / n_targets
        hidden_grad.mul_(scale)
        if weight_grad.dtype == ctx.dtype:
            weight_grad = ctx.transpose(weight_grad, ctx.dtype).mul_(scale)
        else:  # compiled code takes up to four times as long for this
            out = torch.empty(weight_grad.T.shape, device=weight_grad.device, dtype=ctx.dtype)
            weight_grad = out.copy_(weight_grad.T).mul_(scale)
        if ctx.weight_grads is not None:
            ctx.weight_grads.append(weight_grad)
            weight_grad = None
        return hidden_grad, weight_grad, None, None, None, None, None


def losses_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Each row's cross entropy (N,) in float32; `logits` (N, V) become the gradient of their sum in place.

    As exact as the logits' precision allows, also for a probability near 0 or 1. A probability too small for that
    precision counts as the smallest that is not: a loss of 17 in float16, of 90 and more elsewhere.
    """
    rows = torch.arange(len(logits), device=logits.device)
    torch.softmax(logits, 1, out=logits)
    hit = logits[rows, targets].float()
    logits[rows, targets] = logits.new_zeros(())  # a mere 0 would be sent to the device, which waits for it
    missed = logits.sum(1)  # the probability of all other tokens; 1 - hit would have lost it where it is small
    logits[rows, targets] = -missed
    missed = missed.float()
    limits = torch.finfo(logits.dtype)
    return -torch.where(missed < 0.5, torch.log1p(-missed), hit.clamp(min=limits.tiny * limits.eps).log())


def transposed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix (M, N) as (N, M) in another precision; on a CPU in memory too, for there products are faster then."""
    matrix = matrix.to(dtype).T
    return matrix.contiguous() if matrix.device.type == "cpu" else matrix


class _TiedEmbedding(torch.autograd.Function):
    """Rows of a weight that the head shares: their gradient is added to the head's, which is made before.

    Two gradients of the size of the weight, most of one of them zeros, would have to be added otherwise.
    """

    @staticmethod
    def forward(ctx, weight, idx, weight_grads):
        ctx.weight_grads = weight_grads
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx, grad):
        (idx,) = ctx.saved_tensors
        weight_grad = ctx.weight_grads.pop()
        return weight_grad.index_add_(0, idx.flatten(), grad.flatten(0, -2)), None, None
