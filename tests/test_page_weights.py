"""Weights as visualize.py's page has them, against numpy's own types and a decoder by hand."""

import base64
import json
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from browser import Page
from model import GPT, ModelConfig
from viewer.weights import Form, pack, rounded

pytestmark = pytest.mark.filterwarnings("error")
FORMS = get_args(Form)
MODELS = {
    "gpt2": {"architecture": "gpt2"},
    "modern": {"architecture": "modern", "n_kv_head": 1, "n_inner": 30},
    "untied": {"architecture": "modern", "tie_embeddings": False},
}
SMALLEST = 2.0**-149  # float32


@pytest.fixture(scope="module")
def tab(browser: Page, tmp_path_factory: pytest.TempPathFactory) -> Page:
    browser.open_scripts(tmp_path_factory.mktemp("page"), "data.js", "weights.js")
    return browser


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> GPT:
    """A model that is hard to round: with weights of many sizes, and a row of zeros."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 20, "context_length": 9}
    model = GPT(ModelConfig(**{**sizes, **MODELS[request.param]}))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 10.0 ** -torch.randint_like(parameter, 9)
    model.wte.weight.data[5] = 0
    model.wte.weight.data[6] = SMALLEST * torch.arange(171, 191)  # in steps of 190 / 127 -> 1
    model.wte.weight.data[7] = SMALLEST  # in steps of 0
    return model


def in_page(tab: Page, packed: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the numbers that the page decodes, bit for bit."""
    bits = tab.run(
        f"Object.entries(unpackWeights({json.dumps(packed)})).map(([name, numbers]) =>"
        " [name, Array.from(new Uint32Array(numbers.slice().buffer))])"
    )
    return {name: np.array(numbers, np.uint32).view(np.float32) for name, numbers in bits}


def weights(model: GPT) -> dict[str, np.ndarray]:
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    return {k: tensor.numpy() for k, tensor in model.state_dict().items() if k not in tied}


def by_hand(packed: dict[str, Any]) -> dict[str, np.ndarray]:
    """Decode int8 as the docstring of `pack` says it, number by number."""
    data = base64.b64decode(packed["data"])
    n = sum(shape[0] for _, shape in packed["tensors"])
    floats, cells = iter(np.frombuffer(data[: 4 * n], "<f4")), iter(data[4 * n :])
    decoded = {}
    for name, shape in packed["tensors"]:
        decoded[name] = np.zeros(shape, np.float32)
        for row in range(shape[0]):
            number = next(floats)
            if len(shape) == 1:
                decoded[name][row] = number
            for column in range(shape[1] if len(shape) == 2 else 0):
                decoded[name][row, column] = number * np.float32((next(cells) + 128) % 256 - 128)
    assert next(cells, None) is None
    return decoded


@pytest.mark.parametrize("form", FORMS)
def test_the_page_has_the_weights_of_the_rounded_model_bit_for_bit(
    tab: Page, model: GPT, form: Form
):
    found = in_page(tab, pack(model, form))
    expected = weights(rounded(model, form))
    assert list(found) == list(expected)
    for name, numbers in expected.items():
        assert found[name].tobytes() == numbers.tobytes(), name


@pytest.mark.parametrize("form", FORMS)
def test_all_tensors_are_there_in_order_with_their_shapes_but_a_tied_head(model: GPT, form: Form):
    packed = pack(model, form)
    assert packed["form"] == form
    assert packed["tensors"] == [[k, list(array.shape)] for k, array in weights(model).items()]
    json.dumps(packed)


def test_every_half_precision_number_is_numpys_in_the_page(tab: Page):
    halves = np.arange(2**16, dtype="<u2").view("<f2")
    data = base64.b64encode(halves.tobytes()).decode()
    found = in_page(tab, {"form": "f16", "tensors": [["all", [2**16]]], "data": data})["all"]
    expected = halves.astype(np.float32)
    is_number = ~np.isnan(expected)
    assert np.array_equal(np.isnan(found), ~is_number)
    assert found[is_number].tobytes() == expected[is_number].tobytes()  # -0 is not 0


def test_f32_keeps_every_bit_and_f16_is_numpys_rounding(model: GPT):
    for name, array in weights(model).items():
        assert np.array_equal(weights(rounded(model, "f32"))[name], array)
        halves = array.astype(np.float16).astype(np.float32)
        assert np.array_equal(weights(rounded(model, "f16"))[name], halves)


def test_int8_has_254_steps_for_each_row_of_a_matrix_and_keeps_vectors(model: GPT):
    decoded = by_hand(pack(model, "int8"))
    for name, array in weights(model).items():
        if array.ndim == 1:
            assert np.array_equal(decoded[name], array)
            continue
        largest = np.abs(array).max(axis=1, keepdims=True)
        half_a_step = largest / 254 * (1 + 1e-5) + 63 * SMALLEST  # 190 became 127
        assert (np.abs(decoded[name] - array) <= half_a_step).all()


def test_rounding_leaves_the_model_alone_and_keeps_a_head_tied(model: GPT):
    before = {name: array.copy() for name, array in weights(model).items()}
    copy = rounded(model, "int8")
    assert all(np.array_equal(array, before[name]) for name, array in weights(model).items())
    is_tied = copy.lm_head.weight is copy.wte.weight
    assert is_tied == model.config.tie_embeddings


def test_weights_that_are_no_numbers_stay_none_in_each_form(tab: Page):
    model = GPT(ModelConfig(vocab_size=5, n_layer=1, n_head=1, n_embd=4, context_length=3))
    model.wte.weight.data[1, 2] = math.nan
    model.wte.weight.data[2, 2] = math.inf
    for form in FORMS:
        found = in_page(tab, pack(model, form))["wte.weight"]
        assert not np.isfinite(found[[6, 10]]).any()
        assert np.isfinite(found[[*range(4), *range(12, 20)]]).all()


@torch.no_grad()
def loss(model: GPT, tokens_BT: Tensor) -> float:
    logits_BTV = model(tokens_BT[:, :-1])
    return nn.functional.cross_entropy(logits_BTV.mT, tokens_BT[:, 1:]).item()


@pytest.mark.parametrize(("form", "most"), [("f32", 0), ("f16", 3e-5), ("int8", 1e-3)])
def test_rounding_hardly_changes_the_loss(form: Form, most: float):
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=50, n_layer=2, n_embd=64, context_length=32)).eval()
    for parameter in model.parameters():
        parameter.data *= 2  # or the logits would hardly depend on them
    tokens_BT = torch.randint(50, (8, 33))
    assert abs(loss(rounded(model, form), tokens_BT) - loss(model, tokens_BT)) <= most
