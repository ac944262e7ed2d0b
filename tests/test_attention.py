"""Attention and rotary positions against a plain loop, published walk-throughs and algebra."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.attend import choose_attention, fused_attention
from model import GPT, Attend, Mask, ModelConfig, attention, causal_mask, rope_of, rotate
from sampling.cache import cached_attention

CPU = torch.device("cpu")
B, H, D = 2, 4, 6

written_and_fused = pytest.mark.parametrize("attend", [attention, fused_attention])


class Case(NamedTuple):
    """T queries, which are the last of S positions, ask the keys of K heads."""

    T: int
    S: int
    is_causal: bool = False
    padding: tuple[int, ...] | None = None
    """Shape of a mask that hides half of the keys at random, but never the first."""
    K: int = H


CASES = {
    "causal": Case(5, 5, is_causal=True),
    "causal, the last 3 of 7": Case(3, 7, is_causal=True),
    "causal, the last of 7": Case(1, 7, is_causal=True),
    "causal, one position": Case(1, 1, is_causal=True),
    "causal and masked": Case(5, 5, True, (B, 1, 5, 5)),
    "causal, the last 3 of 7, padded": Case(3, 7, True, (B, 1, 1, 7)),
    "causal, the last of 7, masked": Case(1, 7, True, (B, H, 1, 7)),
    "causal, grouped": Case(5, 5, is_causal=True, K=2),
    "causal, one head of keys": Case(5, 5, is_causal=True, K=1),
    "causal, the last 3 of 7, padded, grouped": Case(3, 7, True, (B, 1, 1, 7), K=2),
    "masked": Case(4, 6, padding=(4, 6)),
    "cross": Case(4, 6),
    "cross, more queries than keys": Case(6, 4),
    "cross, padded": Case(4, 6, padding=(B, 1, 1, 6)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Inputs(NamedTuple):
    q_BHTD: Tensor
    k_BKSD: Tensor
    v_BKSD: Tensor
    mask: Mask


def random_inputs(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    T, S, K = case.T, case.S, case.K
    torch.manual_seed(T * S)
    q_BHTD = torch.randn(B, H, T, D, dtype=dtype)
    k_BKSD, v_BKSD = torch.randn(2, B, K, S, D, dtype=dtype)
    mask = None
    if case.is_causal:  # the last T rows of the mask of all S positions
        mask = causal_mask(S, dtype, CPU)[-T:]
    if case.padding is not None:
        is_hidden = torch.rand(case.padding) < 0.5
        is_hidden[..., 0] = False
        padding = torch.zeros(case.padding, dtype=dtype).masked_fill(is_hidden, -math.inf)
        mask = padding if mask is None else mask + padding
    return Inputs(q_BHTD, k_BKSD, v_BKSD, mask)


def may_look(case: Case, mask: Mask) -> np.ndarray:
    """(B, H, T, S): whether query t may look at key s, the causal part of it by hand."""
    allowed_BHTS = np.ones((B, H, case.T, case.S), dtype=bool)
    if case.padding is not None:
        assert mask is not None
        allowed_BHTS &= mask.isfinite().numpy()
    for t, s in np.ndindex(case.T, case.S):
        if case.is_causal and s > case.S - case.T + t:
            allowed_BHTS[:, :, t, s] = False
    return allowed_BHTS


def attention_by_loop(inputs: Inputs, allowed_BHTS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q_BHTD, k_BKSD, v_BKSD = (tensor.numpy() for tensor in inputs[:3])
    y_BHTD, weights_BHTS = np.zeros_like(q_BHTD), np.zeros(allowed_BHTS.shape)
    for b, h, t in np.ndindex(q_BHTD.shape[:3]):
        shared = h // (H // k_BKSD.shape[1])  # neighbouring queries share a head of keys
        visible = np.flatnonzero(allowed_BHTS[b, h, t])
        odds = [math.exp(q_BHTD[b, h, t] @ k_BKSD[b, shared, s] / math.sqrt(D)) for s in visible]
        for s, odd in zip(visible, odds, strict=True):
            weights_BHTS[b, h, t, s] = odd / sum(odds)
            y_BHTD[b, h, t] += odd / sum(odds) * v_BKSD[b, shared, s]
    return y_BHTD, weights_BHTS


@cases
def test_attention_is_what_a_plain_loop_computes(case: Case):
    inputs = random_inputs(case)
    expected = attention_by_loop(inputs, may_look(case, inputs.mask))
    y_BHTD, weights_BHTS = attention(*inputs)
    np.testing.assert_allclose(y_BHTD, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(weights_BHTS, expected[1], rtol=0, atol=1e-12)


@cases
def test_the_weights_of_a_query_sum_to_1_and_those_of_hidden_keys_are_exactly_0(case: Case):
    q_BHTD, k_BKSD, v_BKSD, mask = random_inputs(case)
    _, weights_BHTS = attention(100 * q_BHTD, k_BKSD, v_BKSD, mask)
    torch.testing.assert_close(weights_BHTS.sum(-1), torch.ones(B, H, case.T).double())
    assert (weights_BHTS.numpy()[~may_look(case, mask)] == 0).all()


@cases
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_fused_attention_equals_attention_forward_and_backward(
    case: Case, dtype: torch.dtype, tolerance: float
):
    q_BHTD, k_BKSD, v_BKSD, mask = random_inputs(case, dtype)
    qkv = (q_BHTD.requires_grad_(), k_BKSD.requires_grad_(), v_BKSD.requires_grad_())
    g_BHTD = torch.randn(B, H, case.T, D, dtype=dtype)
    results = []
    for attend in (attention, fused_attention):
        y_BHTD, _ = attend(*qkv, mask=mask)
        results.append((y_BHTD, *torch.autograd.grad(y_BHTD, qkv, g_BHTD)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=tolerance)


def test_both_attentions_are_near_float32_in_bfloat16():
    q_BHTD, k_BKSD, v_BKSD, mask = random_inputs(CASES["causal"], torch.float32)
    assert mask is not None
    expected_BHTD, _ = attention(q_BHTD, k_BKSD, v_BKSD, mask)
    for attend in (attention, fused_attention):
        qkv = (q_BHTD.bfloat16(), k_BKSD.bfloat16(), v_BKSD.bfloat16())
        y_BHTD, _ = attend(*qkv, mask=mask.bfloat16())
        assert y_BHTD.dtype == torch.bfloat16
        torch.testing.assert_close(y_BHTD.float(), expected_BHTD, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("device", "dtype", "context_length", "chosen"),
    [
        ("cpu", torch.bfloat16, 512, attention),
        ("cpu", torch.bfloat16, 513, fused_attention),  # storing the weights costs too much
        ("cpu", torch.float32, 512, fused_attention),
        ("cuda", torch.bfloat16, 512, fused_attention),
    ],
)
def test_the_formula_is_chosen_where_the_kernel_is_slower(
    device: str, dtype: torch.dtype, context_length: int, chosen: Attend
):
    assert choose_attention(torch.device(device), dtype, context_length) is chosen


@written_and_fused
def test_dropout_zeroes_weights_and_keeps_their_sum_on_average(attend: Attend):
    torch.manual_seed(0)
    q_BHTD = torch.zeros(64, 4, 16, D)
    ones_BHTD = torch.ones_like(q_BHTD)  # y is then the sum of the weights that were kept
    mask_TT = causal_mask(16, torch.float32, CPU)
    y_BHTD, _ = attend(q_BHTD, q_BHTD, ones_BHTD, mask_TT, 0.25)
    first_BH = y_BHTD[:, :, 0, 0]  # the first position has a single weight: 1 / 0.75, or nothing
    assert {round(value, 4) for value in first_BH.flatten().tolist()} == {0.0, 1.3333}
    assert y_BHTD.mean().item() == pytest.approx(1, abs=0.02)


# --- One query, as in decoding --------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(
    "case",
    [Case(1, 7), Case(1, 7, padding=(B, 1, 1, 7)), Case(1, 1, is_causal=True)],
    ids=["all", "ragged", "first"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["f64", "bf16"])
def test_a_query_of_the_cache_reads_what_attention_with_repeated_keys_does(
    K: int, case: Case, dtype: torch.dtype
):
    """A bfloat16 query asks a float32 cache, as on a CPU, and is answered in bfloat16."""
    of_cache = torch.float64 if dtype == torch.float64 else torch.float32
    q_BH1D, k_BKSD, v_BKSD, mask = random_inputs(case._replace(K=K), of_cache)
    q_BH1D = q_BH1D.to(dtype)
    y_BH1D, _ = cached_attention(q_BH1D, k_BKSD, v_BKSD, mask)
    k_BHSD, v_BHSD = (x_BKSD.repeat_interleave(H // K, dim=1) for x_BKSD in (k_BKSD, v_BKSD))
    expected_BH1D, _ = attention(q_BH1D.to(of_cache), k_BHSD, v_BHSD, mask)
    assert y_BH1D.dtype == dtype
    torch.testing.assert_close(y_BH1D, expected_BH1D.to(dtype))


# --- Rotary positions -----------------------------------------------------------------------------

ROTARY = ModelConfig(architecture="modern", n_embd=24, n_head=3).sized()


@pytest.mark.parametrize("shift", [1, 7, 500])
def test_rotated_scores_depend_on_the_distance_alone(shift):
    torch.manual_seed(0)
    q_BHTD, k_BHTD = torch.randn(2, B, H, 10, 8).double().unbind()

    def scores_BHTS(query_shift: int, key_shift: int) -> Tensor:
        asks_1T, asked_1T = (torch.arange(10)[None] + by for by in (query_shift, key_shift))
        turned_BHTD = rotate(k_BHTD, *rope_of(asked_1T, ROTARY, torch.float64))
        return rotate(q_BHTD, *rope_of(asks_1T, ROTARY, torch.float64)) @ turned_BHTD.mT

    torch.testing.assert_close(scores_BHTS(shift, shift), scores_BHTS(0, 0), rtol=0, atol=3e-4)
    assert not torch.allclose(scores_BHTS(shift, 0), scores_BHTS(0, 0), rtol=0, atol=0.1)


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_rotation_multiplies_each_pair_of_channels_by_a_complex_phase(theta):
    config = ModelConfig(architecture="modern", n_embd=24, n_head=3, rope_theta=theta).sized()
    torch.manual_seed(0)
    x_BHTD = torch.randn(B, H, 5, 8, dtype=torch.float64)
    # Su et al., 2021, eq. 12-15: pair i turns by position * theta^(-2i/D); a pair is (i, i + D/2)
    phases_TD = np.exp(1j * np.outer(np.arange(5), theta ** (-2 * np.arange(4) / 8)))
    z_BHTD = (x_BHTD[..., :4].numpy() + 1j * x_BHTD[..., 4:].numpy()) * phases_TD
    rotated_BHTD = rotate(x_BHTD, *rope_of(torch.arange(5)[None], config, torch.float64))
    expected_BHTD = np.concatenate([z_BHTD.real, z_BHTD.imag], axis=-1)
    np.testing.assert_allclose(rotated_BHTD, expected_BHTD, rtol=0, atol=2e-6)


def test_each_row_is_turned_by_its_own_positions():
    torch.manual_seed(0)
    x_BHTD, positions_BT = torch.randn(B, H, 3, 8), torch.tensor([[0, 1, 2], [5, 0, 9]])
    together_BHTD = rotate(x_BHTD, *rope_of(positions_BT, ROTARY, torch.float32))
    for b, t in np.ndindex(2, 3):
        rope = rope_of(positions_BT[b : b + 1, t : t + 1], ROTARY, torch.float32)
        alone_1H1D = rotate(x_BHTD[b : b + 1, :, t : t + 1], *rope)
        torch.testing.assert_close(together_BHTD[b, :, t], alone_1H1D[0, :, 0])


# --- A published walk-through: iamaryav/models, blogs/attention.ipynb -----------------------------
# Two samples of four positions and two channels; its layers, to six decimals; what it prints, to
# four. The numbers of the second sample were computed independently from its layers.

X_BTC = torch.tensor(
    [
        [
            [1.926915, 1.487284],
            [0.900717, -2.105521],
            [0.678418, -1.234545],
            [-0.043067, -1.604667],
        ],
        [
            [-0.752135, 1.648723],
            [-0.392479, -1.403607],
            [-0.727881, -0.559430],
            [-0.768839, 0.762445],
        ],
    ]
)
LAYERS = {
    "query": ([[0.545099, 0.104517], [-0.330106, 0.180240]], [-0.325790, -0.082924]),
    "key": ([[-0.287197, 0.469074], [-0.558169, -0.325984]], [-0.199669, -0.425164]),
    "value": ([[0.066739, -0.698395], [0.638595, -0.600665]], [0.545906, 0.117676]),
}
PRINTED_QKV = {
    "query": [[0.8800, -0.4509], [-0.0549, -0.7598], [-0.0850, -0.5294], [-0.5170, -0.3579]],
    "key": [[-0.0554, -1.9855], [-1.4460, -0.2416], [-0.9736, -0.4014], [-0.9400, 0.1220]],
    "value": [[-0.3642, 0.4548], [2.0765, 1.9576], [1.4534, 1.2925], [1.6637, 1.0540]],
}
PRINTED_SCORES = [
    [0.8466, -1.1636, -0.6758, -0.8822],
    [1.5116, 0.2629, 0.3584, -0.0411],
    [1.0558, 0.2508, 0.2953, 0.0153],
    [0.7393, 0.8340, 0.6470, 0.4423],
]
PRINTED_SCALED = [
    [0.5986, -0.8228, -0.4778, -0.6238],
    [1.0688, 0.1859, 0.2534, -0.0291],
    [0.7466, 0.1773, 0.2088, 0.0109],
    [0.5228, 0.5897, 0.4575, 0.3128],
]
PRINTED_WEIGHTS = [
    [
        [1, 0, 0, 0],
        [0.7074, 0.2926, 0, 0],
        [0.4651, 0.2632, 0.2716, 0],
        [0.2620, 0.2802, 0.2455, 0.2124],
    ],
    [
        [1, 0, 0, 0],
        [0.3477, 0.6523, 0, 0],
        [0.1909, 0.4599, 0.3492, 0],
        [0.1504, 0.3682, 0.2866, 0.1948],
    ],
]
PRINTED_OUTPUTS = [
    [[-0.3642, 0.4548], [0.3499, 0.8945], [0.7720, 1.0779], [1.1964, 1.2087]],
    [[-0.6558, -1.3530], [0.7504, -0.0072], [0.8748, 0.0645], [0.7008, -0.1071]],
]


MASK_TT = causal_mask(4, torch.float32, CPU)


def walk_through() -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (2, 1, 4, 2) of the walk-through: one head."""
    pairs = [(torch.tensor(weight), torch.tensor(bias)) for weight, bias in LAYERS.values()]
    q_BHTD, k_BHSD, v_BHSD = ((X_BTC @ weight.T + bias)[:, None] for weight, bias in pairs)
    return q_BHTD, k_BHSD, v_BHSD


