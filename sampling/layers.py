"""Linear layers for few rows: with weights in the kernel's own order, of 32, 16 or 8 bits."""

import functools
import warnings

import torch
from torch import Tensor, nn

from model import require

FEW_ROWS = 32  # up to this many, reading the weights takes longer than multiplying them
TINY = torch.finfo(torch.float32).tiny  # a row of zeros has no scale
# torch announces that it will drop these kernels, which have no successor as fast for one row
warnings.filterwarnings("ignore", "fbgemm_.* is deprecated")


def has_fbgemm() -> bool:
    """Return whether torch has the library of kernels for small weights: on x86, from AVX2 on."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed once, into the order in which oneDNN reads it.

    A product of few rows then runs at the speed of the memory. torch's own layer packs the weight
    each time, or reads it unpacked, and reaches half of that.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.plain_bias = plain(linear.bias)
        weight_OI = linear.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, FEW_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.plain_bias, "none", [], "")


class Float16Linear(nn.Module):
    """A linear layer whose weight is rounded to float16; all else stays float32 (FBGEMM).

    It needs no units for float16: each weight is widened when it is read. Raises ValueError if a
    weight is too large.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach()
        largest, most = float(weight_OI.abs().max()), torch.finfo(torch.float16).max
        require(largest <= most, f"float16 holds weights up to {most:,.0f}: got {largest:,.0f}")
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight_OI, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8Linear(nn.Module):
    """A linear layer that multiplies integers of 8 bits (FBGEMM): W ≈ diag(s) W₈, X ≈ diag(r) X₈.

    sᵢ = maxⱼ |Wᵢⱼ| / 127, and so for X, as in Dettmers et al., 2022 (LLM.int8, arXiv 2208.07339,
    sec. 2.1). The kernel has one scale for all rows of X, so we bring them to one size first: no
    text is rounded by what others in its batch need.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight_OI, self.scale_O = to_int8(linear.weight.detach(), largest_weight())
        self.packed, self.sum_O = packed_int8(self.weight_OI)
        self.plain_bias, self.zero_O = plain(linear.bias), torch.zeros_like(self.scale_O)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            y = self.multiply(x)
        else:
            size = x.abs().amax(dim=-1, keepdim=True).clamp_(min=TINY)
            y = self.multiply(x / size).mul_(size)
        if self.plain_bias is None:
            return y.mul_(self.scale_O)
        return torch.addcmul(self.plain_bias, y, self.scale_O)

    def multiply(self, x: Tensor) -> Tensor:
        """Return X W₈ᵀ, with X rounded to 8 bits."""
        return torch.fbgemm_linear_int8_weight_fp32_activation(
            x, self.weight_OI, self.packed, self.sum_O, 1.0, 0, self.zero_O
        )


class Int8WeightLinear(nn.Module):
    """A linear layer with such weights where FBGEMM is not, as on Arm: the input stays float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight_OI, self.scale_O = to_int8(linear.weight.detach(), most=127)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y = torch.ops.aten._weight_int8pack_mm(rows, self.weight_OI, self.scale_O)
        y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], -1)


def plain(bias: nn.Parameter | None) -> Tensor | None:
    """Return a bias as an attribute that Python finds at once: a module looks up parameters."""
    return None if bias is None else bias.detach()


def to_int8(weight_OI: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Round each row to integers from -most to most; return these and the scales (O,)."""
    scale_O = weight_OI.abs().amax(dim=1).clamp_(min=TINY) / most
    return (weight_OI / scale_O[:, None]).round_().to(torch.int8), scale_O


def packed_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return what FBGEMM needs of a weight: its own order of it, and the sum of each row."""
    return torch.fbgemm_pack_quantized_matrix(weight_OI), weight_OI.sum(dim=1, dtype=torch.int32)


@functools.cache
def largest_weight() -> int:
    """Return 127; or 63 where the processor adds two products in 16 bits, and would cut the sum.

    That is so before VNNI: 2 · 255 · 127 is more than 32,767.
    """
    weight_OI = torch.full((16, 64), 127, dtype=torch.int8)
    sums = (weight_OI, *packed_int8(weight_OI))
    x = torch.ones(1, 64)
    y = torch.fbgemm_linear_int8_weight_fp32_activation(x, *sums, 1.0, 0, torch.zeros(16))
    return 127 if y.min() > 0.99 * 64 * 127 else 63
