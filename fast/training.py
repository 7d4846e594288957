"""Training steps that take less time and memory.

Replaces: GPT.forward with targets (fast/tied_head.py), GPT.document_mask (fast/document_masks.py), on a CPU blocks
(fast/block_kernel.py) or their attention (fast/document_attention.py) and GELU (fast/gelu.py), and in compiled steps
the backward passes of Linear and attention (fast/cpu_backward.py) and, without the kernel, GELU's formula.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: with --plain, and for everything but the training loss: logits and generation run the plain code.

A module is replaced by giving it a subclass of its own class, as `torch.nn.utils.parametrize` and `fully_shard` do, so
parameters, their names and references to the module stay as they are.
"""

from __future__ import annotations

import gc
import importlib
import math
import time
from collections.abc import Callable
from typing import cast

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.device import is_out_of_memory
from fast import block_kernel, cpu_backward
from fast.allocator import give_back_freed_memory
from fast.document_attention import MASK_DTYPE, document_attention, first_keys, supports
from fast.document_masks import BlockMask, block_mask, compute_dtype, dense_mask, flex_attention
from fast.gelu import gelu_linear
from fast.gelu import supports as has_gelu_kernel
from fast.tied_head import TiedHead, fused_losses_and_gradient_, transposed
from model import GPT, IGNORED, MLP, Attention, Block, KVCache

FEW_TOKENS = 1024  # per micro-batch: for fewer, the attention kernel saves at most 2 ms per layer
ACTIVATION_BUDGET = 0.9  # below 1, torch.compile recomputes cheap activations in the backward pass


def speed_up_training(model: GPT, activation_checkpointing: bool = False, residual_dtype: str = "float32") -> None:
    """Replace the parts of `model` that take most of a training step's time and memory.

    Call it before the model is sharded or wrapped. With `activation_checkpointing` training keeps only each block's
    input, and runs the block again, with the same dropout, when the backward pass needs the rest ("Training Deep Nets
    with Sublinear Memory Cost", Chen et al. 2016). If `residual_dtype` is "bfloat16", the residual stream and its
    gradient are in bfloat16 in all blocks. This applies only under autocast to bfloat16.
    """
    model.__class__ = FastGPT
    for block in (cast(FastBlock, block) for block in model.h):
        block.__class__ = FastBlock
        block.activation_checkpointing = activation_checkpointing
        block.residual_dtype = torch.bfloat16 if residual_dtype == "bfloat16" else None
        block.attn.__class__ = FastAttention
        block.mlp.__class__ = FastMLP
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            if type(linear) is nn.Linear:  # an adapter's layer has its own forward pass, and its weight no gradient
                linear.__class__ = FastLinear


def compile_training(
    model: GPT,
    trial_step: Callable[[], object],
    any_failed: Callable[[bool], bool] = lambda failed: failed,
    scope: str = "block",
    backend: str | Callable = "inductor",
    activation_budget: float = ACTIVATION_BUDGET,
) -> None:
    """Compile the blocks of a model that `speed_up_training` prepared, by running `trial_step` once.

    `scope` is "block", or "model" for all blocks as one piece, without activation checkpointing. If compiling fails, a
    warning is printed and the blocks run eagerly again; `any_failed` says whether it failed in any process of a job, so
    that all of them do the same. An out-of-memory error is raised. `backend` is passed to torch.compile.
    """
    start, failure = time.perf_counter(), None
    _compile_blocks(cast(FastGPT, model), scope, backend, activation_budget)
    try:
        trial_step()
    except Exception as error:  # compilers fail in many ways, and without one training still works, only more slowly
        if is_out_of_memory(error):
            raise
        failure = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
    if any_failed(failure is not None):
        print(f"warning: torch.compile failed ({failure or 'in another process'}); training runs without it")
        _run_eagerly(cast(FastGPT, model))
    else:
        print(f"torch.compile: ready after {time.perf_counter() - start:.1f} s")
    gc.collect()  # the compiler leaves hundreds of thousands of objects scattered over the memory that the step freed
    give_back_freed_memory()


