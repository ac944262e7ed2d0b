"""The scene of a trained model: one text, seen by all its heads at all its checkpoints."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model import GPT, ModelConfig
from viewer.labels import label
from viewer.payload import TEMPERATURES, Json, Names, number, packed, predictions, tensors
from viewer.probe import Measured
from viewer.record import costs, record
from viewer.scores import NAMES, SCORES, uniform

MOST_TOKENS, MOST_LAYERS, MOST_HEADS = 256, 12, 12  # that a page opens with in three seconds
MOST_BYTES = 64e6  # of one scene; fewer checkpoints if there is more


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was after so many steps."""

    step: int
    model: GPT
    measured: Measured


def shown_heads(config: ModelConfig) -> list[tuple[int, int]]:
    layers, heads = min(config.n_layer, MOST_LAYERS), min(config.n_head, MOST_HEADS)
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def most_checkpoints(config: ModelConfig, n_tokens: int) -> int:
    """How many checkpoints a page can hold, each with its weights, q, k, v and outputs."""
    numbers = n_tokens * (n_tokens + 1) / 2 + 4 * n_tokens * config.head_dim
    return max(1, int(MOST_BYTES / (len(shown_heads(config)) * numbers * 4 * 4 / 3)))


def cuts(config: ModelConfig, n_tokens: int) -> list[str]:
    """Sentences that say what of the model or the text is not shown."""
    limits = {"tokens": (n_tokens, MOST_TOKENS), "layers": (config.n_layer, MOST_LAYERS)}
    limits["heads of each layer"] = (config.n_head, MOST_HEADS)
    return [
        f"The first {most} of {n} {name} are shown."
        for name, (n, most) in limits.items()
        if n > most
    ]


def model_scene(
    checkpoints: list[Checkpoint], tokens_1T: Tensor, names: Names, notices: list[str]
) -> Json:
    """All that the page shows of one text; `names` gives what to show for a token id."""
    config, tokens_T = checkpoints[-1].model.config, tokens_1T[0].cpu()
    labels, measured = [names(token) for token in tokens_T.tolist()], checkpoints[-1].measured
    axes = {"queries": labels, "keys": labels, "causal": True, "scale": math.sqrt(config.head_dim)}
    alike = uniform(len(tokens_T))
    baselines = {n: [float(f(alike, tokens_T)), measured.uniform[n]] for n, f in SCORES.items()}
    return {
        "name": "Your model",
        "about": "Each row of a map is a token's query, each column a token's key. Click a cell "
        "for the numbers behind it; arrow keys move it. Point at a token: filled is what it reads, "
        "underlined is what reads it.",
        "rows": [f"layer {n}" for n in range(min(config.n_layer, MOST_LAYERS))],
        "axes": [axes],
        "ids": tokens_T.tolist(),
        "uniform": {name: list(map(number, pair)) for name, pair in baselines.items()},
        "scores": NAMES,
        "temperatures": TEMPERATURES,
        "notices": notices,
        "turned": config.is_modern,
        "frames": [frame(checkpoint, tokens_1T, names) for checkpoint in checkpoints],
    }


def frame(checkpoint: Checkpoint, tokens_1T: Tensor, names: Names) -> Json:
    """One checkpoint's heads and predictions on the text."""
    model, measured = checkpoint.model, checkpoint.measured
    kept, tokens_T = record(model, tokens_1T), tokens_1T[0].cpu()
    truth_T = tokens_T.roll(-1)
    truth_T[-1] = -1  # nobody knows what comes next
    of_heads = (kept.q_LBHTD, kept.k_LBHTD, kept.v_LBHTD, kept.weights_LBHTS, kept.heads_LBHTD)
    weights_LHTT = kept.weights_LBHTS[:, 0].cpu()
    on_text = {name: score(weights_LHTT, tokens_T) for name, score in SCORES.items()}
    costs_LHT = costs(model, tokens_1T)[:, :, 0]
    panels = [
        {"row": layer, "name": f"layer {layer}, head {head}", "axes": 0}
        | tensors(*(tensor[layer, 0, head] for tensor in of_heads), causal=True)
        | opinions(layer, head, on_text, measured)
        | {"costs": packed(costs_LHT[layer, head])}
        for layer, head in shown_heads(model.config)
    ]
    return {
        "step": checkpoint.step,
        "panels": panels,
        "copyLoss": number(measured.copy_loss),
        **predictions(kept.logits_BTV[0], truth_T, names),
    }


def opinions(layer: int, head: int, on_text: dict[str, Tensor], measured: Measured) -> Json:
    """A head's scores, on this text and on the probes, its label, and what it is worth."""
    key, why = label(layer, head, measured)
    scores: dict[str, Any] = {
        name: [number(float(t[layer, head])) for t in (on_text[name], measured.score(name))]
        for name in SCORES
    }
    worth = (measured.cost_written_LH, measured.cost_copied_LH)
    costs = [number(float(cost_LH[layer, head])) for cost_LH in worth]
    return {"label": key, "why": why, "scores": scores, "worth": costs}
