"""Store weights smaller, or in the order in which the kernel reads them.

A step of one text reads each weight once and uses it once, so reading them is what takes time.
"""

import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from engine.device import has_bfloat16
from model import GPT
from sampling.step import use_steps

SamplePrecision = Literal["auto", "float32", "float16", "bfloat16", "int8"]
FEW_ROWS = 32  # up to this many, reading the weights takes longer than multiplying them
TINY = torch.finfo(torch.float32).tiny  # a row of zeros has no scale
ROUNDS = 5
# torch announces that it will drop these kernels, which have no successor as fast for one row
warnings.filterwarnings("ignore", "fbgemm_.* is deprecated")


def convert(model: GPT, precision: SamplePrecision, rows: int = 1) -> GPT:
    """Put a model into a precision, in place, for the evaluation of mostly `rows` rows at once.

    `auto` is bfloat16 on a GPU that has it, else float32. Raises ValueError if the hardware does
    not support what is asked for.
    """
    device = model.wte.weight.device
    kinds = available(device)
    kind = precision
    if precision == "auto":
        kind = "bfloat16" if device.type == "cuda" and "bfloat16" in kinds else "float32"
    if kind not in kinds:
        raise ValueError(
            f"this {device.type} does not support precision {kind}: choose {' or '.join(kinds)}"
        )
    if device.type == "cpu":
        use_steps(model)
        pack(model, kind, rows)
    return model.requires_grad_(False).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)


def pack(model: GPT, kind: SamplePrecision, rows: int) -> None:
    """Replace the linear layers by those that compute a precision fastest on this CPU."""
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    layer = layer_of(kind)
    if layer is None or (kind == "float32" and not is_faster_packed(model.lm_head, rows)):
        return
    linears = {n: part for n, part in model.named_modules() if isinstance(part, nn.Linear)}
    for name, linear in linears.items():
        model.set_submodule(name, layer(linear))


def layer_of(kind: SamplePrecision) -> Callable[[nn.Linear], nn.Module] | None:
    """Return the layer of a precision; None leaves torch's own."""
    if kind == "float16":
        return Float16Linear
    if kind == "int8":
        return Int8Linear if has_fbgemm() else Int8WeightLinear
    return PackedLinear if torch.backends.mkldnn.is_available() else None


def is_faster_packed(linear: nn.Linear, rows: int) -> bool:
    """Time one of the layers: processors differ in whether packing pays for a single row."""
    x = torch.randn(min(rows, FEW_ROWS), linear.in_features)
    medians: list[float] = []
    with torch.inference_mode():
        for layer in (PackedLinear(linear), linear):
            seconds: list[float] = []
            for _ in range(ROUNDS):
                started_at = time.perf_counter()
                layer(x)
                seconds.append(time.perf_counter() - started_at)
            medians.append(statistics.median(seconds))
    return medians[0] < medians[1]


def available(device: torch.device) -> list[SamplePrecision]:
    """Return the precisions that pay on a device; weights of float16 and int8 are for a CPU."""
    is_cpu = device.type == "cpu"
    kinds: dict[SamplePrecision, bool] = {
        "float32": True,
        "float16": is_cpu and has_fbgemm(),
        "bfloat16": has_bfloat16(device),
        "int8": is_cpu,
    }
    return [kind for kind, is_here in kinds.items() if is_here]


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
        self.bias = linear.bias
        weight_OI = linear.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, FEW_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Float16Linear(nn.Module):
    """A linear layer whose weight is rounded to float16; all else stays float32 (FBGEMM).

    It needs no units for float16: each weight is widened when it is read.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach()
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
        self.bias, self.zero_O = linear.bias, torch.zeros_like(self.scale_O)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) == 1:
            y = self.multiply(rows)
        else:
            size_R1 = rows.abs().amax(dim=1, keepdim=True).clamp_(min=TINY)
            y = self.multiply(rows / size_R1).mul_(size_R1)
        y = y.mul_(self.scale_O) if self.bias is None else y.mul_(self.scale_O).add_(self.bias)
        return y.view(*x.shape[:-1], -1)

    def multiply(self, x_RI: Tensor) -> Tensor:
        """Return X W₈ᵀ (R, O), with X rounded to 8 bits."""
        weight = (self.weight_OI, self.packed, self.sum_O)
        return torch.fbgemm_linear_int8_weight_fp32_activation(x_RI, *weight, 1.0, 0, self.zero_O)


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