def assert_printed(actual: Tensor, printed: object, decimals_atol: float = 5.5e-5) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), np.array(printed), 0, decimals_atol)


def test_the_walk_through_prints_these_queries_keys_and_values():
    for tensor_BHTD, printed in zip(walk_through(), PRINTED_QKV.values(), strict=True):
        assert_printed(tensor_BHTD[0, 0], printed)


def test_attention_gives_the_weights_that_the_walk_through_prints():
    _, weights_BHTS = attention(*walk_through(), MASK_TT)
    assert_printed(weights_BHTS[:, 0], PRINTED_WEIGHTS, 1e-4)  # its rows are rounded, not exact


@written_and_fused
def test_attention_gives_the_outputs_that_the_walk_through_prints(attend: Attend):
    y_BHTD, _ = attend(*walk_through(), MASK_TT, 0.0)
    assert_printed(y_BHTD[:, 0], PRINTED_OUTPUTS)


def test_the_weights_are_the_softmax_of_the_scaled_and_masked_scores_of_the_walk_through():
    q_BHTD, k_BHSD, v_BHSD = walk_through()
    scores_TS = (q_BHTD @ k_BHSD.mT)[0, 0]
    assert_printed(scores_TS, PRINTED_SCORES)
    assert_printed(scores_TS / math.sqrt(2), PRINTED_SCALED)
    # softmax keeps differences: ln A[i, j] - ln A[i, 0] = S[i, j] - S[i, 0]
    masked_TS = np.where(np.tri(4, dtype=bool), PRINTED_SCALED, -math.inf)
    _, weights_BHTS = attention(q_BHTD, k_BHSD, v_BHSD, MASK_TT)
    log_TS = weights_BHTS[0, 0].log()
    assert_printed(log_TS - log_TS[:, :1], masked_TS - masked_TS[:, :1], 1.5e-4)


