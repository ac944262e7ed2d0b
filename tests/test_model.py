"""The whole GPT against published counts, transformers' models, gradients and algebra."""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from engine import loss as loss_file
from engine.attend import fused_attention
from engine.count import count_parameters
from engine.loss import LinearCrossEntropy, LossModel, summed_loss
from model import GPT, Attend, Mask, ModelConfig, attention
from sampling.cache import KVCache, cached_attention

SMALL = ModelConfig(vocab_size=31, context_length=12, n_layer=2, n_head=2, n_embd=16)

both_architectures = pytest.mark.parametrize("architecture", ["gpt2", "modern"])
written_and_fused = pytest.mark.parametrize("attend", [attention, fused_attention])
all_attentions = pytest.mark.parametrize("attend", [attention, fused_attention, cached_attention])
all_heads = pytest.mark.parametrize(
    ("architecture", "tie_embeddings"), [("gpt2", True), ("modern", True), ("modern", False)]
)


def small(**changes: Any) -> ModelConfig:
    return replace(SMALL, **changes)


def is_gain(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 1 and name.endswith("weight")


def randomised(config: ModelConfig, attend: Attend = attention) -> GPT:
    """A model in eval mode with no parameter left at 0 or 1, where a misplaced one would hide."""
    torch.manual_seed(0)
    gpt = GPT(config, attend).eval()
    for name, parameter in gpt.named_parameters():
        nn.init.normal_(parameter, mean=float(is_gain(name, parameter)), std=0.3)
    return gpt


def random_tokens(config: ModelConfig, B: int = 2, T: int | None = None) -> Tensor:
    return torch.randint(config.vocab_size, (B, T or config.context_length))


def count(config: ModelConfig) -> dict[str, int]:
    with torch.device("meta"):
        return count_parameters(GPT(config))


# --- Configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_head must divide n_embd: got n_head=3, n_kv_head=0, n_embd=16"),
        ({"n_layer": -1}, "vocab_size and n_layer must be at least 0: got 31, -1"),
        ({"n_head": -1}, "sizes must be at least 0: got n_head=-1, n_kv_head=0, n_embd=16"),
        ({"n_embd": -8}, "sizes must be at least 0: got n_head=2, n_kv_head=0, n_embd=-8"),
        ({"context_length": 0}, "context_length must be at least 1: got 0"),
        ({"vocab_size": -1}, "vocab_size and n_layer must be at least 0: got -1, 2"),
        ({"architecture": "llama"}, "architecture must be gpt2 or modern: got llama"),
        ({"rope_theta": -1.0}, "rope_theta must be positive: got -1.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\): got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\): got -0.1"),
        ({"dropout": math.nan}, r"dropout must be in \[0, 1\): got nan"),
        ({"tie_embeddings": False}, "gpt2's tie_embeddings must be True: got False"),
        (
            {"architecture": "modern", "n_head": 16},
            "modern's n_embd / n_head, or head_dim, must be even: got n_head=16, n_kv_head=0",
        ),
        (
            {"architecture": "modern", "n_kv_head": 3},
            "n_kv_head must divide n_head: got n_head=2, n_kv_head=3, n_embd=16",
        ),
        ({"n_kv_head": 1}, "gpt2's n_kv_head must be n_head: got n_head=2, n_kv_head=1"),
        ({"head_dim": 16}, r"gpt2's n_head \* head_dim must be n_embd: got n_head=2, n_kv_head=0"),
        ({"architecture": "modern", "head_dim": 7}, "must be even: .* n_embd=16, head_dim=7"),
        ({"n_inner": -1}, "sizes must be at least 0: .*, n_inner=-1"),
        ({"n_kv_head": -1}, "sizes must be at least 0: got n_head=2, n_kv_head=-1, n_embd=16"),
    ],
)
def test_an_impossible_config_is_refused_with_the_rule_and_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_model_is_not_built_before_its_vocabulary_is_known():
    with pytest.raises(ValueError, match=r"vocab_size must be known .*: got 0"):
        GPT(small(vocab_size=0))


