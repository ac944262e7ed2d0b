"""Fewer bytes per token: what a decode step reads is its time, so weights shrink or lie better.

For one sequence every weight is read once for each token, and used once.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.parallel import has_bfloat16
from model import GPT

SamplePrecision = Literal["auto", "float32", "bfloat16", "int8"]
FEW_ROWS = 32  # up to so many, reading weights takes longer than multiplying them
INT8_MAX = 127


def convert(model: GPT, precision: SamplePrecision) -> GPT:
    """Put a model for evaluation into a precision, in place. `auto` is bfloat16 on a GPU that
    has it, else float32. Raises ValueError if the machine has not what is asked for.
    """
    device = model.wte.weight.device
    kind = precision
    if precision == "auto":
        kind = "bfloat16" if device.type == "cuda" and has_bfloat16(device) else "float32"
    check(kind, device)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    if device.type == "cpu" and (kind == "int8" or torch.backends.mkldnn.is_available()):
        replace_linears(model, Int8Linear if kind == "int8" else PackedLinear, dtype)
    return model.requires_grad_(False).to(dtype)


def check(precision: SamplePrecision, device: torch.device) -> None:
    if precision != "float32" and not has_bfloat16(device):
        raise ValueError(
            f"precision {precision} needs bfloat16, which this {device.type} does not multiply "
            "in hardware: use --precision=float32"
        )
    if precision == "int8" and device.type != "cpu":
        raise ValueError(f"precision int8 is for a cpu, not for {device.type}: use bfloat16")


def replace_linears(
    module: nn.Module, kind: "type[PackedLinear | Int8Linear]", dtype: torch.dtype
) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child, dtype))
        else:
            replace_linears(child, kind, dtype)


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in the order in which oneDNN reads it.

    Packed once, a product of few rows runs at the speed of the memory; torch's own linear layer
    packs, or reads unpacked, each time, and reaches a half of it.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias, weight_OI = linear.bias, linear.weight.detach().to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, FEW_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer whose weight is rounded to 8 bits, with a scale for each row.

    W ≈ diag(s) W₈, sᵢ = maxⱼ |Wᵢⱼ| / 127 (as LLM.int8, Dettmers et al., 2022, arXiv 2208.07339,
    sec. 2.1, does for vectors); products and sums stay in bfloat16 and float32.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        # torch's kernel reads 16 channels at once, and beyond the end of a row if it must
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
