"""Linear layers for generation on a CPU: read in memory order, or quantized to 8 bits.

Replaces: nn.Linear in the blocks and the head (see fast/generation.py). Generation reads every weight for every token,
so memory bandwidth limits its speed: with half the bytes it is up to twice as fast.
Gains: see docs/performance.md, "What each fast part gains".
Skipped: where a kernel is missing or computes wrong results (`is_exact`).

Shapes: N rows, K inputs, M outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.row_kernels import RowProduct, build, gelu

CHECK_SHAPE = (20, 64)  # rows and columns of the weight that `is_exact` multiplies with
TORCH_INT8_ROWS = 4  # up to this many rows, torch's 8-bit kernel is faster than a product with widened weights


class PackedLinear(nn.Module):
    """A bfloat16 linear layer of (N, K) inputs in oneDNN's blocked layout, the fastest for many rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")

    def with_gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh) of the output, computed before it is stored."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "gelu", [], "tanh")

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """The residual plus the output, added before rounding."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")


class FewRowsLinear(nn.Module):
    """A linear layer of (N, K) inputs with a kernel for few rows; `many_rows` handles more."""

    def __init__(self, few_rows: RowProduct | TorchInt8Product, bias: Tensor | None):
        super().__init__()
        self.few_rows, self.max_rows, self.bias = few_rows, few_rows.max_rows, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.few_rows(x) if len(x) <= self.max_rows else self.many_rows(x)

    def many_rows(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def with_gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh) of the output."""
        return self.few_rows(x, gelu=True) if len(x) <= self.max_rows else gelu(self.many_rows(x))

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """The residual and the output, added."""
        return self.few_rows(x, residual) if len(x) <= self.max_rows else self.many_rows(x).add_(residual)


class RowLinear(FewRowsLinear):
    """A float32 or bfloat16 linear layer, the fastest for one row; it uses the weight in its own layout.

    Raises NotImplementedError if the kernel cannot be built.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        weight = weight.detach()
        super().__init__(RowProduct(weight, None, bias), bias)
        self.weight = weight

    def many_rows(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Int8Linear(FewRowsLinear):
    """A linear layer with 8-bit weights: weight[m] is about scale[m] * int8[m], with one scale per output channel.

    The input keeps its precision; only the weights are rounded.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        weight, scale = quantize_rows(weight.detach())
        product = RowProduct if build() else TorchInt8Product
        super().__init__(product(weight, scale, bias), bias)
        self.weight, self.scale = weight, scale

    def many_rows(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))  # 8-bit integers are exact in any precision
        return (y * self.scale if self.bias is None else torch.addcmul(self.bias, y, self.scale)).to(x.dtype)


class TorchInt8Product:
    """RowProduct for 8-bit weights with torch's kernel, which takes twice as long."""

    max_rows = TORCH_INT8_ROWS

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        self.weight, self.scale, self.bias = weight, scale, bias

    def __call__(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        y = torch._weight_int8pack_mm(x, self.weight, self.scale)
        y = y if self.bias is None else y.add_(self.bias)
        y = F.gelu(y, approximate="tanh") if gelu else y
        return y if residual is None else y.add_(residual)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (M, K) as int8, and its scale (M,) in the weight's precision: each row's largest magnitude / 127."""
    tiny = torch.finfo(weight.dtype).tiny
    scale = (weight.abs().amax(1).float() / 127).to(weight.dtype).clamp(min=tiny)
    return (weight.float() / scale.float()[:, None]).round_().to(torch.int8), scale


def is_exact(
    layer: type[PackedLinear] | type[RowLinear] | type[Int8Linear], dtype: torch.dtype, tolerance: float
) -> bool:
    """Whether a layer's kernels exist in this torch version, run on this processor and compute correct results."""
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