# --- Counting parameters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "total"),
    [  # Radford et al., 2019, table 2, as released: 124M, 350M, 774M, 1558M
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_each_published_gpt2_has_its_published_number_of_parameters(n_layer, n_head, n_embd, total):
    config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    assert count(config)["total"] == total


def test_the_default_config_is_gpt2_124m():
    assert count(ModelConfig())["total"] == 124_439_808


# Brown et al., 2020, table 2.1
GPT3 = ModelConfig(n_layer=96, n_head=96, n_embd=12288, context_length=2048)


def test_gpt3_has_174_604_259_328_parameters():
    assert count(GPT3)["total"] == 174_604_259_328


def test_gpt3s_attention_holds_a_third_of_it_as_3blue1brown_counts():
    # "Attention in transformers, step-by-step" (2024) counts matrices alone, without biases
    attention = count(replace(GPT3, architecture="modern"))["attention"]
    assert attention == 57_982_058_496
    assert attention / 175e9 == pytest.approx(0.331, abs=5e-4)
    per_layer = attention // 96
    assert per_layer == 603_979_776
    per_head = per_layer // 96
    assert per_head == 6_291_456
    assert per_head // 4 == 1_572_864 == GPT3.n_embd * GPT3.sized().head_dim  # one matrix of four


# C = 16, V = 31, 12 positions, 2 layers, heads of 8; SwiGLU is 64 wide
COUNTS = {
    "gpt2": {
        "embeddings": 31 * 16 + 12 * 16,
        "attention": 2 * (4 * 16 * 16 + 4 * 16),
        "mlp": 2 * (2 * 16 * 64 + 64 + 16),
        "norms": 5 * 2 * 16,
        "head": 0,
    },
    "modern": {
        "embeddings": 31 * 16,
        "attention": 2 * 4 * 16 * 16,
        "mlp": 2 * 3 * 16 * 64,
        "norms": 5 * 16 + 2 * 2 * 8,
        "head": 31 * 16,
    },
}


@all_heads
def test_the_counts_of_the_parts_are_those_by_hand_and_sum_to_the_built_model(
    architecture, tie_embeddings
):
    config = small(architecture=architecture, tie_embeddings=tie_embeddings)
    counts = count(config)
    expected = COUNTS[architecture] | ({"head": 0} if tie_embeddings else {})
    assert counts == expected | {"total": sum(expected.values())}
    assert counts["total"] == sum(parameter.numel() for parameter in GPT(config).parameters())


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_layer", "n_embd"), [(1, 64), (4, 256), (12, 768)])
def test_the_number_of_layers_alone_gives_the_width_and_heads_of_64(n_layer: int, n_embd: int):
    with torch.device("meta"):
        config = GPT(ModelConfig(vocab_size=11, n_layer=n_layer)).config
    assert (config.n_embd, config.n_head, config.head_dim) == (n_embd, n_layer, 64)


def test_sizes_that_are_given_stay():
    sizes: Any = {"n_embd": 32, "n_head": 4, "n_kv_head": 2, "head_dim": 6, "n_inner": 50}
    config = ModelConfig(architecture="modern", vocab_size=11, n_layer=3, **sizes)
    assert config.sized() == config


def test_the_width_of_heads_gives_their_number():
    assert ModelConfig(n_embd=1024, head_dim=128, architecture="modern").sized().n_head == 8


def test_heads_must_also_divide_a_width_that_follows_from_the_layers():
    with pytest.raises(
        ValueError, match="n_head must divide n_embd: got n_head=5, n_kv_head=5, n_embd=192"
    ):
        ModelConfig(vocab_size=11, n_layer=3, n_head=5).sized()


# --- The loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits_at_once", [1, 60, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_and_its_gradients_are_those_of_torchs_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, logits_at_once: int, dtype: torch.dtype
):
    monkeypatch.setattr(loss_file, "LOGITS_ON_CPU", logits_at_once)
    torch.manual_seed(0)
    x_NC, head_VC = torch.randn(37, 8, dtype=dtype), torch.randn(11, 8)
    targets_N = torch.randint(11, (37,))
    targets_N[5:9] = -100
    inputs = (x_NC.requires_grad_(), head_VC.requires_grad_())
    ours = LinearCrossEntropy.apply(*inputs, targets_N)
    theirs = F.cross_entropy((x_NC @ head_VC.to(dtype).T).float(), targets_N)
    torch.testing.assert_close(ours, theirs)
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (0.02, 2e-3)
    gradients = (torch.autograd.grad(3 * loss, inputs) for loss in (ours, theirs))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("logits_at_once", [1, 60, 10_000])
