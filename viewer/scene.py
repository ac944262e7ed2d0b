"""The scene of a trained model: one text, as all heads see it at all checkpoints."""

import math
from dataclasses import dataclass

from torch import Tensor

from model import GPT, ModelConfig
from viewer.labels import costs_of, label
from viewer.page import TEMPERATURES, Json, Names, number, packed, predictions, tensors
from viewer.probe import Measured
from viewer.record import MOST_HEADS, MOST_LAYERS, costs, record, shown_heads
from viewer.scores import NAMES, SCORES, uniform

MOST_TOKENS = 256
MOST_BYTES = 64e6  # of one scene; if all checkpoints would take more, fewer are shown


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was after a number of steps."""

    step: int
    model: GPT
    measured: Measured


def most_checkpoints(config: ModelConfig, n_tokens: int) -> int:
    """Return how many checkpoints a page can hold, each with its weights, q, k, v and outputs."""
    numbers = n_tokens * (n_tokens + 1) / 2 + 4 * n_tokens * config.head_dim
    in_base64 = numbers * 4 * 4 / 3  # 4 bytes each, and 4 characters for 3 bytes
    return max(1, int(MOST_BYTES / (len(shown_heads(config)) * in_base64)))


def cuts(config: ModelConfig, n_tokens: int) -> list[str]:
    """Return a sentence for each part of the model or the text that is not shown whole."""
    limits = (
        (n_tokens, MOST_TOKENS, "tokens"),
        (config.n_layer, MOST_LAYERS, "layers"),
        (config.n_head, MOST_HEADS, "heads of each layer"),
    )
    return [f"The first {most} of {n} {name} are shown." for n, most, name in limits if n > most]


def model_scene(
    checkpoints: list[Checkpoint], tokens_1T: Tensor, names: Names, notices: list[str]
) -> Json:
    """Return all that the page shows of one text; `names` says how a token id is shown."""
    config = checkpoints[-1].model.config
    on_probes = checkpoints[-1].measured.uniform
    tokens_T = tokens_1T[0].cpu()
    alike_TT = uniform(len(tokens_T))
    on_text = {name: score(alike_TT, tokens_T) for name, score in SCORES.items()}
    labels = [names(token) for token in tokens_T.tolist()]
    axes = {"queries": labels, "keys": labels, "causal": True, "scale": math.sqrt(config.head_dim)}
    return {
        "name": "Your model",
        "about": "Each row of a map is a token's query, each column a token's key. Click a cell "
        "for the numbers behind it; arrow keys move to its neighbours. Point at a token: those "
        "that it attends to are filled, those that attend to it are underlined.",
        "rows": [f"layer {n}" for n in range(min(config.n_layer, MOST_LAYERS))],
        "axes": [axes],
        "ids": tokens_T.tolist(),
        "uniform": {name: [number(on_text[name]), number(on_probes[name])] for name in SCORES},
        "scores": NAMES,
        "temperatures": TEMPERATURES,
        "notices": notices,
        "turned": config.is_modern,
        "frames": [frame(checkpoint, tokens_1T, names) for checkpoint in checkpoints],
    }


def frame(checkpoint: Checkpoint, tokens_1T: Tensor, names: Names) -> Json:
    """Return one checkpoint's heads and predictions on the text."""
    kept = record(checkpoint.model, tokens_1T)
    of_heads = (kept.q_LBHTD, kept.k_LBHSD, kept.v_LBHSD, kept.weights_LBHTS, kept.y_LBHTD)
    tokens_T = tokens_1T[0].cpu()
    weights_LHTT = kept.weights_LBHTS[:, 0].cpu()
    on_text = {name: score(weights_LHTT, tokens_T) for name, score in SCORES.items()}
    costs_LHN = costs(checkpoint.model, tokens_1T)[:, :, 0]
    truth_T = tokens_T.roll(-1)
    truth_T[-1] = -1  # nobody knows what comes next
    panels = [
        {
            "row": layer,
            "name": f"layer {layer}, head {head}",
            "axes": 0,
            **tensors(*(tensor[layer, 0, head] for tensor in of_heads), causal=True),
            **opinions(layer, head, on_text, checkpoint.measured),
            "costs": packed(costs_LHN[layer, head]),
        }
        for layer, head in shown_heads(checkpoint.model.config)
    ]
    return {
        "step": checkpoint.step,
        "panels": panels,
        "copyLoss": number(checkpoint.measured.copy_loss),
        **predictions(kept.logits_BTV[0], truth_T, names),
    }


def opinions(layer: int, head: int, on_text: dict[str, Tensor], measured: Measured) -> Json:
    """Return a head's scores on this text and on the probes, its label, and what it is worth."""
    key, why = label(layer, head, measured)
    pairs = {name: (on_text[name], measured.score(name)) for name in SCORES}
    return {
        "label": key,
        "why": why,
        "scores": {name: [number(t[layer, head]) for t in pair] for name, pair in pairs.items()},
        "worth": [number(cost) for cost in costs_of(layer, head, measured)],
    }
