"""Store weights smaller, or in the order in which the kernel reads them.

A decode step of one text reads each weight once and uses it once, so reading
them is what takes the time.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.device import has_bfloat16
from model import GPT

SamplePrecision = Literal["auto", "float32", "bfloat16", "int8"]
FEW_ROWS = 32  # up to this many, reading the weights takes longer than multiplying them
INT8_MAX = 127


def convert(model: GPT, precision: SamplePrecision) -> GPT:
    """Put a model into a precision, in place, for evaluation only.

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
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    if device.type == "cpu" and (kind == "int8" or torch.backends.mkldnn.is_available()):
        layer = Int8Linear if kind == "int8" else PackedLinear
        linears = {n: part for n, part in model.named_modules() if isinstance(part, nn.Linear)}
        for name, linear in linears.items():
            model.set_submodule(name, layer(linear, dtype))
    return model.requires_grad_(False).to(dtype)


def available(device: torch.device) -> list[SamplePrecision]:
    """Return what a device multiplies in hardware; int8 weights are for a CPU with bfloat16."""
    if not has_bfloat16(device):
        return ["float32"]
    return ["float32", "bfloat16", "int8"] if device.type == "cpu" else ["float32", "bfloat16"]


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed once, into the order in which oneDNN reads it.

    A product of few rows then runs at the speed of the memory. torch's own layer packs the weight
    each time, or reads it unpacked, and reaches half of that.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = linear.bias
        weight_OI = linear.weight.detach().to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, FEW_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer whose weight is rounded to 8 bits, with a scale for each row.

    W ≈ diag(s) W₈ with sᵢ = maxⱼ |Wᵢⱼ| / 127, as Dettmers et al., 2022 (LLM.int8, arXiv 2208.07339,
    sec. 2.1) do for vectors. Products stay in bfloat16, and sums in float32.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        # torch's kernel reads 16 channels at once, even beyond the end of a row
        self.padding = -linear.in_features % 16
        weight_OI = F.pad(linear.weight.detach().float(), (0, self.padding))
        scale_O = weight_OI.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
        self.weight_OI = (weight_OI / scale_O[:, None]).round().to(torch.int8)
        self.scale_O, self.bias = scale_O.to(dtype), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if self.padding:
            rows = F.pad(rows, (0, self.padding))
        if len(rows) <= FEW_ROWS:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight_OI, self.scale_O)
        else:
            y = F.linear(rows, self.weight_OI.to(x.dtype)) * self.scale_O
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)