@torch.no_grad()
def test_the_sum_of_the_loss_in_chunks_is_that_of_torchs_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, logits_at_once: int
):
    monkeypatch.setattr(loss_file, "LOGITS_ON_CPU", logits_at_once)
    gpt = randomised(SMALL)
    x_NC, targets_N = torch.randn(37, SMALL.n_embd), torch.randint(SMALL.vocab_size, (37,))
    targets_N[5:9] = -100
    expected = F.cross_entropy(gpt.lm_head(x_NC), targets_N, reduction="sum")
    torch.testing.assert_close(summed_loss(gpt, x_NC, targets_N), expected)


class LogitsNoted(TorchDispatchMode):
    """Notes the size of every tensor that is as wide as the vocabulary, but for the head itself."""

    def __init__(self, head_VC: Tensor) -> None:
        super().__init__()
        self.head = head_VC.data_ptr()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_wide = isinstance(result, Tensor) and result.shape[-1:] == (SMALL.vocab_size,)
        if is_wide and result.data_ptr() != self.head:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("has_gradient", [True, False])
def test_the_loss_holds_no_more_logits_at_once_than_it_promises(
    monkeypatch: pytest.MonkeyPatch, has_gradient: bool
):
    monkeypatch.setattr(loss_file, "LOGITS_ON_CPU", 150)
    gpt, tokens_BT = randomised(SMALL), random_tokens(SMALL)
    for least, n_chunks in ((1, 8), (8, 4)):  # at most 4 or 8 of the 24 positions at once
        monkeypatch.setattr(loss_file, "LEAST_ROWS", least)
        with torch.set_grad_enabled(has_gradient), LogitsNoted(gpt.lm_head.weight) as noted:
            LossModel(gpt, torch.float32)(tokens_BT, tokens_BT)
        assert set(noted.sizes) == {24 // n_chunks * SMALL.vocab_size}
        assert len(noted.sizes) >= n_chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_with_a_gradient_is_the_one_without(dtype: torch.dtype):
    gpt = randomised(SMALL)
    tokens_BT, targets_BT = random_tokens(SMALL), random_tokens(SMALL)
    loss = LossModel(gpt, dtype)(tokens_BT, targets_BT)
    with torch.no_grad():
        torch.testing.assert_close(LossModel(gpt, dtype)(tokens_BT, targets_BT), loss.detach())


@all_heads
def test_a_loss_without_a_gradient_multiplies_matrices_as_often_as_the_forward_pass(
    architecture, tie_embeddings
):
    """A training step multiplies three times as often: forward, and two gradients of each."""
    config = small(architecture=architecture, tie_embeddings=tie_embeddings)
    gpt, tokens_BT = randomised(config), random_tokens(config)
    n_matrices = sum(
        matrix.numel()
        for name, matrix in gpt.named_parameters()
        if name.endswith("weight") and name.startswith("blocks.") and matrix.ndim == 2
    )
    B, T = tokens_BT.shape
    C, V = config.n_embd, config.vocab_size
    of_layers = 2 * B * T * n_matrices + config.n_layer * 2 * (2 * B * T * T * C)  # QKᵀ and AV
    forward = of_layers + 2 * B * T * C * V
    loss_model = LossModel(gpt, torch.float32)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        loss_model(tokens_BT, tokens_BT)
    assert counted.get_total_flops() == forward
    with FlopCounterMode(display=False) as counted:
        loss_model(tokens_BT, tokens_BT).backward()
    assert counted.get_total_flops() == 3 * forward


# --- Initialisation -------------------------------------------------------------------------------


@all_heads
@pytest.mark.parametrize(("vocab_size", "n_embd"), [(65, 384), (4096, 64)])
def test_the_loss_at_initialisation_is_that_of_the_uniform_guess(
    architecture, tie_embeddings, vocab_size, n_embd
):
    torch.manual_seed(0)
    config = small(
        architecture=architecture,
        tie_embeddings=tie_embeddings,
        vocab_size=vocab_size,
        context_length=64,
        n_layer=4,
        n_embd=n_embd,
    )
    loss_model = LossModel(GPT(config), torch.float32)
    with torch.no_grad():
        loss = loss_model(random_tokens(config, 8), random_tokens(config, 8))
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.03)


