"""Two worked examples from texts about attention, every number right, in the model's own views.

The first is a walk-through in PyTorch: two texts of four tokens, two channels, one head. The second
takes three words as their own queries, keys and values, and asks what "sat" reads: as it is often
printed, without scale and mask, its weights are 0.29, 0.38, 0.34.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model import attention
from viewer.payload import Json, tensors

# torch.manual_seed(42); torch.randn(2, 4, 2); then nn.Linear(2, 2) for query, key and value
X_BTC = torch.tensor(
    [
        [
            [1.926915, 1.487284],
            [0.900717, -2.105521],
            [0.678418, -1.234545],
            [-0.043067, -1.604667],
        ],
        [
            [-0.752135, 1.648723],
            [-0.392479, -1.403607],
            [-0.727881, -0.559430],
            [-0.768839, 0.762445],
        ],
    ]
)
LINEAR = {  # weight and bias
    "query": ([[0.545099, 0.104517], [-0.330106, 0.180240]], [-0.325790, -0.082924]),
    "key": ([[-0.287197, 0.469074], [-0.558169, -0.325984]], [-0.199669, -0.425164]),
    "value": ([[0.066739, -0.698395], [0.638595, -0.600665]], [0.545906, 0.117676]),
}
WORDS = ["The", "cat", "sat"]
WORDS_TC = torch.tensor([[0.2, 0.8, 0.1], [0.9, 0.3, 0.7], [0.4, 0.6, 0.5]])
CAT = (  # name, causal, scaled
    ("as often printed: no scale, no mask", False, False),
    ("with the mask", True, False),
    ("with mask and 1/√d, as in a GPT", True, True),
)


def walk_through() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, T, D) of the first example, with one head."""
    found = (F.linear(X_BTC, *map(torch.tensor, LINEAR[name])) for name in LINEAR)
    q_BHTD, k_BHTD, v_BHTD = (tensor[:, None] for tensor in found)
    return q_BHTD, k_BHTD, v_BHTD


def cat_sat(causal: bool, scaled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, weights and outputs of the second example."""
    x_BHTD = WORDS_TC[None, None]
    q_BHTD = x_BHTD if scaled else x_BHTD * math.sqrt(x_BHTD.shape[-1])  # undoes the scale
    y_BHTD, weights_BHTS = attention(q_BHTD, x_BHTD, x_BHTD, causal=causal)
    found = (x_BHTD, x_BHTD, x_BHTD, weights_BHTS, y_BHTD)
    q_TD, k_TD, v_TD, weights_TS, y_TD = (tensor[0, 0] for tensor in found)
    return q_TD, k_TD, v_TD, weights_TS, y_TD


def examples_scene() -> Json:
    q_BHTD, k_BHTD, v_BHTD = walk_through()
    y_BHTD, weights_BHTS = attention(q_BHTD, k_BHTD, v_BHTD, causal=True)
    names = [f"token {n}" for n in range(X_BTC.shape[1])]
    axes = [{"queries": names, "keys": names, "causal": True, "scale": math.sqrt(2)}]
    panels = [
        {"row": 0, "name": f"text {b}", "axes": 0}
        | tensors(*(t[b, 0] for t in (q_BHTD, k_BHTD, v_BHTD, weights_BHTS, y_BHTD)), causal=True)
        for b in range(len(X_BTC))
    ]
    for name, causal, scaled in CAT:
        axes.append({"queries": WORDS, "keys": WORDS, "causal": causal})
        axes[-1]["scale"] = math.sqrt(3) if scaled else 1
        of_head = tensors(*cat_sat(causal, scaled), causal=causal)
        panels.append({"row": 1, "name": name, "axes": len(axes) - 1} | of_head)
    return {
        "name": "Worked examples",
        "about": "Small enough to check by hand: two texts of four tokens, and three words that "
        "are their own queries, keys and values. Often printed with weights 0.26, 0.39, 0.35 for "
        "what “sat” reads; they are 0.29, 0.38, 0.34.",
        "rows": ["4 tokens, 2 channels", "The cat sat"],
        "axes": axes,
        "notices": [],
        "frames": [{"step": 0, "panels": panels}],
    }
