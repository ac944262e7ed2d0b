"""Parameter groups, one update by hand, and the schedule against closed formulas."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from engine.muon import Group, orthogonalize
from engine.optim import (
    RATES,
    AdamW,
    OptimConfig,
    Optimizer,
    build_optimizers,
    clip_gradients,
    schedule,
)
from model import GPT, ModelConfig

MAX_STEPS = 1000
YES = torch.tensor(True)
NO = torch.tensor(False)
both_optimizers = pytest.mark.parametrize("name", ["adamw", "muon"])
both_architectures = pytest.mark.parametrize("architecture", ["gpt2", "modern"])


class OnMac:
    """A bool on a device whose AdamW knows of no infinity; it can be read there, at a price."""

    device = torch.device("mps")

    def __init__(self, value: bool) -> None:
        self.value = value

    def __bool__(self) -> bool:
        return self.value


def small(architecture: Any = "modern", n_kv_head: int = 2, head_dim: int = 4) -> GPT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "context_length": 8,
        "n_layer": 2,
        "n_head": 2,
        "n_kv_head": n_kv_head,
        "n_embd": 8,
        "head_dim": head_dim,
    }
    return GPT(ModelConfig(architecture=architecture, **sizes))


def with_gradients(model: GPT) -> GPT:
    tokens_BT = torch.randint(11, (2, 8))
    logits_BTV = model(tokens_BT)
    F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.roll(-1, 1).flatten()).backward()
    return model


# --- Groups ---------------------------------------------------------------------------------------


def groups_of(optimizers: list[Optimizer]) -> list[Group]:
    return [
        group for o in optimizers for group in (o.groups if isinstance(o, AdamW) else [o.group])
    ]


@both_architectures
@both_optimizers
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
@both_optimizers
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


@pytest.mark.parametrize("yes", [YES, OnMac(True)], ids=["fused", "not fused"])
def test_adamw_updates_are_those_of_torch(yes: Any):
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
        optimizer.step(torch.tensor(fraction), yes)
        for group in reference.param_groups:
            group["lr"] = 0.01 * fraction
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def updated(name: Any) -> tuple[GPT, list[Optimizer]]:
    """A model and its optimizers after two updates, with the gradients for a third."""
    config = OptimConfig(name=name, weight_decay=0.5, muon_weight_decay=0.5).with_rates(1.0)
    model = small()
    optimizers = build_optimizers(model, config)
    for _ in range(2):
        with_gradients(model)
        take_step(optimizers, YES)
        model.zero_grad()
    return with_gradients(model), optimizers


def take_step(optimizers: list[Optimizer], is_finite: Any) -> None:
    for optimizer in optimizers:
        optimizer.step(torch.tensor(1.0), is_finite)


def everything(model: GPT, optimizers: list[Optimizer]) -> dict[str, list[Tensor]]:
    """Each parameter and what its optimizer remembers of it."""
    state = {name: tensors for optimizer in optimizers for name, tensors in optimizer.state.items()}
    return {
        name: [tensor.detach().clone() for tensor in (p, *state[name])]
        for name, p in model.named_parameters()
    }


def changed(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> set[str]:
    """The parameters whose every tensor changed. Fails if one of them changed in part."""
    found = set()
    for name in before:
        pairs = zip(before[name], after[name], strict=True)
        different = {not torch.equal(a, b) for a, b in pairs}
        assert len(different) == 1, name
        found |= {name} if different == {True} else set()
    return found


def spoil(model: GPT, value: float) -> None:
    """Put a number into each gradient."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.view(-1)[-1] = value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "no"),
    [("adamw", NO), ("muon", NO), ("adamw", OnMac(False))],
    ids=["adamw", "muon", "adamw on a Mac"],
)
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_what_is_remembered(
    name: Any, no: Any, bad: float
):
    model, optimizers = updated(name)
    before = everything(model, optimizers)
    spoil(model, bad)
    take_step(optimizers, no)
    assert changed(before, everything(model, optimizers)) == set()
    spoil(model, 0.1)
    take_step(optimizers, YES)
    assert changed(before, everything(model, optimizers)) == before.keys()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_even_the_first_update_takes_a_number_that_is_not_finite(bad: float):
    model = with_gradients(small())
    optimizers = build_optimizers(model, OptimConfig(name="muon").with_rates(1.0))
    before = everything(model, optimizers)
    spoil(model, bad)
    take_step(optimizers, NO)
    assert changed(before, everything(model, optimizers)) == set()


