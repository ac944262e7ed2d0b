"""Pages of small models for the tests that open them, and what stands on a page."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from browser import Page
from data.shown import shown
from data.tokenizer import ByteTokenizer, Tokenizer
from model import GPT, ModelConfig
from viewer.page import Json
from viewer.probe import Measured, make_probes, measure
from viewer.record import Record
from viewer.scene import Checkpoint, living_scene, model_scene
from viewer.scores import SCORES
from viewer.weights import Form, tokenizer_spec

LEFT, TOP = 84, 76  # what the names of tokens take beside a map
BYTES = ByteTokenizer()


def built(seed: int, **sizes: Any) -> GPT:
    """Build a model with wild weights, so that no two heads are alike."""
    torch.manual_seed(seed)
    small = {"n_layer": 2, "n_head": 3, "n_embd": 24, "context_length": 128}
    small |= {"architecture": "modern", "vocab_size": BYTES.vocab_size}
    model = GPT(ModelConfig(**{**small, **sizes})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


def judged(models: list[GPT], tokenizer: Tokenizer = BYTES) -> list[Checkpoint]:
    probes = make_probes(models[0], 10, tokenizer.vocab_size)
    return [Checkpoint(100 * n, model, measure(model, probes)) for n, model in enumerate(models)]


def unmeasured(model: GPT) -> list[Checkpoint]:
    """Return a model without scores of its heads, which take long to measure."""
    nothing_LH = torch.full((model.config.n_layer, model.config.n_head), math.nan)
    scores = dict.fromkeys(SCORES, nothing_LH)
    uniform = dict.fromkeys(SCORES, math.nan)
    measured = Measured(scores, scores, uniform, nothing_LH, nothing_LH, math.nan, n_periods=0)
    return [Checkpoint(0, model, measured)]


def name(token: int) -> str:
    return shown(BYTES.token_bytes(token))


def tokens(text: str) -> Tensor:
    return torch.tensor([BYTES.encode(text)])


def fixed_scene(checkpoints: list[Checkpoint], text: str) -> Json:
    """Return the scene of a model that the page cannot run."""
    return model_scene(checkpoints, tokens(text), name, ["a notice"])


def running_scene(
    checkpoints: list[Checkpoint], text: str, tokenizer: Tokenizer = BYTES, form: Form = "f32"
) -> Json:
    """Return the scene of a model that the page runs."""
    spec = tokenizer_spec(tokenizer.state())
    assert spec is not None
    names = namer(tokenizer)
    return living_scene(checkpoints, tokenizer.encode(text), text, names, [], spec, form)


def namer(tokenizer: Tokenizer) -> Callable[[int], str]:
    n = tokenizer.vocab_size
    return lambda id: shown(tokenizer.token_bytes(id)) if id < n else f"⟨token {id}⟩"


def click_cell(tab: Page, i: int, j: int) -> None:
    """Click where the map has query i and key j."""
    cell, across, down = tab.run(
        "(() => { const c = document.querySelector('#maps canvas');"
        " return [c.cell, c.clientWidth, c.clientHeight]; })()"
    )
    x, y = LEFT + (j + 0.5) * cell, TOP + (i + 0.5) * cell
    tab.click("#maps canvas", x / across, y / down)


def number(tab: Page, name: str) -> float:
    """Return a number that stands on the page."""
    return as_number(tab.run(f"document.querySelector('[data-name={name}]').textContent"))


def as_number(text: str) -> float:
    return float(text.replace("−", "-"))


def table(tab: Page, n: int) -> list[list[str]]:
    return tab.run(
        f"[...document.querySelectorAll('#side table')[{n}].querySelectorAll('tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )


def text_of(tab: Page, selector: str) -> str:
    return tab.run(f"document.querySelector({json.dumps(selector)}).textContent")


def check_numbers(tab: Page, kept: Record, head: tuple[int, int], cell: tuple[int, int]) -> None:
    """Compare all numbers of the Numbers tab, of a key that can be seen, with a record."""
    (layer, h), (i, j) = head, cell
    of_heads = (kept.q_LBHTD, kept.k_LBHSD, kept.v_LBHSD, kept.y_LBHTD)
    q_TD, k_TD, v_TD, y_TD = (tensor[layer, 0, h].double() for tensor in of_heads)
    scores_S = k_TD[: i + 1] @ q_TD[i] / math.sqrt(q_TD.shape[1])
    weight = float(kept.weights_LBHTS[layer, 0, h, i, j])
    expected = {
        "product": q_TD[i] @ k_TD[j],
        "score": scores_S[j],
        "exponential": scores_S[j].exp(),
        "denominator": scores_S.exp().sum(),
        "weight": scores_S.softmax(-1)[j],
        "model": weight,
    }
    for key, value in expected.items():
        assert number(tab, key) == pytest.approx(float(value), rel=0.005, abs=1e-4), key
    assert number(tab, "apart") < 1e-5
    assert f" ({i}) attends to " in text_of(tab, "#readout")
    assert text_of(tab, "#readout").endswith(f" ({j}) with weight {weight:.4f}")
    columns = (q_TD[i], k_TD[j], q_TD[i] * k_TD[j])
    check_columns(table(tab, 0)[:-1], columns)
    check_columns(table(tab, 1), (scores_S, scores_S.exp(), scores_S.softmax(-1)))
    check_columns(table(tab, 2), (v_TD[j], weight * v_TD[j], y_TD[i], y_TD[i]))


def check_columns(rows: list[list[str]], columns: tuple[Tensor, ...]) -> None:
    for n, column in enumerate(columns):
        found = [as_number(row[n + 1]) for row in rows]
        assert found == pytest.approx(column.tolist(), rel=0.005, abs=1e-4), n
