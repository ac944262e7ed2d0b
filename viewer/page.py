"""Put what a model computed into one HTML file, which needs nothing else."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rjsmin
from torch import Tensor

FOLDER = Path(__file__).parent / "page"
SCRIPTS = (
    *("data.js", "weights.js", "tokenizer.js", "gpt.js", "read.js", "draw.js", "numbers.js"),
    *("panels.js", "write.js", "follow.js", "compare.js", "examples.js", "walk.js", "main.js"),
)
N_SHOWN = 10  # of the likeliest tokens

Json = dict[str, Any]
Names = Callable[[int], str]  # token id -> how it is shown


def packed(tensor: Tensor) -> str:
    """Return the numbers as base64 of little-endian float32."""
    return base64.b64encode(tensor.detach().cpu().float().numpy().astype("<f4").tobytes()).decode()


def number(value: float | Tensor) -> float | None:
    """Round to 6 decimals; None stands for nan and infinity, which JSON lacks."""
    return round(float(value), 6) if math.isfinite(value) else None


def tensors(q_TD: Tensor, k_SD: Tensor, v_SD: Tensor, weights_TS: Tensor, y_TD: Tensor) -> Json:
    """Pack the tensors of one head, from which the page computes what is behind each cell."""
    named = {"q": q_TD, "k": k_SD, "v": v_SD, "w": weights_TS, "o": y_TD}
    return {name: packed(tensor) for name, tensor in named.items()}


def predictions(logits_TV: Tensor, truth_T: Tensor, names: Names) -> Json:
    """Return what is likeliest at each position, and how likely the right token is.

    `truth_T` holds the right tokens, -1 where there is none.
    """
    log_p_TV = logits_TV.cpu().double().log_softmax(-1)
    true_T1 = truth_T.cpu().clamp(min=0)[:, None]
    is_known_T = truth_T.cpu() >= 0
    top = log_p_TV.topk(min(N_SHOWN, log_p_TV.shape[-1]))
    true_log_p_T1 = log_p_TV.gather(-1, true_T1)
    ranks_T = (log_p_TV > true_log_p_T1).sum(-1).where(is_known_T, -1)
    return {
        "top": [[names(token) for token in row] for row in top.indices.tolist()],
        "chances": packed(top.values.exp()),
        "truth": [names(token) if token >= 0 else None for token in truth_T.tolist()],
        "ranks": ranks_T.tolist(),
        "losses": packed(-true_log_p_T1[:, 0].where(is_known_T, math.nan)),
    }


def as_json(data: object) -> str:
    """Return JSON for a script element: no text in it can end the element or begin a comment."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def build(scenes: list[Json]) -> str:
    """Return the page as text."""
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    script = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = str(rjsmin.jsmin(script))  # without comments and indentation it is a quarter smaller
    style = re.sub(r"\s*([{};,])\s*", r"\1", style)
    # A browser runs this script and no other, loads nothing, and talks to nobody
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}"
    parts = {"policy": policy, "style": style, "script": script, "data": as_json(scenes)}
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
