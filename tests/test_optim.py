"""Parameter groups, one update by hand, and the schedule against closed formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.optim import (
    OptimConfig,
    all_groups,
    build_optimizers,
    check_finite,
    schedule,
    set_learning_rates,
)
from model import GPT, ModelConfig

MAX_STEPS = 1000
both_architectures = pytest.mark.parametrize("architecture", ["gpt2", "modern"])


def small(architecture: Any = "modern") -> GPT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "context_length": 8,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
    }
    return GPT(ModelConfig(architecture=architecture, **sizes))


def names_of(model: GPT, parameters: list[Tensor]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


def with_gradients(model: GPT) -> GPT:
    tokens_BT = torch.randint(11, (2, 8))
    model(tokens_BT, tokens_BT.roll(-1, 1)).backward()
    return model


# --- Groups ---------------------------------------------------------------------------------------


@both_architectures
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(architecture: str, name: Any):
    model = small(architecture)
    groups = all_groups(build_optimizers(model, OptimConfig(name=name)))
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(parameters) == sorted(map(id, model.parameters()))


def test_muon_gets_the_block_matrices_and_adamw_the_rest():
    model = small("gpt2")
    adamw, muon = build_optimizers(model, OptimConfig(name="muon"))
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    by_muon = {f"blocks.{i}.{matrix}.weight" for i in range(2) for matrix in matrices}
    assert names_of(model, all_groups([muon])[0]["params"]) == by_muon
    embeddings, vectors = (names_of(model, group["params"]) for group in adamw.param_groups)
    assert embeddings == {"wte.weight", "wpe.weight"}
    assert len(vectors) == len(list(model.parameters())) - len(by_muon) - 2


@both_architectures
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_vectors_never_decay_and_matrices_do(architecture: str, name: Any):
    config = OptimConfig(name=name, weight_decay=0.3, muon_weight_decay=0.2)
    decays = {
        (parameter.ndim, group["weight_decay"])
        for group in all_groups(build_optimizers(small(architecture), config))
        for parameter in group["params"]
    }
    assert decays == {(1, 0.0), (2, 0.3)} | ({(2, 0.2)} if name == "muon" else set())


# --- Updates --------------------------------------------------------------------------------------


def test_two_adamw_updates_are_those_computed_by_hand():
    model, rate, decay = small("gpt2"), 0.01, 0.5
    config = OptimConfig(learning_rate=rate, weight_decay=decay, betas=(0.8, 0.9))
    (optimizer,) = build_optimizers(model, config)
    parameters = list(model.parameters())
    expected = [parameter.detach().clone() for parameter in parameters]
    means, squares = [torch.zeros(())] * len(parameters), [torch.zeros(())] * len(parameters)
    for step in (1, 2):
        optimizer.zero_grad()
        with_gradients(model)
        for i, parameter in enumerate(parameters):
            assert parameter.grad is not None
            means[i] = 0.8 * means[i] + 0.2 * parameter.grad
            squares[i] = 0.9 * squares[i] + 0.1 * parameter.grad**2
            root = (squares[i] / (1 - 0.9**step)).sqrt()  # corrected for starting at 0
            expected[i] = expected[i] * (1 - rate * decay * (parameter.ndim == 2))
            expected[i] = expected[i] - rate * means[i] / (1 - 0.8**step) / (root + 1e-8)
        optimizer.step()
    for parameter, by_hand in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), by_hand, rtol=1e-5, atol=1e-6)


def test_a_muon_update_moves_a_matrix_along_nearly_orthogonal_directions():
    model = with_gradients(small("gpt2"))
    matrix = dict(model.named_parameters())["blocks.0.attn.c_proj.weight"]
    before = matrix.detach().clone()
    config = OptimConfig(name="muon", muon_learning_rate=0.01, muon_weight_decay=0.5)
    for optimizer in build_optimizers(model, config):
        optimizer.step()
    moved = (matrix.detach() - before * (1 - 0.01 * 0.5)) / -0.01
    assert matrix.grad is not None
    u, _, v = torch.linalg.svd(matrix.grad)
    strengths = torch.diagonal(u.T @ moved @ v.T)
    assert strengths[:6].min() > 0.5  # the last singular values are almost 0, and grow slowly
    assert strengths.max() < 1.4


def test_setting_the_rate_keeps_the_peak_of_each_group():
    optimizers = build_optimizers(
        small(), OptimConfig(name="muon", learning_rate=3e-3, muon_learning_rate=0.04)
    )
    for fraction in (0.5, 0.1, 1.0):
        set_learning_rates(optimizers, fraction)
        rates = [group["lr"] for group in all_groups(optimizers)]
        assert rates == pytest.approx([3e-3 * fraction, 3e-3 * fraction, 0.04 * fraction])


# --- Schedule -------------------------------------------------------------------------------------


def test_the_rate_rises_in_equal_parts_and_never_starts_at_zero():
    config = OptimConfig(warmup_steps=9)
    assert [schedule(step, MAX_STEPS, config) for step in range(9)] == pytest.approx(
        [(step + 1) / 10 for step in range(9)]
    )
    assert schedule(0, MAX_STEPS, OptimConfig(warmup_steps=0)) == 1


@pytest.mark.parametrize("warmup_steps", [0, 1, 100])
def test_cosine_over_the_whole_run_is_nanogpts_schedule(warmup_steps: int):
    config = OptimConfig(warmup_steps=warmup_steps, decay_fraction=1.0, final_fraction=0.1)
    for step in range(MAX_STEPS + 1):
        if step < warmup_steps:
            expected = (step + 1) / (warmup_steps + 1)
        else:
            ratio = (step - warmup_steps) / (MAX_STEPS - warmup_steps)
            expected = 0.1 + 0.5 * (1 + math.cos(math.pi * ratio)) * (1 - 0.1)
        assert schedule(step, MAX_STEPS, config) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_rate_stays_at_the_peak_until_the_fall_begins(decay: Any):
    config = OptimConfig(warmup_steps=50, decay=decay, decay_fraction=0.4)
    assert {schedule(step, MAX_STEPS, config) for step in range(50, 601)} == {1.0}
    assert schedule(610, MAX_STEPS, config) < 1


def test_the_linear_fall_is_a_straight_line():
    config = OptimConfig(warmup_steps=50, decay="linear", decay_fraction=0.4, final_fraction=0.2)
    for step in range(600, 1001):
        expected = 1 - 0.8 * (step - 600) / 400
        assert schedule(step, MAX_STEPS, config) == pytest.approx(expected)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("decay_fraction", [1.0, 0.3])
def test_the_fall_ends_at_the_final_fraction(decay: Any, decay_fraction: float):
    config = OptimConfig(decay=decay, decay_fraction=decay_fraction, final_fraction=0.07)
    assert schedule(MAX_STEPS, MAX_STEPS, config) == pytest.approx(0.07)


def test_without_decay_the_rate_stays_at_the_peak():
    config = OptimConfig(warmup_steps=10, decay_fraction=0.0)
    assert {schedule(step, MAX_STEPS, config) for step in range(10, MAX_STEPS)} == {1.0}


def test_a_run_shorter_than_its_warm_up_only_rises():
    config = OptimConfig(warmup_steps=100)
    rates = [schedule(step, 20, config) for step in range(20)]
    assert rates == [(step + 1) / 101 for step in range(20)]


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "grad_norm"),
    [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (-math.inf, math.nan)],
)
def test_a_number_that_is_not_finite_is_refused_with_its_step(loss: float, grad_norm: float):
    with pytest.raises(ArithmeticError, match=r"step 17 .* not finite .* lower the learning rate"):
        check_finite(17, loss=loss, grad_norm=grad_norm)


def test_finite_numbers_pass():
    check_finite(17, loss=1e30, grad_norm=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive: got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive: got nan"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate must be positive: got -1.0"),
        ({"grad_clip": 0.0}, "grad_clip must be positive: got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0: got -0.1"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0: got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0: got -1"),
        ({"decay_fraction": 1.5}, r"decay_fraction must be in \[0, 1\]: got 1.5"),
        ({"final_fraction": -0.5}, r"final_fraction must be in \[0, 1\]: got -0.5"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\): got \(0.9, 1.0\)"),
    ],
)
def test_settings_out_of_range_are_refused_with_rule_and_value(changes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)
