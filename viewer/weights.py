"""A model's weights, and what its tokenizer knows, as JSON from which the page runs the model."""

import base64
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import torch

from data.tokenizer import GPT2_PATTERN
from engine.count import count_parameters
from model import GPT
from viewer.page import Json

Form = Literal["f32", "f16", "int8"]  # how the numbers are written
BYTES: dict[Form, int] = {"f32": 4, "f16": 2, "int8": 1}  # of each number
MOST_PARAMETERS = 25_000_000  # of a model that a page runs
MOST_IN_F16 = 4_400_000  # they make a page of 12 MB; a larger model is int8
MOST_CHARACTERS = 24e6  # of all checkpoints in base64; if there are more, fewer are shown


def obstacle_to(model: GPT, tokenizer: Json | None) -> str:
    """Return why a page cannot run a model, or ""."""
    n = count_parameters(model)["total"]
    if tokenizer is None:
        return "no page can encode a text as this model's tokenizer does"
    if n > MOST_PARAMETERS:
        return f"a page holds up to {MOST_PARAMETERS:,} parameters, and this model has {n:,}"
    return ""


def most_copies(model: GPT, form: Form) -> int:
    """Return how many checkpoints a page can hold."""
    return max(1, int(MOST_CHARACTERS / (count_parameters(model)["total"] * BYTES[form] * 4 / 3)))


def pack(model: GPT, form: Form) -> Json:
    """Return {"form", "tensors": [[name, shape], ...], "data": base64}, without a tied head.

    f32 and f16 are the little-endian numbers of all tensors in order. int8 is the float32 of all,
    then the int8 of all: a vector is float32; a matrix has a float32 for each row, times its int8.
    """
    shapes = [[name, list(tensor.shape)] for name, tensor in model.named_parameters()]
    parts = [_parts(tensor, form) for tensor in model.parameters()]
    data = b"".join(part.tobytes() for of_all in zip(*parts, strict=True) for part in of_all)
    return {"form": form, "tensors": shapes, "data": base64.b64encode(data).decode()}


def rounded(model: GPT, form: Form) -> GPT:
    """Return a copy of the model that has the weights as the page will have them."""
    copy = deepcopy(model)
    for tensor in copy.parameters():
        numbers, cells = _parts(tensor, form)
        product = numbers[:, None] * cells if cells.size else numbers
        tensor.data.copy_(torch.from_numpy(product.astype(np.float32)))
    return copy


def _parts(tensor: torch.Tensor, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers that are written of a tensor, or the scales of its rows, and its int8."""
    array = tensor.detach().float().cpu().numpy()
    if form != "int8" or array.ndim == 1:
        return array.astype("<f2" if form == "f16" else "<f4"), np.empty(0, np.int8)
    scales_R = (np.abs(array).max(axis=1) / 127).astype("<f4")
    with np.errstate(divide="ignore", invalid="ignore"):  # where the scale is 0, infinite or nan
        rows_RC = np.nan_to_num(array / scales_R[:, None]).clip(-127, 127)
    return scales_R, np.rint(rows_RC).astype(np.int8)


def tokenizer_spec(state: dict[str, Any]) -> Json | None:
    """Return what the page needs to encode as this tokenizer, or None if it cannot."""
    match state:
        case {"kind": "char", "characters": str(known), "with_end_of_text": with_end}:
            return {"kind": "char", "characters": known, "end": len(known) if with_end else None}
        case {"kind": "byte"}:
            return {"kind": "byte", "end": 256}
        case {"kind": "bpe" | "gpt2", "pattern": pattern} if pattern == GPT2_PATTERN:
            tokens = [line.split()[0] for line in state["ranks"].splitlines()]
            return {"kind": "bpe", "tokens": tokens, "end": len(tokens)}
    return None