def test_without_the_mask_the_walk_throughs_third_query_sees_all_four_keys():
    _, weights_BHTS = attention(*walk_through())
    assert_printed(weights_BHTS[0, 0, 2], [0.3804, 0.2153, 0.2221, 0.1822], 1e-4)


def test_seed_42_draws_the_walk_throughs_input_and_layers():
    torch.manual_seed(42)
    torch.testing.assert_close(torch.randn(2, 4, 2), X_BTC, rtol=0, atol=1e-6)
    for weight, bias in LAYERS.values():  # in its order: query, key, value
        layer = nn.Linear(2, 2)
        torch.testing.assert_close(layer.weight.data, torch.tensor(weight), rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.bias.data, torch.tensor(bias), rtol=0, atol=1e-6)


# --- Three words that attend to each other, q = k = v ---------------------------------------------
# An introduction's example, "sat" asking (.61, .89, .77). It omits the root, and its softmax
# is misprinted; these are the right values, computed by hand from its scores.

WORDS_SC = torch.tensor([[0.2, 0.8, 0.1], [0.9, 0.3, 0.7], [0.4, 0.6, 0.5]], dtype=torch.float64)
THIRD = ([0.285989, 0.378400, 0.335611], [0.532002, 0.543678, 0.461285])
WORDS = {  # temperature, causal, row, weights, output
    "first": (
        math.sqrt(3),
        False,
        0,
        [0.364718, 0.298606, 0.336677],
        [0.476359, 0.583362, 0.413834],
    ),
    "second": (
        math.sqrt(3),
        False,
        1,
        [0.201962, 0.496746, 0.301292],
        [0.607981, 0.491369, 0.518564],
    ),
    "third": (math.sqrt(3), False, 2, *THIRD),
    "second, causal": (
        math.sqrt(3),
        True,
        1,
        [0.28905, 0.71095, 0],
        [0.697665, 0.444525, 0.526570],
    ),
    "third, causal": (math.sqrt(3), True, 2, *THIRD),
    "second, causal, with the root": (
        1,
        True,
        1,
        [0.372942, 0.627058, 0],
        [0.638940, 0.486471, 0.476235],
    ),
    "uniform": (0, False, 2, [1 / 3, 1 / 3, 1 / 3], [0.5, 0.566667, 0.433333]),
}