def matrices_of(gpt: GPT, ending: str) -> list[Tensor]:
    return [p for name, p in gpt.named_parameters() if name.endswith(ending) and p.ndim == 2]


# 8 layers of width 128. GPT-2's residual layers are scaled by 1/√N, N = 2 n_layer (Radford et al.,
# 2019, sec. 2.3), and modern's block matrices by the root of their fan-in (LeCun et al., 1998)
GPT2_STD = {"wte": 0.02, "wpe": 0.02, "c_attn": 0.02, "c_fc": 0.02, "c_proj": 0.02 / math.sqrt(16)}
TIED_STD = {"wte": 0.02, "c_proj": 0.02 / math.sqrt(16)}
TIED_STD |= dict.fromkeys(("c_attn", "c_gate", "c_fc"), 1 / math.sqrt(128))
UNTIED_STD = TIED_STD | {"wte": 0.3, "c_proj": 0.0, "lm_head": 0.02}


@pytest.mark.parametrize(
    ("architecture", "std"), [("gpt2", GPT2_STD), ("modern", TIED_STD), ("modern", UNTIED_STD)]
)
def test_the_matrices_of_each_part_start_with_their_published_spread(architecture, std):
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "context_length": 100, "n_layer": 8, "n_embd": 128}
    gpt = GPT(small(architecture=architecture, tie_embeddings="lm_head" not in std, **sizes))
    parts = {name.split(".")[-2] for name, p in gpt.named_parameters() if p.ndim == 2}
    assert parts == std.keys()
    for part, expected in std.items():
        for matrix in matrices_of(gpt, f"{part}.weight"):
            assert matrix.mean().item() == pytest.approx(0, abs=0.03 * expected)
            assert matrix.std().item() == pytest.approx(expected, rel=0.03)


@both_architectures
def test_gains_start_at_1_and_biases_at_0(architecture):
    for name, parameter in GPT(small(architecture=architecture)).named_parameters():
        if parameter.ndim == 1:
            assert (parameter == float(is_gain(name, parameter))).all(), name


def test_each_untied_modern_block_starts_as_the_identity():
    gpt = GPT(small(architecture="modern", tie_embeddings=False))
    tokens_BT = random_tokens(gpt.config)
    torch.testing.assert_close(gpt(tokens_BT), gpt.lm_head(gpt.ln_f(gpt.wte(tokens_BT))))


# --- Causality ------------------------------------------------------------------------------------


def gradients_at_embeddings(gpt: GPT, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """(B, T, C): what the loss would gain from each token's embedding."""
    embeddings: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, x: Tensor) -> None:
        embeddings.append(x)

    hook = gpt.wte.register_forward_hook(keep)
    loss = LossModel(gpt, torch.float32)(tokens_BT, targets_BT)
    hook.remove()
    return torch.autograd.grad(loss, embeddings[0])[0]


@both_architectures
@written_and_fused
@pytest.mark.parametrize("position", [0, 5, 11])
def test_a_token_gets_no_gradient_from_the_loss_of_the_past(architecture, attend, position):
    gpt = randomised(small(architecture=architecture), attend)
    tokens_BT = random_tokens(gpt.config)
    targets_BT = torch.full_like(tokens_BT, -100)
    targets_BT[0, position] = 7  # the loss of one position of the first sequence
    g_BTC = gradients_at_embeddings(gpt, tokens_BT, targets_BT)
    assert (g_BTC[0, : position + 1] != 0).any(dim=-1).all()
    assert (g_BTC[0, position + 1 :] == 0).all()
    assert (g_BTC[1] == 0).all()


# --- Two attentions, one model --------------------------------------------------------------------


@both_architectures
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_a_model_with_fused_attention_equals_one_with_the_written_one(
    architecture, dtype, tolerance
):
    results = []
    for attend in (attention, fused_attention):
        gpt = randomised(small(architecture=architecture), attend).to(dtype)
        logits_BTV = gpt(random_tokens(gpt.config))
        loss = logits_BTV.log_softmax(-1)[..., 0].mean()
        results.append((logits_BTV, *torch.autograd.grad(loss, list(gpt.parameters()))))
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


