"""The scene of a trained model: one text, as all heads see it at all checkpoints."""

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from model import GPT, ModelConfig
from viewer.labels import costs_of, label
from viewer.page import Json, Names, number, packed, predictions, tensors
from viewer.probe import Measured
from viewer.record import MOST_HEADS, MOST_LAYERS, costs, record, shown_heads
from viewer.scores import NAMES, SCORES
from viewer.weights import Form, pack

MOST_TOKENS = 256
MOST_FRAMES = 5  # checkpoints of a scene that the page cannot compute


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was after a number of steps."""

    step: int
    model: GPT
    measured: Measured


def cuts(config: ModelConfig, n_tokens: int = 0) -> list[str]:
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
    tokens_T = tokens_1T[0].cpu()
    labels = [names(token) for token in tokens_T.tolist()]
    scene = described(checkpoints, notices)
    return scene | {
        "axes": [{"queries": labels, "keys": labels, "causal": True, "scale": scene["scale"]}],
        "ids": tokens_T.tolist(),
        "frames": [frame(checkpoint, tokens_1T, names) for checkpoint in checkpoints],
    }


def living_scene(
    checkpoints: list[Checkpoint],
    ids: list[int],
    text: str,
    names: Names,
    notices: list[str],
    tokenizer: Json,
    form: Form,
) -> Json:
    """Return a scene that the page computes itself, with the model, for a text and any other.

    It begins with the tokens `ids`, which are those of `text`. `tokenizer` is as
    `weights.tokenizer_spec` makes it.
    """
    config = checkpoints[-1].model.config
    model = {
        "config": asdict(config),
        "tokenizer": tokenizer,
        "names": [names(token) for token in range(config.vocab_size)],
        "capacity": min(config.context_length, MOST_TOKENS),
    }
    frames = [
        {
            "step": checkpoint.step,
            "weights": pack(checkpoint.model, form),
            "panels": [panel(*at, checkpoint.measured) for at in shown_heads(config)],
            "copyLoss": number(checkpoint.measured.copy_loss),
        }
        for checkpoint in checkpoints
    ]
    return described(checkpoints, notices) | {
        "ids": ids,
        "text": text,
        "model": model,
        "frames": frames,
    }


def described(checkpoints: list[Checkpoint], notices: list[str]) -> Json:
    """Return what a scene says of the model, whatever the text."""
    config = checkpoints[-1].model.config
    on_probes = checkpoints[-1].measured.uniform
    return {
        "name": "Your model",
        "about": "Each row of a map is a token's query, each column a token's key. Click a cell "
        "for the numbers behind it; arrow keys move to its neighbours. Point at a token: those "
        "that it attends to are filled, those that attend to it are underlined.",
        "rows": [f"layer {n}" for n in range(min(config.n_layer, MOST_LAYERS))],
        "scale": math.sqrt(config.head_dim),
        "uniform": {name: number(on_probes[name]) for name in SCORES},
        "scores": NAMES,
        "notices": notices,
        "turned": config.is_modern,
    }


def panel(layer: int, head: int, measured: Measured) -> Json:
    """Return what is known of a head whatever the text: its label, scores, and what it is worth."""
    key, why = label(layer, head, measured)
    return {
        "row": layer,
        "head": head,
        "name": f"layer {layer}, head {head}",
        "axes": 0,
        "label": key,
        "why": why,
        "scores": {name: number(measured.score(name)[layer, head]) for name in SCORES},
        "worth": [number(cost) for cost in costs_of(layer, head, measured)],
    }


def frame(checkpoint: Checkpoint, tokens_1T: Tensor, names: Names) -> Json:
    """Return one checkpoint's heads and predictions on the text."""
    kept = record(checkpoint.model, tokens_1T)
    of_heads = (kept.q_LBHTD, kept.k_LBHSD, kept.v_LBHSD, kept.weights_LBHTS, kept.y_LBHTD)
    tokens_T = tokens_1T[0].cpu()
    costs_LHN = costs(checkpoint.model, tokens_1T)[:, :, 0]
    truth_T = tokens_T.roll(-1)
    truth_T[-1] = -1  # nobody knows what comes next
    panels: list[Json] = []
    for layer, head in shown_heads(checkpoint.model.config):
        known = panel(layer, head, checkpoint.measured)
        known |= tensors(*(tensor[layer, 0, head] for tensor in of_heads))
        panels.append(known | {"costs": packed(costs_LHN[layer, head])})
    return {
        "step": checkpoint.step,
        "panels": panels,
        "copyLoss": number(checkpoint.measured.copy_loss),
        **predictions(kept.logits_BTV[0], truth_T, names),
    }
