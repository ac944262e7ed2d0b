"""Parameter groups, one update by hand, and the schedule against closed formulas."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.muon import Group, orthogonalize
from engine.optim import (
    RATES,
    AdamW,
    OptimConfig,
    Optimizer,
    build_optimizers,
    schedule,
)
from model import GPT, ModelConfig

MAX_STEPS = 1000
both_architectures = pytest.mark.parametrize("architecture", ["gpt2", "modern"])


def small(architecture: Any = "modern", n_kv_head: int = 2) -> GPT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "context_length": 8,
        "n_layer": 2,
        "n_head": 2,
        "n_kv_head": n_kv_head,
        "n_embd": 8,
    }
    return GPT(ModelConfig(architecture=architecture, **sizes))


def with_gradients(model: GPT) -> GPT:
    tokens_BT = torch.randint(11, (2, 8))
    model(tokens_BT, tokens_BT.roll(-1, 1)).backward()
    return model


# --- Groups ---------------------------------------------------------------------------------------


def groups_of(optimizers: list[Optimizer]) -> list[Group]:
    return [
        group for o in optimizers for group in (o.groups if isinstance(o, AdamW) else [o.group])
    ]


@both_architectures
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(architecture: str, name: Any):
    model = small(architecture)
    groups = groups_of(build_optimizers(model, OptimConfig(name=name)))
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_muon_gets_the_block_matrices_and_adamw_the_rest():
    optimizers = build_optimizers(small("gpt2"), OptimConfig(name="muon"))
    embeddings, vectors, by_muon = (set(group.parameters) for group in groups_of(optimizers))
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert by_muon == {f"blocks.{i}.{matrix}.weight" for i in range(2) for matrix in matrices}
    assert embeddings == {"wte.weight", "wpe.weight"}
    assert all(name.endswith("bias") or ".ln_" in f".{name}" for name in vectors)


@both_architectures
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_vectors_never_decay_and_matrices_do(architecture: str, name: Any):
    config = OptimConfig(name=name, weight_decay=0.3, muon_weight_decay=0.2)
    decays = {
        (parameter.ndim, group.weight_decay)
        for group in groups_of(build_optimizers(small(architecture), config))
        for parameter in group.parameters.values()
    }
    assert decays == {(1, 0.0), (2, 0.3)} | ({(2, 0.2)} if name == "muon" else set())


def test_each_part_has_its_own_rate_and_one_that_is_0_is_the_recipes():
    config = OptimConfig(name="muon", muon_learning_rate=0.5).with_rates(2.0)
    assert config.with_rates(7.0) == config  # nothing is left to fill in
    model = small()
    model.lm_head.weight = torch.nn.Parameter(model.wte.weight.clone())  # untied
    groups = groups_of(build_optimizers(model, config))
    rates = {name: group.learning_rate for group in groups for name in group.parameters}
    assert rates["blocks.0.mlp.c_fc.weight"] == 0.5
    assert rates["lm_head.weight"] == 2 * RATES["learning_rate"]
    assert rates["wte.weight"] == rates["ln_f.weight"] == 2 * RATES["embedding_learning_rate"]


# --- Updates --------------------------------------------------------------------------------------


def test_adamw_updates_are_those_of_torch():
    ours, theirs = small(), small()  # no biases: the gradient of a key's is 0 but for rounding
    config = OptimConfig(learning_rate=0.01, weight_decay=0.5, betas=(0.8, 0.9))
    (optimizer,) = build_optimizers(ours, config)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-10, foreach=False)
    for step, fraction in enumerate((0.5, 1.0, 0.1)):
        for model in (ours, theirs):
            torch.manual_seed(step)
            model.zero_grad()
            with_gradients(model)
        optimizer.step(fraction)
        for group in reference.param_groups:
            group["lr"] = 0.01 * fraction
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonalizing_keeps_the_singular_vectors_and_makes_the_values_alike(shape: Any):
    torch.manual_seed(0)
    matrices_KMN = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    for before, after in zip(matrices_KMN, orthogonalize(matrices_KMN, torch.float32), strict=True):
        u, values, vh = torch.linalg.svd(before, full_matrices=False)
        strengths = u.T @ after @ vh.T
        torch.testing.assert_close(strengths, strengths.diagonal().diag(), atol=1e-4, rtol=0)
        kept = values > 0.01 * values.norm()
        assert strengths.diagonal()[kept].min() > 0.15
        assert strengths.diagonal().max() < 1.95


def test_an_orthogonalized_matrix_in_bfloat16_is_nearly_that_in_float32():
    torch.manual_seed(0)
    matrices_KMN = torch.randn(2, 32, 16)
    exact = orthogonalize(matrices_KMN, torch.float32)
    rounded = orthogonalize(matrices_KMN, torch.bfloat16)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0)


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_two_muon_updates_are_those_computed_matrix_by_matrix(n_kv_head: int):
    model, rate, decay, momentum = small(n_kv_head=n_kv_head), 0.1, 0.5, 0.8
    config = OptimConfig(name="muon", muon_learning_rate=rate, muon_weight_decay=decay)
    _, muon = build_optimizers(model, replace(config, muon_momentum=momentum))
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim > 1}
    expected = {name: p.detach().clone() for name, p in matrices.items()}
    C, kv = 8, n_kv_head * 4
    means = {name: torch.zeros_like(p) for name, p in matrices.items()}
    for step in range(2):
        torch.manual_seed(step)
        model.zero_grad()
        with_gradients(model)
        for name, p in matrices.items():
            assert p.grad is not None
            means[name] = momentum * means[name] + (1 - momentum) * p.grad
            ahead = momentum * means[name] + (1 - momentum) * p.grad  # Nesterov
            rows = [C, kv, kv] if "c_attn" in name else [len(ahead)]  # Q, K and V by themselves
            scaled = [
                max(1, len(part) / part.shape[1]) ** 0.5
                * orthogonalize(part[None], torch.float32)[0]
                for part in ahead.split(rows)
            ]
            expected[name] = expected[name] * (1 - rate * decay) - rate * torch.cat(scaled)
        muon.step(1.0)
    for name, p in matrices.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-4, atol=1e-5)


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
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be at least 0: got -1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be at least 0: got nan"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate must be at least 0: got -1.0"),
        ({"grad_clip": 0.0}, "grad_clip must be positive: got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0: got -0.1"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0: got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0: got -1"),
        ({"decay_fraction": 1.5}, r"decay_fraction must be in \[0, 1\]: got 1.5"),
        ({"final_fraction": -0.5}, r"final_fraction must be in \[0, 1\]: got -0.5"),
        ({"betas": (0.9, 1.0)}, r"betas .* must be in \[0, 1\): got betas=\(0.9, 1.0\)"),
        ({"muon_momentum": 1.0}, r"muon_momentum must be in \[0, 1\): got .*=1.0"),
    ],
)
def test_settings_out_of_range_are_refused_with_rule_and_value(changes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)
