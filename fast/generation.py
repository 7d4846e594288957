"""Generation that reads the weights faster, or as 8-bit weights with half the bytes.

Replaces: on a CPU, GPT's blocks and logits with the layers of fast/packed_linear.py and the attention kernel of
fast/row_kernels.py; on CUDA, the decode step with CUDA graphs (fast/cuda_graphs.py), and attention in decode steps with
a Triton kernel (fast/triton_attention.py).
Gains: see docs/performance.md, "What each fast part gains".
Skipped: with --plain, and on a processor whose kernels are missing.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import UserError
from fast.cuda_graphs import CapturedDecode
from fast.packed_linear import FewRowsLinear, Int8Linear, PackedLinear, RowLinear, is_exact
from fast.row_kernels import attend, build
from generation.decoding import DecodeStep, decode_step
from generation.row_cache import RowCache
from model import GPT, Block, KVCache


@dataclasses.dataclass(frozen=True)
class SpeedUps:
    """What `speed_up_generation` applied: its description, and the decode step to pass to `generate`."""

    description: str
    decode: DecodeStep = decode_step


def speed_up_generation(
    model: GPT, quantize: str | None = None, streams: int = 1, has_kernel: Callable[..., bool] = is_exact
) -> SpeedUps:
    """Replace, in place, the parts of `model` whose plain versions generate more slowly; it cannot train after that.

    `quantize` is "int8" or None, `streams` the number of texts generated at a time. `has_kernel` says whether this
    processor has the kernel of a layer. Raises UserError if it has none for 8-bit weights.
    """
    blocks = [cast(Block, block) for block in model.h]
    weight = blocks[0].attn.c_attn.weight
    on_cpu, dtype = weight.device.type == "cpu", weight.dtype
    layer: type[PackedLinear] | type[RowLinear] | type[Int8Linear]
    if quantize == "int8":
        if not on_cpu or not has_kernel(Int8Linear, dtype, tolerance=0.02):
            raise UserError("--quantize int8 has no kernel for this processor; leave it out, or add --device cpu")
        layer, description = Int8Linear, "8-bit weights"
    elif weight.is_cuda:
        model.__class__ = WholeHeadGPT
        attention = "a kernel for attention" if _use_triton_attention(model) else "plain layers"
        return SpeedUps(f"{attention}, CUDA graphs", CapturedDecode())
    elif not on_cpu:
        return SpeedUps("plain layers")
    elif has_kernel(RowLinear, dtype, tolerance=0.02) and (
        dtype == torch.float32 or streams <= RowLinear(weight, None).max_rows
    ):  # float32 is not packed, so nothing is faster for more rows
        layer, description = RowLinear, "a kernel for few rows"
    elif dtype == torch.bfloat16 and has_kernel(PackedLinear, dtype, tolerance=0.02):
        layer, description = PackedLinear, "weights packed for the processor"
    else:
        return SpeedUps("plain layers")
    packed_head = layer(model.wte.weight[: model.config.n_vocab], None)
    model.__class__ = PackedGPT
    model.packed_head = packed_head
    model.h = nn.ModuleList(PackedBlock(block, layer) for block in blocks)
    return SpeedUps(description)


def _use_triton_attention(model: GPT) -> bool:
    """Replace the attention of decode steps with the Triton kernel, if it computes correctly on the model's device."""
    try:
        triton_attention = importlib.import_module("fast.triton_attention")
    except ImportError:  # a build of torch without Triton
        return False
    config, weight = model.config, model.ln_f.weight
    fault = triton_attention.find_fault(config.n_head, config.n_embd // config.n_head, weight.dtype, weight.device)
    if fault is not None:
        print(f"warning: the attention kernel is not used: {fault}", file=sys.stderr)
        return False
    for block in model.h:
        cast(Block, block).attn.__class__ = triton_attention.TritonAttention
    return True


class WholeHeadGPT(GPT):
    """GPT whose head multiplies all V rows and then cuts the padding off: CUDA has no fast kernel for an odd number."""

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.wte.weight)[..., : self.config.n_vocab].float()


class PackedGPT(GPT):
    """GPT with a packed head."""

    packed_head: PackedLinear | FewRowsLinear

    def logits(self, hidden: Tensor) -> Tensor:
        return self.packed_head(hidden).float()


class PackedBlock(nn.Module):
    """A block of packed layers, in as few calls as possible: for a single token, the overhead of each call matters."""

    def __init__(self, block: Block, layer: type[PackedLinear] | type[RowLinear] | type[Int8Linear]):
        super().__init__()
        self.layer, self.n_head = block.attn.layer, block.attn.n_head
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        linears = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        self.c_attn, self.attn_proj, self.c_fc, self.mlp_proj = (layer(one.weight, one.bias) for one in linears)
        size = block.attn.c_proj.in_features // self.n_head
        kernels = build()
        self.has_kernel = kernels is not None and bool(kernels.supports_head_size(size))

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        x = x.reshape(B * T, C)  # the shape the products work on; from any other they convert there and back
        qkv = self.c_attn.forward(normed(x, self.ln_1))
        if T == 1 and isinstance(cache, RowCache) and cache.chosen is not None and self.has_kernel:
            y = attend(qkv, cache.keys_values[self.layer], cache.positions, cache.chosen, cache.end - 1)
        elif T == 1 and mask is None and cache is not None and self._has_kernel_for(cache):
            y = attend(qkv, cache.keys_values[self.layer], cache.positions, cache.rows)
        else:
            qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
            q, kv = qkv[0], qkv[1:]
            k, v = kv if cache is None else cache.update(self.layer, kv)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
            y = y.transpose(1, 2).reshape(B * T, C)
        x = self.attn_proj.added_to(x, y)
        return self.mlp_proj.added_to(x, self.c_fc.with_gelu(normed(x, self.ln_2))).view(B, T, C)

    def _has_kernel_for(self, cache: KVCache) -> bool:
        """Whether the kernel supports this cache: consecutive rows whose new tokens have the same position."""
        return self.has_kernel and isinstance(cache.positions, slice)


def normed(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """The LayerNorm of x without the overhead of calling a module."""
    return torch.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
