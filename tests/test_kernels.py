"""The kernels against the formulas of model.py, and against numerical gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import FastRMSNorm, Normalize, build_model, use_kernels
from model import GPT, ModelConfig

CPU = torch.device("cpu")


def config(n_kv_head: int = 4, **others: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "context_length": 9,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 24,
    }
    kind = {"architecture": "modern", "tie_embeddings": False}
    return ModelConfig(**{**kind, **sizes, "n_kv_head": n_kv_head, **others})


def losses_and_gradients(model: GPT, dtype: torch.dtype | None = None) -> list[Tensor]:
    tokens_BT = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(1))
    logits_BTV = model.lm_head(model.features(tokens_BT, dtype=dtype)).double()
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), *gradients]


def uneven(sizes: ModelConfig) -> GPT:
    """A model in which no norm's weights are all 1, and no projection is 0."""
    torch.manual_seed(0)
    model = GPT(sizes).double()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 10
    return model


@pytest.mark.parametrize(
    "sizes", [config(), config(2), config(1, head_dim=10)], ids=["4 of 4", "2 of 4", "1, wide"]
)
def test_a_model_with_kernels_has_the_loss_and_the_gradients_of_the_formulas(
    sizes: ModelConfig,
) -> None:
    model = uneven(sizes)
    plain = losses_and_gradients(model)
    use_kernels(model)
    assert isinstance(model.ln_f, FastRMSNorm)
    torch.testing.assert_close(losses_and_gradients(model), plain)


def test_in_bfloat16_the_error_of_kernels_is_below_twice_that_of_the_formulas() -> None:
    model = uneven(config(2))
    exact = losses_and_gradients(model)
    plain = losses_and_gradients(model, torch.bfloat16)
    use_kernels(model)
    fast = losses_and_gradients(model, torch.bfloat16)

    def error(found: list[Tensor]) -> float:
        parts = [(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
        return torch.stack(parts).square().mean().sqrt().item()

    assert 1e-3 < error(fast) < 2 * error(plain)


@pytest.mark.parametrize("shape_of_w", [(6,), (4, 6)])
def test_the_gradient_of_a_norm_is_the_numerical_one(shape_of_w: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(shape_of_w, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: Normalize.apply(x, w, 1e-6), (x, w))


def test_only_eager_models_on_a_cpu_need_kernels() -> None:
    kinds = {
        (dtype, compiled): isinstance(build_model(config(), CPU, dtype, compiled).ln_f, FastRMSNorm)
        for dtype in (torch.float32, torch.bfloat16)
        for compiled in (False, True)
    }
    assert all(is_fast != compiled for (_, compiled), is_fast in kinds.items())


def test_gpt2_has_no_norm_or_rotation_that_needs_kernels() -> None:
    sizes = config(architecture="gpt2", tie_embeddings=True)
    model = GPT(sizes)
    kinds = [type(module) for module in model.modules()]
    use_kernels(model)
    assert [type(module) for module in model.modules()] == kinds
