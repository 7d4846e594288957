"""Linear layers that generate faster on a CPU: weights laid out for the processor, or quantised to 8 bits.

Generation reads every weight for every token, so its speed is the memory's: half the bytes, twice the tokens.

    model, info = load_model("models/story5000.pt", "cpu", "bfloat16")
    pack_linears(model, quantize="int8")    # from now on the model generates and no longer trains
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, MLP
from runtime import UserError

MANY_ROWS = 64  # from here on the arithmetic, not the memory, takes the time
CHECK_SHAPE = (4, 64)  # rows and columns of the product that tells whether a kernel is there and right


class PackedLinear(nn.Module):
    """A bfloat16 linear layer in oneDNN's blocked layout, in which one row's product reads memory in order."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False):
        super().__init__()
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.then = ("gelu", [], "tanh") if gelu else ("none", [], "")  # done with each output while it is at hand

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.then)


class PackedMLP(nn.Module):
    """Two packed layers in place of the model's, the GELU between them being part of the first."""

    def __init__(self, mlp: MLP):
        super().__init__()
        self.c_fc = PackedLinear(mlp.c_fc.weight, mlp.c_fc.bias, gelu=True)
        self.c_proj = PackedLinear(mlp.c_proj.weight, mlp.c_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x))


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights: weight[n] is about scale[n] * int8[n], one scale an output channel.

    The input keeps 16 bits, so that the weights alone are rounded: it is written as 256 * high + low + 128 in units of
    its row's largest value, and the exact integer products of the two bytes with the weights are added.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.int8, self.scale = quantize_rows(weight.detach())
        self.packed = torch.ops.onednn.qlinear_prepack(self.int8, None)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.float()
        self.offset = 128 * self.scale * self.int8.sum(1)
        self.zero_points = torch.zeros(len(weight), dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        if len(rows) > MANY_ROWS:  # 8-bit numbers are exact in any precision
            products = F.linear(x, self.int8.to(x.dtype)).float()
            return torch.addcmul(self.bias, products, self.scale).to(x.dtype)
        unit = rows.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(127 * 256)
        pairs = (rows / unit).to(torch.int16).bitwise_xor_(128).view(torch.int8)  # low - 128, high, low - 128, ...
        low_and_high = pairs.view(*rows.shape, 2).permute(2, 0, 1).reshape(-1, rows.shape[1])
        low, high = torch.ops.onednn.qlinear_pointwise(
            *(low_and_high, 1.0, 0, self.packed, self.scale, self.zero_points, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        ).chunk(2)
        y = torch.addcmul(self.bias, low.add_(high, alpha=256).add_(self.offset), unit)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as int8 of -127..127 and its scale (N,) in float32, chosen by each row's largest value."""
    scale = weight.abs().amax(1).float().clamp(min=1e-30) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def pack_linears(model: GPT, quantize: str | None = None) -> str:
    """Replace `model`'s linear layers and head, in place, by what generates fastest; says in words what that is.

    Afterwards the model only generates. `quantize` is "int8" or None. Raises UserError where 8-bit weights
    have no kernel.
    """
    weight = model.h[0].attn.c_attn.weight
    on_cpu, dtype = weight.device.type == "cpu", weight.dtype
    if quantize == "int8":
        if not on_cpu or not is_exact(Int8Linear, torch.float32, tolerance=0.02):
            raise UserError("--quantize int8 has no kernel for this processor; leave it out, or add --device cpu")
        layer, description = Int8Linear, "8-bit weights"
    elif on_cpu and dtype == torch.bfloat16 and is_exact(PackedLinear, dtype, tolerance=0.02):
        layer, description = PackedLinear, "weights packed for the processor"
    else:
        return "plain layers"
    head = layer(model.wte.weight[: model.config.n_vocab], None)
    if layer is PackedLinear:
        for block in model.h:
            block.mlp = PackedMLP(block.mlp)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, layer(child.weight, child.bias))
    model.packed_head = head
    return description


def is_exact(layer: type, dtype: torch.dtype, tolerance: float) -> bool:
    """Whether a layer's kernel is in this torch, runs on this processor and multiplies right."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CHECK_SHAPE, generator=generator).to(dtype)
    x = torch.randn(3, CHECK_SHAPE[1], generator=generator).to(dtype)
    try:
        y = layer(weight, None)(x)
    except (RuntimeError, AttributeError, NotImplementedError):  # no such operator, or none for this processor
        return False
    expected = F.linear(x.float(), weight.float())
    return bool((y.float() - expected).abs().max() < tolerance * expected.abs().max())