@both_optimizers
def test_a_frozen_parameter_stays_and_the_others_are_updated(name: Any):
    model, optimizers = updated(name)
    frozen = {"blocks.0.attn.c_attn.weight", "ln_f.weight", "wte.weight"}
    for parameter in frozen:
        model.get_parameter(parameter).requires_grad_(False).grad = None
    before = everything(model, optimizers)
    take_step(optimizers, YES)
    assert changed(before, everything(model, optimizers)) == before.keys() - frozen


@pytest.mark.parametrize("most", [0.01, 1.0, 1000.0, math.inf])
def test_gradients_are_clipped_as_torch_does_and_their_norm_is_that_before(most: float):
    ours, theirs = with_gradients(small()), with_gradients(small())
    before = nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None])
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), most)
    assert torch.equal(clip_gradients(ours, most), norm)
    assert torch.equal(norm, before)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_without_a_limit_no_gradient_is_touched(monkeypatch: pytest.MonkeyPatch):
    model = with_gradients(small())
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    spoil(model, math.inf)  # whose share of an infinite norm would be nan
    assert clip_gradients(model, math.inf) == math.inf
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad.view(-1)[:-1], gradient.view(-1)[:-1])


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonalizing_keeps_the_singular_vectors_and_makes_the_values_alike(shape: Any):
    torch.manual_seed(0)
    matrices_KMN = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    for before, after in zip(matrices_KMN, orthogonalize(matrices_KMN), strict=True):
        u, values, vh = torch.linalg.svd(before, full_matrices=False)
        strengths = u.T @ after @ vh.T
        torch.testing.assert_close(strengths, strengths.diagonal().diag(), atol=1e-4, rtol=0)
        kept = values > 0.01 * values.norm()
        assert strengths.diagonal()[kept].min() > 0.15
        assert strengths.diagonal().max() < 1.95


def test_an_orthogonalized_matrix_in_bfloat16_is_nearly_that_in_float32():
    torch.manual_seed(0)
    matrices_KMN = torch.randn(2, 32, 16)
    exact = orthogonalize(matrices_KMN)
    rounded = orthogonalize(matrices_KMN.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0)


@pytest.mark.parametrize(("n_kv_head", "head_dim"), [(1, 4), (2, 4), (1, 6)])
def test_two_muon_updates_are_those_computed_matrix_by_matrix(n_kv_head: int, head_dim: int):
    model, rate, decay, momentum = small(n_kv_head=n_kv_head, head_dim=head_dim), 0.1, 0.5, 0.8
    config = OptimConfig(name="muon", muon_learning_rate=rate, muon_weight_decay=decay)
    _, muon = build_optimizers(model, replace(config, muon_momentum=momentum))
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim > 1}
    expected = {name: p.detach().clone() for name, p in matrices.items()}
    queries, keys = 2 * head_dim, n_kv_head * head_dim
    means = {name: torch.zeros_like(p) for name, p in matrices.items()}
    for step in range(2):
        torch.manual_seed(step)
        model.zero_grad()
        with_gradients(model)
        for name, p in matrices.items():
            assert p.grad is not None
            means[name] = momentum * means[name] + (1 - momentum) * p.grad
            ahead = momentum * means[name] + (1 - momentum) * p.grad  # Nesterov
            rows = (
                [queries, keys, keys] if "c_attn" in name else [len(ahead)]
            )  # Q, K and V by themselves
            scaled = [
                max(1, len(part) / part.shape[1]) ** 0.5 * orthogonalize(part[None])[0]
                for part in ahead.split(rows)
            ]
            expected[name] = expected[name] * (1 - rate * decay) - rate * torch.cat(scaled)
        muon.step(torch.tensor(1.0), YES)
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
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\): got \(0.9, 1.0\)"),
        ({"muon_momentum": 1.0}, r"muon_momentum must be in \[0, 1\): got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused_with_rule_and_value(changes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)


def test_the_numbers_of_updates_lie_where_an_update_reads_them():
    with FakeTensorMode():  # no memory behind it, so that it may be Apple's
        group = Group({"wte": torch.empty(3, 2, device="mps")}, 1e-3, 0.0)
        mean, square, count = AdamW([group], (0.9, 0.95)).state["wte"]
    assert (mean.device.type, square.device.type, count.device.type) == ("mps", "mps", "cpu")
