"""Two worked examples from texts about attention, shown as a model is, with every number right.

The first is a walk-through in PyTorch: two texts of four tokens, two channels, one head. The second
takes three words as their own queries, keys and values, and asks what "sat" attends to. Printed
versions of it, without scale and mask, say 0.26, 0.39, 0.35; the weights are 0.29, 0.38, 0.34.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model import attention, causal_mask
from viewer.page import Json, tensors

# torch.manual_seed(42); torch.randn(2, 4, 2); then nn.Linear(2, 2) for query, key and value
TEXTS = [
    [[1.926915, 1.487284], [0.900717, -2.105521], [0.678418, -1.234545], [-0.043067, -1.604667]],
    [[-0.752135, 1.648723], [-0.392479, -1.403607], [-0.727881, -0.559430], [-0.768839, 0.762445]],
]
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
Head = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q_TD, k_TD, v_TD, weights_TS, y_TD


def walk_through(text: int) -> Head:
    """Return queries, keys, values, weights and outputs of a text of the first example."""
    x_TC = torch.tensor(TEXTS[text])
    q_TD, k_TD, v_TD = (F.linear(x_TC, *map(torch.tensor, LINEAR[name])) for name in LINEAR)
    return attend(q_TD, k_TD, v_TD, causal=True)


def cat_sat(causal: bool, scaled: bool) -> Head:
    """Return queries, keys, values, weights and outputs of the second example."""
    q_TD = WORDS_TC if scaled else WORDS_TC * math.sqrt(WORDS_TC.shape[1])  # undoes the scale
    *_, weights_TS, y_TD = attend(q_TD, WORDS_TC, WORDS_TC, causal)
    return WORDS_TC, WORDS_TC, WORDS_TC, weights_TS, y_TD


def attend(q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, causal: bool) -> Head:
    mask = causal_mask(len(q_TD), q_TD.dtype, q_TD.device) if causal else None
    y_BHTD, weights_BHTS = attention(q_TD[None, None], k_TD[None, None], v_TD[None, None], mask)
    return q_TD, k_TD, v_TD, weights_BHTS[0, 0], y_BHTD[0, 0]


def examples_scene() -> Json:
    names = [f"token {n}" for n in range(len(TEXTS[0]))]
    axes = [{"queries": names, "keys": names, "causal": True, "scale": math.sqrt(2)}]
    panels = [
        {"row": 0, "name": f"text {n}", "axes": 0, **tensors(*walk_through(n), causal=True)}
        for n in range(len(TEXTS))
    ]
    for name, causal, scaled in CAT:
        scale = math.sqrt(3) if scaled else 1
        head = tensors(*cat_sat(causal, scaled), causal=causal)
        panels.append({"row": 1, "name": name, "axes": len(axes), **head})
        axes.append({"queries": WORDS, "keys": WORDS, "causal": causal, "scale": scale})
    return {
        "name": "Worked examples",
        "about": "Small enough to check by hand: two texts of four tokens, and three words that "
        "are their own queries, keys and values. The weights of “sat” are often printed as 0.26, "
        "0.39, 0.35; they are 0.29, 0.38, 0.34.",
        "rows": ["4 tokens, 2 channels", "The cat sat"],
        "axes": axes,
        "notices": [],
        "frames": [{"step": 0, "panels": panels}],
    }