@pytest.mark.parametrize(
    ("factor", "causal", "row", "weights", "output"), WORDS.values(), ids=WORDS.keys()
)
def test_three_words_attend_to_each_other_as_by_hand(factor, causal, row, weights, output):
    words_BHSD = WORDS_SC[None, None]
    mask_TT = causal_mask(3, torch.float64, CPU) if causal else None
    y_BHTD, weights_BHTS = attention(factor * words_BHSD, words_BHSD, words_BHSD, mask_TT)
    assert_printed(weights_BHTS[0, 0, row], weights, 1.1e-6)
    assert_printed(y_BHTD[0, 0, row], output, 1.1e-6)


# --- Heads of 64 and the factor 1/8: Alammar, The Illustrated Transformer, 2018 -------------------


def test_a_head_of_64_divides_its_scores_by_8():
    q_BHTD = torch.ones(1, 1, 1, 64)
    k_BHSD = torch.tensor([112 / 64, 96 / 64])[None, None, :, None].expand(1, 1, 2, 64)
    assert (q_BHTD @ k_BHSD.mT).flatten().tolist() == [112, 96]
    _, weights_BHTS = attention(q_BHTD, k_BHSD, k_BHSD)
    assert_printed(weights_BHTS.flatten(), [0.8808, 0.1192])  # softmax([14, 12])
    # without the factor the softmax is saturated: 1 and 1.1e-7
    _, weights_BHTS = attention(8 * q_BHTD, k_BHSD, k_BHSD)
    assert weights_BHTS[0, 0, 0, 1].item() == pytest.approx(math.exp(-16), rel=1e-4)


