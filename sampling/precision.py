"""Store weights smaller, or in the order in which the kernel reads them.

A step of one text reads each weight once and uses it once, so reading them is what takes time.
"""

import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from engine.device import has_bfloat16
from model import GPT
from sampling.layers import (
    FEW_ROWS,
    Float16Linear,
    Int8Linear,
    Int8WeightLinear,
    PackedLinear,
    has_fbgemm,
)
from sampling.step import use_steps

SamplePrecision = Literal["auto", "float32", "float16", "bfloat16", "int8"]
ROUNDS = 5


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
        pack(model, kind, rows)
    model = model.to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    use_steps(model)
    return model.requires_grad_(False)


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
    x = torch.ones(min(rows, FEW_ROWS), linear.in_features)
    packed = PackedLinear(linear)
    with torch.inference_mode():
        return median_seconds(lambda: packed(x), ROUNDS) < median_seconds(lambda: linear(x), ROUNDS)


def median_seconds(do: Callable[[], object], rounds: int) -> float:
    seconds: list[float] = []
    for _ in range(rounds):
        started_at = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds)


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
