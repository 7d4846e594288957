"""Linear layers that generate faster on a CPU: read in the memory's order, or quantised to 8 bits.

Generation reads every weight for every token, so its speed is the memory's: half the bytes, twice the tokens.

    model, info = load_model("models/story5000.pt", "cpu", "bfloat16")
    pack_linears(model, quantize="int8")    # from now on the model generates and no longer trains
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import UserError
from generation.row_kernels import RowProduct, attend, build
from model import GPT, Block, KVCache

CHECK_SHAPE = (20, 64)  # rows and columns of the product that tells whether a kernel is there and right
TORCHS_MOST_ROWS = 4  # that torch's kernel for 8-bit weights takes faster than a product with widened ones


class PackedLinear(nn.Module):
    """A bfloat16 linear layer of (N, K) inputs in oneDNN's blocked layout, the fastest for a batch of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")

    def with_gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh) of the output, made while each number is at hand."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "gelu", [], "tanh")

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """The residual and the output, added before they are rounded."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")


class FewRowsLinear(nn.Module):
    """A linear layer of (N, K) inputs with a kernel for few rows; `many_rows` tells what to do with more."""

    def __init__(self, few_rows: RowProduct | TorchsInt8Product, bias: Tensor | None):
        super().__init__()
        self.few_rows, self.most_rows, self.bias = few_rows, few_rows.most_rows, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.few_rows(x) if len(x) <= self.most_rows else self.many_rows(x)

    def many_rows(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def with_gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh) of the output."""
        return (
            self.few_rows(x, gelu=True) if len(x) <= self.most_rows else F.gelu(self.many_rows(x), approximate="tanh")
        )

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """The residual and the output, added."""
        return self.few_rows(x, residual) if len(x) <= self.most_rows else self.many_rows(x).add_(residual)


class RowLinear(FewRowsLinear):
    """A bfloat16 linear layer, the fastest for one row; its weights are used as they lie.

    Raises NotImplementedError where the kernel cannot be built.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        weight = weight.detach()
        super().__init__(RowProduct(weight, None, bias), bias)
        self.weight = weight

    def many_rows(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Int8Linear(FewRowsLinear):
    """A linear layer with 8-bit weights: weight[n] is about scale[n] * int8[n], one scale an output channel.

    The input keeps its precision, so that the weights alone are rounded.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        weight, scale = quantize_rows(weight.detach())
        product = RowProduct if build() else TorchsInt8Product
        super().__init__(product(weight, scale, bias), bias)
        self.weight, self.scale = weight, scale

    def many_rows(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))  # 8-bit numbers are exact in any precision
        return (y * self.scale if self.bias is None else torch.addcmul(self.bias, y, self.scale)).to(x.dtype)


class TorchsInt8Product:
    """What RowProduct computes of 8-bit weights, by torch's kernel, which needs twice the time."""

    most_rows = TORCHS_MOST_ROWS

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        self.weight, self.scale, self.bias = weight, scale, bias

    def __call__(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        y = torch._weight_int8pack_mm(x, self.weight, self.scale)
        y = y if self.bias is None else y.add_(self.bias)
        y = F.gelu(y, approximate="tanh") if gelu else y
        return y if residual is None else y.add_(residual)


class PackedBlock(nn.Module):
    """A layer made of such products in as few calls as there are: for one token each call costs time of its own."""

    def __init__(self, block: Block, layer: type[PackedLinear | FewRowsLinear]):
        super().__init__()
        self.layer, self.n_head = block.attn.layer, block.attn.n_head
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        linears = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        self.c_attn, self.attn_proj, self.c_fc, self.mlp_proj = (layer(one.weight, one.bias) for one in linears)
        dtype, size = block.ln_1.weight.dtype, block.attn.c_proj.in_features // self.n_head
        self.has_kernel = dtype == torch.bfloat16 and build() is not None and build().serves_heads(size)

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        x = x.reshape(B * T, C)  # the shape that the products work on: others they change and change back
        qkv = self.c_attn.forward(normed(x, self.ln_1))
        if self.has_kernel and T == 1 and mask is None and cache is not None and isinstance(cache.rows, slice):
            y = attend(qkv, cache.keys_values[self.layer], cache.positions.start)
        else:
            qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
            q, k, v = qkv if cache is None else (qkv[0], *cache.write(self.layer, qkv[1:]))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
            y = y.transpose(1, 2).reshape(B * T, C)
        x = self.attn_proj.added_to(x, y)
        return self.mlp_proj.added_to(x, self.c_fc.with_gelu(normed(x, self.ln_2))).view(B, T, C)


def normed(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """What the LayerNorm makes of x, without a module's way of calling it."""
    return torch.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as int8 of -127..127 and its scale (N,) in the same precision, by each row's largest value."""
    tiny = torch.finfo(weight.dtype).tiny
    scale = (weight.abs().amax(1).float() / 127).to(weight.dtype).clamp(min=tiny)
    return (weight.float() / scale.float()[:, None]).round_().to(torch.int8), scale


def pack_linears(model: GPT, quantize: str | None = None, streams: int = 1) -> str:
    """Replace `model`'s blocks and head, in place, by what generates fastest; says in words what that is.

    Afterwards the model only generates. `quantize` is "int8" or None, `streams` the number of texts made at a time.
    Raises UserError where 8-bit weights have no kernel.
    """
    weight = model.h[0].attn.c_attn.weight
    on_cpu, dtype = weight.device.type == "cpu", weight.dtype
    if quantize == "int8":
        if not on_cpu or not is_exact(Int8Linear, dtype, tolerance=0.02):
            raise UserError("--quantize int8 has no kernel for this processor; leave it out, or add --device cpu")
        layer, description = Int8Linear, "8-bit weights"
    elif not on_cpu or dtype != torch.bfloat16:
        return "plain layers"
    elif is_exact(RowLinear, dtype, tolerance=0.02) and streams <= RowLinear(weight, None).most_rows:
        layer, description = RowLinear, "a kernel for few rows"
    elif is_exact(PackedLinear, dtype, tolerance=0.02):
        layer, description = PackedLinear, "weights packed for the processor"
    else:
        return "plain layers"
    model.packed_head = layer(model.wte.weight[: model.config.n_vocab], None)
    model.h = nn.ModuleList(PackedBlock(block, layer) for block in model.h)
    return description


def is_exact(layer: type[PackedLinear | FewRowsLinear], dtype: torch.dtype, tolerance: float) -> bool:
    """Whether a layer's kernels are in this torch, run on this processor and multiply right."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CHECK_SHAPE, generator=generator).to(dtype)
    x = torch.randn(3, CHECK_SHAPE[1], generator=generator).to(dtype)
    residual = torch.ones(3, CHECK_SHAPE[0], dtype=dtype)
    try:
        one = layer(weight, None)
        found = [one(x), one.with_gelu(x), one.added_to(residual, x)]
    except (RuntimeError, AttributeError, NotImplementedError):  # no such operator, or none for this processor
        return False
    plain = F.linear(x.float(), weight.float())
    expected = [plain, F.gelu(plain, approximate="tanh"), plain + 1]
    errors = [float((y.float() - z).abs().max()) for y, z in zip(found, expected, strict=True)]
    return max(errors) < tolerance * float(plain.abs().max())