def test_a_width_of_512_is_split_into_8_heads_of_64():
    shapes: list[tuple[int, ...]] = []

    def spy(
        q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Mask, dropout: float
    ) -> tuple[Tensor, Tensor]:
        shapes.extend(tuple(tensor.shape) for tensor in (q_BHTD, k_BHSD, v_BHSD))
        y_BHTD, weights_BHTS = attention(q_BHTD, k_BHSD, v_BHSD, mask, dropout)
        shapes.append(tuple(weights_BHTS.shape))
        return y_BHTD, weights_BHTS

    config = ModelConfig(vocab_size=65, n_layer=1, n_head=8, n_embd=512)
    logits_BTV = GPT(config, spy)(torch.zeros(2, 3, dtype=torch.long))
    assert config.sized().head_dim == 64
    assert shapes == [(2, 8, 3, 64)] * 3 + [(2, 8, 3, 3)]
    assert logits_BTV.shape == (2, 3, 65)


def test_unscaled_scores_of_a_head_of_64_have_variance_64_and_scaled_ones_1():
    torch.manual_seed(0)
    q_BHTD, k_BHSD = torch.randn(2, 1, 1, 500, 64)
    _, weights_BHTS = attention(q_BHTD[None], k_BHSD[None], k_BHSD[None])
    # the spread of ln w within a row is the spread of the scaled scores (Vaswani et al., note 4)
    assert weights_BHTS.log().var(dim=-1).mean().item() == pytest.approx(1, abs=0.05)