def _compile_blocks(model: FastGPT, scope: str, backend: str | Callable, activation_budget: float) -> None:
    """Compile block by block, into code that all blocks share, or with the scope "model" all blocks as one piece.

    On a CPU, one piece is not faster, takes twice the time to compile, and copies all weights into low precision at
    once. On CUDA it should save a pass over the residual stream per block, because a block's sum and the next block's
    LayerNorm become one kernel. Only between blocks can FSDP gather weights and DDP send gradients.
    """
    if model.wte.weight.device.type == "cpu":
        torch._functorch.config.activation_memory_budget = activation_budget
        importlib.import_module("torch._inductor.inductor_prims")  # registers the operator that cpu_backward uses
    torch._dynamo.config.optimize_ddp = False  # it would split the blocks, which are small pieces already
    # The embeddings stay eager: on a CPU their compiled gradient is summed in varying order, so runs would not repeat.
    if scope == "model":
        model.compiled_blocks = torch.compile(model.plain_blocks, backend=backend)
    else:
        for block in model.fast_blocks():
            block.compiled = torch.compile(block.plain_forward, backend=backend)
    model.compiled_transpose = torch.compile(transposed, dynamic=False, backend=backend)
    if model.wte.weight.is_cuda:  # on a CPU, torch's softmax in low precision is faster
        model.compiled_losses = torch.compile(fused_losses_and_gradient_, backend=backend)


def _run_eagerly(model: FastGPT) -> None:
    model.compiled_blocks = model.compiled_transpose = model.compiled_losses = None
    for block in model.fast_blocks():
        block.compiled = None