@both_architectures
def test_a_model_attends_by_the_function_that_it_is_given_once_in_each_layer(architecture):
    calls: list[str] = []

    def counted(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, dropout: float) -> Any:
        calls.append("called")
        return attention(q_BHTD, k_BKSD, v_BKSD, mask, dropout)

    gpt = randomised(small(architecture=architecture), counted)
    gpt(random_tokens(gpt.config))
    assert len(calls) == gpt.config.n_layer


# --- The cache ------------------------------------------------------------------------------------


def new_cache(gpt: GPT, batch_size: int, **settings: Any) -> KVCache:
    return KVCache(gpt.config, batch_size, gpt.wte.weight, **settings)


def memory_of(cache: KVCache) -> list[int]:
    return [tensor.data_ptr() for tensor in (cache.k_LBKSD, cache.v_LBKSD)]


@both_architectures
@all_attentions
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (5, 1, 4, 2)], ids=str)
@torch.no_grad()
def test_logits_with_a_cache_equal_logits_without_at_every_position(
    architecture, attend, static, chunks
):
    gpt = randomised(small(architecture=architecture), attend).double()
    tokens_BT = random_tokens(gpt.config, B=3)
    cache = new_cache(gpt, 3, static=static)
    memory = memory_of(cache)
    logits_BTV = torch.cat([gpt(part_BT, cache=cache) for part_BT in tokens_BT.split(chunks, 1)], 1)
    torch.testing.assert_close(logits_BTV, gpt(tokens_BT), rtol=0, atol=1e-10)
    assert cache.length == int(cache.end) == 12
    assert memory_of(cache) == memory  # allocated once


@both_architectures
@all_attentions
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_rows_that_begin_late_have_the_logits_that_they_have_alone(architecture, attend, static):
    gpt = randomised(small(architecture=architecture), attend).double()
    tokens_BT, starts = random_tokens(gpt.config, B=3), [4, 0, 7]
    cache = new_cache(gpt, 3, starts_B=torch.tensor(starts), static=static)
    parts = tokens_BT.split((9, 1, 1, 1), 1)
    logits_BTV = torch.cat([gpt(part_BT, cache=cache) for part_BT in parts], 1)
    for row, start in enumerate(starts):
        alone_1TV = gpt(tokens_BT[row : row + 1, start:])
        torch.testing.assert_close(logits_BTV[row, start:], alone_1TV[0], rtol=0, atol=1e-10)


@all_attentions
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("late", "n_kv_head"), [(False, 1), (True, 2)])
@torch.no_grad()
def test_beyond_the_context_each_layer_of_a_token_sees_the_latest_positions(
    monkeypatch, attend, static, late, n_kv_head
):
    config = small(architecture="modern", n_kv_head=n_kv_head)
    gpt, size, T = randomised(config, attend).double(), config.context_length, 30
    starts = [3, 0] if late else [0, 0]
    tokens_BT = random_tokens(config, T=T)
    starts_B = torch.tensor(starts) if late else None
    cache = new_cache(gpt, 2, starts_B=starts_B, static=static)
    parts = [tokens_BT[:, :5], *tokens_BT[:, 5:].split(1, 1)]
    logits_BTV = torch.cat([gpt(part_BT, cache=cache) for part_BT in parts], 1)
    # all at once, by a mask with a band of the context's width
    whole = randomised(replace(config, context_length=T)).double()
    monkeypatch.setattr(model_file, "causal_mask", partial(banded_mask, size))
    for row, start in enumerate(starts):
        whole_1TV = whole(tokens_BT[row : row + 1, start:])
        torch.testing.assert_close(logits_BTV[row, start:], whole_1TV[0], rtol=0, atol=1e-10)


