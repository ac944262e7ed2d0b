"""Put what a model computed into JSON: small numbers as they are, tensors as base64 of float32."""

import base64
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

N_LOGITS = 100  # of the likeliest tokens at each position
N_SHOWN = 10  # of them with their names
TEMPERATURES = tuple(round(0.1 * n, 1) for n in range(1, 21))

Json = dict[str, Any]
Names = Callable[[int], str]  # token id -> how it is shown


def packed(tensor: Tensor) -> str:
    """Base64 of the numbers in float32, the low byte first."""
    return base64.b64encode(tensor.detach().cpu().float().numpy().astype("<f4").tobytes()).decode()


def triangle(weights_TT: Tensor) -> Tensor:
    """The rows of a causal matrix without what is masked: 1 + 2 + ... + T numbers."""
    rows, columns = torch.tril_indices(*weights_TT.shape)
    return weights_TT[rows, columns]


def number(value: float) -> float | None:
    """A number that JSON has."""
    return round(value, 6) if math.isfinite(value) else None


def tensors(
    q_TD: Tensor, k_SD: Tensor, v_SD: Tensor, weights_TS: Tensor, out_TD: Tensor, causal: bool
) -> Json:
    """All that is behind each cell of one head."""
    weights = triangle(weights_TS) if causal else weights_TS
    named = {"q": q_TD, "k": k_SD, "v": v_SD, "w": weights, "o": out_TD}
    return {name: packed(tensor) for name, tensor in named.items()}


def predictions(logits_TV: Tensor, truth_T: Tensor, names: Names) -> Json:
    """What each position predicts, from which a page can compute any temperature, top-k and top-p.

    `truth_T` holds the right tokens, -1 where there is none. The sum of exp(z/t) over the whole
    vocabulary comes along for each temperature t, as the page has only the largest logits.
    """
    logits_TV, truth_T = logits_TV.cpu().double(), truth_T.cpu()
    top = logits_TV.topk(min(N_LOGITS, logits_TV.shape[-1]))
    sums_TN = torch.stack([(logits_TV / t).logsumexp(-1) for t in TEMPERATURES], dim=-1)
    true_T1 = truth_T.clamp(min=0)[:, None]
    losses_T = -logits_TV.log_softmax(-1).gather(-1, true_T1)[:, 0]
    ranks_T = (logits_TV > logits_TV.gather(-1, true_T1)).sum(-1).masked_fill(truth_T < 0, -1)
    return {
        "top": [[names(token) for token in row] for row in top.indices[:, :N_SHOWN].tolist()],
        "truth": [names(token) if token >= 0 else None for token in truth_T.tolist()],
        "ranks": ranks_T.tolist(),
        "logits": packed(top.values),
        "sums": packed(sums_TN),
        "losses": packed(losses_T.masked_fill(truth_T < 0, math.nan)),
        "loss": number(float(losses_T[truth_T >= 0].mean())),
    }