class FastGPT(GPT):
    """GPT whose training loss never holds all logits at once, and whose blocks can be compiled as one piece."""

    compiled_blocks: Callable[[Tensor, Tensor | None], Tensor] | None = None
    compiled_transpose: Callable[[Tensor, torch.dtype], Tensor] | None = None
    compiled_losses: Callable[[Tensor, Tensor], Tensor] | None = None

    def fast_blocks(self) -> list[FastBlock]:
        return [cast(FastBlock, block) for block in self.h]

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        n_targets: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        if targets is None or idx.shape[1] > self.config.block_size:
            return super().forward(idx, targets, n_targets, documents, positions)
        if documents is None and self.has_attention_kernel(idx):
            documents = torch.zeros_like(idx)
        mask = None if documents is None else self.document_mask(documents)
        if n_targets is None:
            n_targets = (targets != IGNORED).sum().clamp(min=1)
        # Before the blocks run: later its buffers would not fit between the activations.
        weight, dtype = self.wte.weight, compute_dtype(self.wte.weight)
        head = TiedHead(weight, targets, dtype, self.compiled_transpose, losses_and_gradient=self.compiled_losses)
        return None, head.loss(self.transform(head.embed(idx), positions=positions, mask=mask), n_targets)

    def run_blocks(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        if self.compiled_blocks is None or not self.training or cache is not None:
            return super().run_blocks(x, cache, mask)
        return self.compiled_blocks(x, mask)

    def plain_blocks(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`run_blocks` as torch.compile is given it, without the choices that FastBlock makes."""
        for block in self.fast_blocks():
            x = block.plain_forward(x, mask=mask)
        return self.ln_f(x)

    def is_compiled(self) -> bool:
        """Whether the blocks of a training step are compiled."""
        return self.training and (self.compiled_blocks is not None or self.fast_blocks()[0].compiled is not None)

    def has_attention_kernel(self, idx: Tensor) -> bool:
        """Whether attention for ids (B, T) runs in a kernel of fast/document_attention.py."""
        config = self.config
        dropout = config.dropout if self.training else 0.0
        if idx.device.type != "cpu" or (dropout and self.is_compiled()) or idx.numel() < FEW_TOKENS:
            return False
        return supports(config.n_embd // config.n_head, compute_dtype(self.wte.weight), dropout)

    def document_mask(self, documents: Tensor) -> Tensor:
        """The mask in the form of the fastest attention.

        For the kernels on a CPU the first key of each query, in compiled training on CUDA a BlockMask, and otherwise
        numbers that are added to the scores.
        """
        if self.has_attention_kernel(documents):
            return first_keys(documents)
        if documents.is_cuda and self.is_compiled() and not self.config.dropout:  # FlexAttention has no dropout
            return cast(Tensor, block_mask(documents))  # only FastAttention sees it
        return dense_mask(super().document_mask(documents), compute_dtype(self.wte.weight))


class FastBlock(Block):
    """A block that can run in kernels or compiled, and can recompute its activations."""

    compiled: Callable[..., Tensor] | None = None
    activation_checkpointing = False
    residual_dtype: torch.dtype | None = None  # None keeps the precision of the embeddings

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        run = self.compiled if self.compiled and self.training else self.plain_forward
        if self.has_kernel(x, cache, mask):
            run = self.run_kernel
        if self.activation_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(run, x, cache, mask, use_reentrant=False))
        return run(x, cache, mask)

    def has_kernel(self, x: Tensor, cache: KVCache | None, mask: Tensor | None) -> bool:
        """Whether the whole block runs in kernels (fast/block_kernel.py)."""
        attention, mlp = self.attn, self.mlp
        linears = (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj)
        is_changed = cache is not None or self.residual_dtype is not None
        if is_changed or any(type(linear) is not FastLinear for linear in linears):
            return False
        return block_kernel.supports(self, x, mask)

    def run_kernel(self, x: Tensor, cache: KVCache | None, mask: Tensor) -> Tensor:
        return block_kernel.block_with_kernel(self, x, mask)

    def plain_forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """The plain block's forward pass, under a name that torch.compile can be given."""
        if self.residual_dtype is not None and compute_dtype(x) == self.residual_dtype:
            x = x.to(self.residual_dtype)
        return super().forward(x, cache, mask)


class FastAttention(Attention):
    """Attention that understands every form of `FastGPT.document_mask`, with faster kernels on a CPU."""

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        if isinstance(mask, BlockMask) or mask is None or mask.dtype != MASK_DTYPE:
            return super().forward(x, cache, mask)
        y = document_attention(self.c_attn(x), mask, self.n_head, self.dropout if self.training else 0.0)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if isinstance(mask, BlockMask):
            return flex_attention(q, k, v, mask)
        if _is_compiled_cpu_training(self, q) and not self.dropout:
            return cpu_backward.attention(q, k, v, mask)
        return super().attend(q, k, v, mask)


class FastMLP(MLP):
    """An MLP with faster forms of GELU: on a CPU a kernel, and in compiled code a formula that costs a third.

    (1 + tanh(z)) / 2 is sigmoid(2 z), and compiled code computes the sigmoid's exponential in a third of tanh's time.
    """

    def forward(self, x: Tensor) -> Tensor:
        z = self.c_fc(x)
        if type(self.c_proj) is FastLinear and has_gelu_kernel(z):
            y = gelu_linear(z, self.c_proj.weight, self.c_proj.bias)
        elif torch.compiler.is_compiling():
            y = self.c_proj(z * torch.sigmoid(math.sqrt(8 / math.pi) * z * (1 + 0.044715 * z * z)))
        else:
            y = self.c_proj(F.gelu(z, approximate="tanh"))
        return F.dropout(y, self.dropout, self.training)


class FastLinear(nn.Linear):
    """A linear layer with a faster backward pass in compiled low-precision steps on a CPU.

    The gradient of its weight is what takes less time, so a frozen layer keeps torch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_low_precision = compute_dtype(self.weight).itemsize == 2
        if self.weight.requires_grad and is_low_precision and _is_compiled_cpu_training(self, x):
            return cpu_backward.linear(x, self.weight, self.bias)
        return super().forward(x)


def _is_compiled_cpu_training(module: nn.Module, x: Tensor) -> bool:
    return module.training and x.device.type == "cpu" and torch.compiler.is_compiling()
