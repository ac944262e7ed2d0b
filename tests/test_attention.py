"""Attention and rotary positions against a plain loop, published walk-throughs and algebra."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model
from model import GPT, ModelConfig, attention, fused_attention, rotate, rotation

B, H, D = 2, 3, 4

# queries T, keys S, causal, shape of the mask
CASES = {
    "causal": (5, 5, True, None),
    "causal, the last 3 of 7": (3, 7, True, None),
    "causal, the last of 7": (1, 7, True, None),
    "causal, one position": (1, 1, True, None),
    "causal and masked": (5, 5, True, (B, 1, 5, 5)),
    "causal, the last 3 of 7, padded": (3, 7, True, (B, 1, 1, 7)),
    "causal, the last of 7, masked": (1, 7, True, (B, H, 1, 7)),
    "masked": (5, 5, False, (5, 5)),
    "cross": (4, 6, False, None),
    "cross, more queries than keys": (6, 4, False, None),
    "cross, padded": (4, 6, False, (B, 1, 1, 6)),
}
cases = pytest.mark.parametrize(
    ("T", "S", "causal", "mask_shape"), CASES.values(), ids=CASES.keys()
)


def random_inputs(T: int, S: int, mask_shape: tuple[int, ...] | None, dtype=torch.float64):
    """q, k, v and a mask that leaves the first key to everyone."""
    torch.manual_seed(T * S)
    q_BHTD, k_BHSD, v_BHSD = (torch.randn(B, H, n, D, dtype=dtype) for n in (T, S, S))
    mask = None if mask_shape is None else torch.rand(mask_shape) < 0.5
    if mask is not None:
        mask[..., 0] = True
    return q_BHTD, k_BHSD, v_BHSD, mask


def may_look(T: int, S: int, causal: bool, mask: Tensor | None) -> np.ndarray:
    """(B, H, T, S): whether query t, which stands at position S - T + t, may look at key s."""
    allowed_BHTS = np.ones((B, H, T, S), dtype=bool)
    for t, s in np.ndindex(T, S):
        allowed_BHTS[:, :, t, s] = not causal or s <= S - T + t
    return allowed_BHTS if mask is None else allowed_BHTS & mask.numpy()


def attention_by_loop(q_BHTD, k_BHSD, v_BHSD, allowed_BHTS) -> tuple[np.ndarray, np.ndarray]:
    y_BHTD, weights_BHTS = np.zeros_like(q_BHTD), np.zeros(allowed_BHTS.shape)
    for b, h, t in np.ndindex(q_BHTD.shape[:3]):
        visible = np.flatnonzero(allowed_BHTS[b, h, t])
        odds = [math.exp(q_BHTD[b, h, t] @ k_BHSD[b, h, s] / math.sqrt(D)) for s in visible]
        for s, odd in zip(visible, odds, strict=True):
            weights_BHTS[b, h, t, s] = odd / sum(odds)
            y_BHTD[b, h, t] += odd / sum(odds) * v_BHSD[b, h, s]
    return y_BHTD, weights_BHTS


def explicit_attention(*qkv: Tensor, **options) -> Tensor:
    return attention(*qkv, **options)[0]


@cases
def test_attention_is_what_a_plain_loop_computes(T, S, causal, mask_shape):
    q_BHTD, k_BHSD, v_BHSD, mask = random_inputs(T, S, mask_shape)
    allowed_BHTS = may_look(T, S, causal, mask)
    expected = attention_by_loop(q_BHTD.numpy(), k_BHSD.numpy(), v_BHSD.numpy(), allowed_BHTS)
    y_BHTD, weights_BHTS = attention(q_BHTD, k_BHSD, v_BHSD, causal=causal, mask=mask)
    np.testing.assert_allclose(y_BHTD, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(weights_BHTS, expected[1], rtol=0, atol=1e-12)


@cases
def test_each_query_shares_out_one_unit_and_gives_hidden_keys_exactly_nothing(
    T, S, causal, mask_shape
):
    q_BHTD, k_BHSD, v_BHSD, mask = random_inputs(T, S, mask_shape)
    _, weights_BHTS = attention(100 * q_BHTD, k_BHSD, v_BHSD, causal=causal, mask=mask)
    torch.testing.assert_close(weights_BHTS.sum(-1), torch.ones(B, H, T).double())
    assert (weights_BHTS.numpy()[~may_look(T, S, causal, mask)] == 0).all()


@cases
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_fused_attention_equals_attention_forward_and_backward(
    T, S, causal, mask_shape, dtype, tolerance
):
    *qkv, mask = random_inputs(T, S, mask_shape, dtype)
    g_BHTD = torch.randn(B, H, T, D, dtype=dtype)
    results = []
    for form in (explicit_attention, fused_attention):
        leaves = [tensor.clone().requires_grad_() for tensor in qkv]
        y_BHTD = form(*leaves, causal=causal, mask=mask)
        results.append((y_BHTD, *torch.autograd.grad(y_BHTD, leaves, g_BHTD)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "S", "uses_the_formula"),
    [
        (torch.bfloat16, 512, True),
        (torch.bfloat16, 513, False),  # storing the weights costs more than it saves
        (torch.float32, 512, False),
    ],
)
def test_a_cpu_computes_the_formula_in_bfloat16_where_the_kernel_is_slower(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    S: int,
    uses_the_formula: bool,
):
    called: list[str] = []
    kernel = F.scaled_dot_product_attention

    def counted(*tensors: Any, **settings: Any) -> Tensor:
        called.append("kernel")
        return kernel(*tensors, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    q, k, v = (torch.randn(1, 1, S, 4, dtype=dtype) for _ in range(3))
    y = fused_attention(q, k, v, causal=True)
    assert called == ([] if uses_the_formula else ["kernel"])
    torch.testing.assert_close(y, attention(q, k, v, causal=True)[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("form", [explicit_attention, fused_attention])
def test_dropout_zeroes_weights_and_keeps_their_sum_on_average(form: Callable[..., Tensor]):
    torch.manual_seed(0)
    q_BHTD = torch.zeros(64, 4, 16, D)
    ones_BHTD = torch.ones_like(q_BHTD)  # y is then the sum of the weights that were kept
    y_BHTD = form(q_BHTD, q_BHTD, ones_BHTD, causal=True, dropout=0.25)
    first_BH = y_BHTD[:, :, 0, 0]  # the first position has a single weight: 1 / 0.75, or nothing
    assert {round(value, 4) for value in first_BH.flatten().tolist()} == {0.0, 1.3333}
    assert y_BHTD.mean().item() == pytest.approx(1, abs=0.02)


# --- Rotary positions -----------------------------------------------------------------------------

ROTARY = ModelConfig(architecture="modern", n_embd=24, n_head=3)


@pytest.mark.parametrize("shift", [1, 7, 500])
def test_rotated_scores_depend_on_the_distance_alone(shift):
    torch.manual_seed(0)
    q_BHTD, k_BHTD = torch.randn(2, B, H, 10, 8).double().unbind()

    def scores_BHTS(query_shift: int, key_shift: int) -> Tensor:
        asks, is_asked = (torch.arange(10) + by for by in (query_shift, key_shift))
        turned_BHTD = rotate(k_BHTD, *rotation(is_asked, ROTARY))
        return rotate(q_BHTD, *rotation(asks, ROTARY)) @ turned_BHTD.mT

    torch.testing.assert_close(scores_BHTS(shift, shift), scores_BHTS(0, 0), rtol=0, atol=3e-4)
    assert not torch.allclose(scores_BHTS(shift, 0), scores_BHTS(0, 0), rtol=0, atol=0.1)


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_rotation_multiplies_each_pair_of_channels_by_a_complex_phase(theta):
    config = ModelConfig(architecture="modern", n_embd=24, n_head=3, rope_theta=theta)
    torch.manual_seed(0)
    x_BHTD = torch.randn(B, H, 5, 8, dtype=torch.float64)
    # Su et al., 2021, eq. 12-15: pair i turns by position * theta^(-2i/D); a pair is (i, i + D/2)
    phases_TD = np.exp(1j * np.outer(np.arange(5), theta ** (-2 * np.arange(4) / 8)))
    z_BHTD = (x_BHTD[..., :4].numpy() + 1j * x_BHTD[..., 4:].numpy()) * phases_TD
    rotated_BHTD = rotate(x_BHTD, *rotation(torch.arange(5), config))
    expected_BHTD = np.concatenate([z_BHTD.real, z_BHTD.imag], axis=-1)
    np.testing.assert_allclose(rotated_BHTD, expected_BHTD, rtol=0, atol=2e-6)


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


def walk_through() -> list[Tensor]:
    """q, k and v (2, 1, 4, 2) of the walk-through: one head."""
    pairs = [(torch.tensor(weight), torch.tensor(bias)) for weight, bias in LAYERS.values()]
    return [(X_BTC @ weight.T + bias)[:, None] for weight, bias in pairs]


def assert_printed(actual: Tensor, printed: object, decimals_atol: float = 5.5e-5) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), np.array(printed), 0, decimals_atol)


def test_the_walk_through_prints_these_queries_keys_and_values():
    for tensor_BHTD, printed in zip(walk_through(), PRINTED_QKV.values(), strict=True):
        assert_printed(tensor_BHTD[0, 0], printed)


def test_attention_gives_the_weights_that_the_walk_through_prints():
    _, weights_BHTS = attention(*walk_through(), causal=True)
    assert_printed(weights_BHTS[:, 0], PRINTED_WEIGHTS, 1e-4)  # its rows are rounded, not exact


@pytest.mark.parametrize("form", [explicit_attention, fused_attention])
def test_attention_gives_the_outputs_that_the_walk_through_prints(form: Callable[..., Tensor]):
    assert_printed(form(*walk_through(), causal=True)[:, 0], PRINTED_OUTPUTS)


def test_the_weights_are_the_softmax_of_the_scaled_and_masked_scores_of_the_walk_through():
    q_BHTD, k_BHSD, v_BHSD = walk_through()
    scores_TS = (q_BHTD @ k_BHSD.mT)[0, 0]
    assert_printed(scores_TS, PRINTED_SCORES)
    assert_printed(scores_TS / math.sqrt(2), PRINTED_SCALED)
    # softmax keeps differences: ln A[i, j] - ln A[i, 0] = S[i, j] - S[i, 0]
    masked_TS = np.where(np.tri(4, dtype=bool), PRINTED_SCALED, -math.inf)
    _, weights_BHTS = attention(q_BHTD, k_BHSD, v_BHSD, causal=True)
    log_TS = weights_BHTS[0, 0].log()
    assert_printed(log_TS - log_TS[:, :1], masked_TS - masked_TS[:, :1], 1.5e-4)


def test_without_the_mask_the_walk_throughs_third_query_sees_all_four_keys():
    _, weights_BHTS = attention(*walk_through(), causal=False)
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
    y_BHTD, weights_BHTS = attention(factor * words_BHSD, words_BHSD, words_BHSD, causal=causal)
    assert_printed(weights_BHTS[0, 0, row], weights, 1.1e-6)
    assert_printed(y_BHTD[0, 0, row], output, 1.1e-6)


# --- Heads of 64 and the factor 1/8: Alammar, The Illustrated Transformer, 2018 -------------------


def test_a_head_of_64_divides_its_scores_by_8():
    q_BHTD = torch.ones(1, 1, 1, 64)
    k_BHSD = torch.tensor([112 / 64, 96 / 64])[None, None, :, None].expand(1, 1, 2, 64)
    assert (q_BHTD @ k_BHSD.mT).flatten().tolist() == [112, 96]
    _, weights_BHTS = attention(q_BHTD, k_BHSD, k_BHSD, causal=False)
    assert_printed(weights_BHTS.flatten(), [0.8808, 0.1192])  # softmax([14, 12])
    # without the factor the softmax is saturated: 1 and 1.1e-7
    _, weights_BHTS = attention(8 * q_BHTD, k_BHSD, k_BHSD, causal=False)
    assert weights_BHTS[0, 0, 0, 1].item() == pytest.approx(math.exp(-16), rel=1e-4)


def test_a_width_of_512_is_split_into_8_heads_of_64(monkeypatch):
    shapes = []

    def spy(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, **options):
        shapes.extend(tuple(tensor.shape) for tensor in (q_BHTD, k_BHSD, v_BHSD))
        y_BHTD, weights_BHTS = attention(q_BHTD, k_BHSD, v_BHSD, **options)
        shapes.append(tuple(weights_BHTS.shape))
        return y_BHTD, weights_BHTS

    monkeypatch.setattr(model, "attention", spy)
    config = ModelConfig(vocab_size=65, n_layer=1, n_head=8, n_embd=512, attention="explicit")
    logits_BTV = GPT(config)(torch.zeros(2, 3, dtype=torch.long))
    assert config.head_dim == 64
    assert shapes == [(2, 8, 3, 64)] * 3 + [(2, 8, 3, 3)]
    assert logits_BTV.shape == (2, 3, 65)


def test_unscaled_scores_of_a_head_of_64_have_variance_64_and_scaled_ones_1():
    torch.manual_seed(0)
    q_BHTD, k_BHSD = torch.randn(2, 1, 1, 500, 64)
    _, weights_BHTS = attention(q_BHTD[None], k_BHSD[None], k_BHSD[None], causal=False)
    # the spread of ln w within a row is the spread of the scaled scores (Vaswani et al., note 4)
    assert weights_BHTS.log().var(dim=-1).mean().item() == pytest.approx(1, abs=0.05)
