"""Pages of small models for the tests that open them, and what stands on a page."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from browser import Page
from data.shown import shown
from data.tokenizer import ByteTokenizer, Tokenizer
from model import GPT, ModelConfig
from viewer.page import Json
from viewer.probe import make_probes, measure
from viewer.scene import Checkpoint, living_scene, model_scene
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
    return model


def judged(models: list[GPT], tokenizer: Tokenizer = BYTES) -> list[Checkpoint]:
    probes = make_probes(models[0], 10, tokenizer.vocab_size)
    return [Checkpoint(100 * n, model, measure(model, probes)) for n, model in enumerate(models)]


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