def banded_mask(width: int, T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, T): -∞ but for the latest `width` positions of each."""
    may_see_TT = torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - width)
    return torch.zeros(T, T, dtype=dtype, device=device).masked_fill(~may_see_TT, -math.inf)


@all_attentions
@torch.no_grad()
def test_grouped_queries_equal_full_attention_with_repeated_keys_and_values(attend):
    config = small(architecture="modern", n_head=4, n_kv_head=2)
    grouped, full = randomised(config, attend), randomised(replace(config, n_kv_head=4), attend)
    full.load_state_dict(grouped.state_dict() | repeated_keys_and_values(grouped))
    tokens_BT = random_tokens(config)
    torch.testing.assert_close(grouped(tokens_BT), full(tokens_BT))
    caches = [new_cache(gpt, 2) for gpt in (grouped, full)]
    assert caches[0].k_LBKSD.numel() * 2 == caches[1].k_LBKSD.numel()
    for part_BT in tokens_BT.split((6, 1, 5), 1):
        logits = [
            gpt(part_BT, cache=cache) for gpt, cache in zip((grouped, full), caches, strict=True)
        ]
        torch.testing.assert_close(*logits)


def repeated_keys_and_values(gpt: GPT) -> dict[str, Tensor]:
    """c_attn of each block with the rows of each key and value head as often as it is shared."""
    C, kv = gpt.config.n_embd, gpt.config.n_kv_head * gpt.config.head_dim
    state: dict[str, Tensor] = {}
    for name, matrix in gpt.state_dict().items():
        if name.endswith("c_attn.weight"):
            q, *shared = matrix.split((C, kv, kv))
            heads = [m.unflatten(0, (-1, gpt.config.head_dim)) for m in shared]
            group = gpt.config.n_head // gpt.config.n_kv_head
            state[name] = torch.cat(
                [q, *(h.repeat_interleave(group, 0).flatten(0, 1) for h in heads)]
            )
    return state


@both_architectures
@torch.no_grad()
def test_a_sequence_beyond_the_context_is_refused_with_both_lengths(architecture):
    gpt = randomised(small(architecture=architecture))
    cache = new_cache(gpt, 2)
    gpt(random_tokens(gpt.config, T=10), cache=cache)
    message = "13 tokens are more than context_length=12"
    with pytest.raises(ValueError, match=message):
        gpt(random_tokens(gpt.config, T=13))
    with pytest.raises(ValueError, match=message):
        gpt(random_tokens(gpt.config, T=3), cache=cache)
    assert cache.length == int(cache.end) == 10  # the refused tokens left no trace
    gpt(random_tokens(gpt.config, T=2), cache=cache)
    if architecture == "gpt2":  # learned positions end with the context, rotary ones slide
        with pytest.raises(ValueError, match=message):
            gpt(random_tokens(gpt.config, T=1), cache=cache)


# --- Against transformers -------------------------------------------------------------------------


def gpt2_state(gpt: GPT) -> dict[str, Tensor]:
    """Our state under the names of GPT2LMHeadModel, whose Conv1D holds its matrix transposed."""
    state = {}
    for name, tensor in gpt.state_dict().items():
        is_linear = tensor.ndim == 2 and name.startswith("blocks.")
        renamed = name if name.startswith("lm_head") else "transformer." + name
        state[renamed.replace("blocks.", "h.")] = tensor.T if is_linear else tensor
    return state


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_gpt2_gives_the_logits_of_transformers_gpt2(training):
    """In training too: dropout draws the same masks in the same places from the same seed."""
    transformers = pytest.importorskip("transformers")
    config = small(n_layer=3, n_embd=32, n_head=4, vocab_size=61, dropout=0.3)
    gpt = randomised(config).train(training)
    peer_config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=12,
        n_embd=32,
        n_layer=3,
        n_head=4,
        embd_pdrop=0.3,
        attn_pdrop=0.3,
        resid_pdrop=0.3,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    peer = transformers.GPT2LMHeadModel(peer_config).train(training)
    peer.load_state_dict(gpt2_state(gpt))
    tokens_BT = random_tokens(config, B=3)
    torch.manual_seed(1)
    logits_BTV = gpt(tokens_BT)
    torch.manual_seed(1)
    torch.testing.assert_close(logits_BTV, peer(tokens_BT).logits, rtol=1e-4, atol=1e-4)


QWEN3_NAMES = {
    "ln_1": "input_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def qwen3_state(gpt: GPT) -> dict[str, Tensor]:
    """Our state under the names of Qwen3ForCausalLM, which keeps q, k and v apart."""
    state = {
        "model.embed_tokens.weight": gpt.wte.weight,
        "model.norm.weight": gpt.ln_f.weight,
        "lm_head.weight": gpt.lm_head.weight,
    }
    for layer, block in enumerate(gpt.blocks):
        prefix, ours = f"model.layers.{layer}.", block.state_dict()
        heads = (gpt.config.n_head, gpt.config.n_kv_head, gpt.config.n_kv_head)
        rows = [n * gpt.config.head_dim for n in heads]
        for part, matrix in zip("qkv", ours["attn.c_attn.weight"].split(rows), strict=True):
            state[f"{prefix}self_attn.{part}_proj.weight"] = matrix
        for name, theirs in QWEN3_NAMES.items():
            state[f"{prefix}{theirs}.weight"] = ours[f"{name}.weight"]
    return state


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rope_theta", [10_000.0, 100.0])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("widths", [{}, {"head_dim": 16, "n_inner": 40}], ids=["ours", "others"])
@torch.no_grad()
def test_modern_gives_the_logits_of_transformers_qwen3(
    tie_embeddings, rope_theta, n_kv_head, widths
):
    transformers = pytest.importorskip("transformers")
    config = small(architecture="modern", n_layer=3, n_embd=32, n_head=4, vocab_size=61, **widths)
    changes = {"tie_embeddings": tie_embeddings, "rope_theta": rope_theta}
    gpt = randomised(replace(config, n_kv_head=n_kv_head, **changes))
    peer = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=gpt.config.n_inner,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=n_kv_head,
            head_dim=gpt.config.head_dim,
            max_position_embeddings=12,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            tie_word_embeddings=tie_embeddings,
        )
    ).eval()
    peer.load_state_dict(qwen3_state(gpt))
    tokens_BT = random_tokens(gpt.config, B=3)
    torch.testing.assert_close(gpt(tokens_BT), peer(tokens_BT).logits, rtol=1e-4, atol=1e-4)


# --- Training -------------------------------------------------------------------------------------


@both_architectures
@written_and_fused
@torch.no_grad()
def test_dropout_acts_in_training_alone(architecture, attend):
    config = small(architecture=architecture)
    plain, dropping = randomised(config, attend), randomised(replace(config, dropout=0.3), attend)
    tokens_BT = random_tokens(config)
    assert torch.equal(dropping(tokens_BT), plain(tokens_BT))
    dropping.train()
    assert not torch.equal(dropping(tokens_BT), dropping(tokens_BT))


@written_and_fused
@torch.no_grad()
def test_dropout_of_gpt2_also_acts_on_the_attention_weights(attend):
    gpt = randomised(small(dropout=0.3), attend)
    tokens_BT = random_tokens(gpt.config)
    gpt.train()
    for module in gpt.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not torch.equal(gpt(tokens_BT), gpt(tokens_BT))


@torch.no_grad()
def test_dropout_of_modern_drops_whole_values_and_neither_weights_nor_what_blocks_return():
    dropped: list[Tensor] = []

    def recorded(q_BHTD: Tensor, _k: Tensor, v_BKSD: Tensor, _mask: Mask, dropout: float) -> Any:
        assert dropout == 0
        dropped.append(v_BKSD)
        return q_BHTD, None

    gpt = randomised(small(architecture="modern", n_head=4, dropout=0.25), recorded)
    gpt.drop.p = 0.0
    tokens_BT = random_tokens(gpt.config, B=50)
    expected_BTV = gpt(tokens_BT)
    torch.testing.assert_close(gpt.train()(tokens_BT), expected_BTV)
    plain_BKSD, dropped_BKSD = dropped[0], dropped[gpt.config.n_layer]
    is_dropped_BKS = (dropped_BKSD == 0).all(dim=-1)
    assert is_dropped_BKS.float().mean() == pytest.approx(0.25, abs=0.04)
    kept = ~is_dropped_BKS
    torch.testing.assert_close(dropped_BKSD[kept], plain_BKSD[kept] / 0.75)


@torch.no_grad()
def test_dropout_of_modern_drops_whole_tokens_at_the_embedding():
    gpt = randomised(small(architecture="modern", dropout=0.25)).train()
    tokens_BT = torch.zeros(50, 12, dtype=torch.long)
    embedded: list[Any] = []
    gpt.drop.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    gpt(tokens_BT)
    dropped_BT = (embedded[0] == 0).all(dim=-1)
    assert dropped_BT.float().mean() == pytest.approx(0.25, abs=0.06)
    kept = embedded[0][~dropped_BT]
    torch.testing.assert_close(kept, (gpt.wte.weight[0] / 0.75).expand_as(kept))


@both_architectures
@pytest.mark.parametrize("has_gradient", [True, False])
def test_the_loss_is_the_mean_over_the_targets_that_are_not_minus_100(architecture, has_gradient):
    gpt = randomised(small(architecture=architecture))
    loss_model = LossModel(gpt, torch.float32)
    tokens_BT, targets_BT = random_tokens(gpt.config), random_tokens(gpt.config)
    counts_BT = torch.rand(targets_BT.shape) < 0.5
    probabilities_BTV = gpt(tokens_BT).softmax(-1)
    nats_BT = -probabilities_BTV.gather(-1, targets_BT[..., None])[..., 0].log()
    with torch.set_grad_enabled(has_gradient):
        torch.testing.assert_close(loss_model(tokens_BT, targets_BT), nats_BT.mean())
        loss = loss_model(tokens_BT, targets_BT.masked_fill(~counts_BT, -100))
        torch.testing.assert_close(loss, nats_BT[counts_BT].mean())


@pytest.fixture
def every_warning_is_an_error() -> Iterator[None]:
    torch.set_warn_always(True)  # else torch gives some warnings once per process
    yield
    torch.set_warn_always(False)


@both_architectures
@written_and_fused
@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("every_warning_is_an_error")
def test_bfloat16_products_train_without_a_warning_and_near_float32(architecture, attend):
    torch.manual_seed(0)
    gpt = GPT(small(architecture=architecture, n_embd=64), attend)
    for matrix in matrices_of(gpt, "c_proj.weight"):  # modern's are zero at first
        nn.init.normal_(matrix, std=0.1)
    tokens_BT, targets_BT = random_tokens(gpt.config), random_tokens(gpt.config)
    losses, features = [], []
    for dtype in (torch.float32, torch.bfloat16):
        losses.append(LossModel(gpt, dtype)(tokens_BT, targets_BT))
        features.append(gpt.features(tokens_BT, dtype=dtype))
        assert features[-1].dtype == dtype
    gradients = [torch.autograd.grad(loss, list(gpt.parameters())) for loss in losses]
    assert losses[1].dtype == torch.float32
    assert 0 < (losses[1] - losses[0]).abs() < 0.01 * losses[0]
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1])  # as the weights
    for exact, rounded in [tuple(features), *zip(*gradients, strict=True)]:
        assert (rounded.float() - exact).norm() < 0.1 * exact.norm()


@both_architectures
@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("every_warning_is_an_error")
@torch.no_grad()
def test_a_bfloat16_model_with_a_cache_is_near_float32_without_a_warning(architecture):
    gpt = randomised(small(architecture=architecture, n_embd=64), cached_attention)
    tokens_BT = random_tokens(gpt.config)
    exact_BTV = gpt(tokens_BT)
    gpt.bfloat16()
    cache = new_cache(gpt, 2)
    assert cache.k_LBKSD.dtype == torch.float32  # which a CPU reads faster
    logits_BTV = torch.cat([gpt(part_BT, cache) for part_BT in tokens_BT.split((9, 1, 2), 1)], 1)
    assert logits_BTV.dtype == torch.bfloat16
    assert (logits_BTV.float() - exact_BTV).norm() < 0.1 * exact_BTV.norm()


# --- The file -------------------------------------------------------------------------------------

ALONE = """
import sys, torch
before = set(sys.modules)
from model import GPT, ModelConfig
new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
assert new <= {"model", "torch"}, new
gpt = GPT(ModelConfig(vocab_size=5, context_length=4, n_layer=1, n_head=1, n_embd=4))
gpt(torch.tensor([[0, 1, 2, 3]])).sum().backward()
assert not {"data", "engine", "train", "sample"} & set(sys.modules)
"""


def test_model_py_runs_alone_with_nothing_but_torch(tmp_path):
    source = Path(model_file.__file__).read_text(encoding="utf-8")
    (tmp_path / "model.py").write_text(source, encoding="utf-8")
    (tmp_path / "alone.py").write_text(ALONE, encoding="utf-8")
    command = [sys.executable, "-W", "error", "alone.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
