"""The parts of the sampler, each against a direct computation."""

import copy
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from data.tokenizer import ByteTokenizer, CharTokenizer
from engine.device import has_bfloat16
from engine.loss import LossModel, evaluate
from engine.parallel import World
from model import GPT, ModelConfig, RMSNorm
from sample import SampleConfig
from sampling import precision
from sampling.cache import cached_attention
from sampling.choose import choose, distribution, draw, penalized
from sampling.decode import NUMBERS_AT_ONCE, Decoder, random_numbers
from sampling.layers import (
    Float16Linear,
    Int8Linear,
    Int8WeightLinear,
    PackedLinear,
    has_fbgemm,
    largest_weight,
)
from sampling.output import Sample, longest_start, name, records, show
from sampling.precision import convert
from sampling.prompts import read_prompts
from sampling.score import Score, score
from sampling.step import rms_norm_of, use_steps

BYTES = ByteTokenizer()
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
needs_fbgemm = pytest.mark.skipif(not has_fbgemm(), reason="FBGEMM is for x86 with AVX2")
SIZES: dict[str, Any] = {"vocab_size": 40, "context_length": 12, "n_layer": 2}
SIZES |= {"n_embd": 64, "n_head": 2}


def small(**changes: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(SIZES | changes)), cached_attention).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


# --- Choosing -------------------------------------------------------------------------------------


def test_each_row_of_a_batch_has_the_distribution_that_it_has_alone():
    logits_BV = torch.randn(5, 30)
    config = SampleConfig(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)
    together_BV = distribution(logits_BV, config)
    for row in range(5):
        assert torch.equal(together_BV[row], distribution(logits_BV[row : row + 1], config)[0])


def test_a_number_draws_the_token_at_which_the_probabilities_pass_it():
    p_BV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(6, -1)
    numbers_B = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-53, 0.6], dtype=torch.float64)
    assert draw(p_BV, numbers_B).tolist() == [1, 1, 3, 3, 3, 3]


def test_each_text_has_random_numbers_of_its_own_whoever_else_grows():
    n_steps = 2 * NUMBERS_AT_ONCE + 9
    together, alone = (
        torch.stack(list(itertools.islice(random_numbers(seeds, CPU), n_steps)))
        for seeds in ([(1, 0), (1, 1)], [(1, 1)])
    )
    assert torch.equal(together[:, 1], alone[:, 0])
    assert len(together.unique()) == together.numel()
    assert 0 <= together.min() < 0.01 < 0.99 < together.max() < 1


def test_the_penalty_lowers_the_tokens_seen_as_numpy_computes():
    logits_BV, seen_BV = torch.randn(3, 9), torch.rand(3, 9) < 0.5
    found_BV = penalized(logits_BV, seen_BV, 1.3)
    for row in range(3):
        for token in range(9):
            logit = logits_BV[row, token].item()
            lower = logit / 1.3 if logit > 0 else logit * 1.3
            expected = lower if seen_BV[row, token] else logit
            assert found_BV[row, token].item() == pytest.approx(expected)


def test_the_penalty_is_transformers_own():
    transformers = pytest.importorskip("transformers")
    logits_BV, tokens_BT = torch.randn(2, 9), torch.tensor([[1, 5, 5], [0, 2, 8]])
    seen_BV = torch.zeros(2, 9, dtype=torch.bool).scatter(1, tokens_BT, True)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    expected_BV = theirs(tokens_BT, logits_BV.clone())
    torch.testing.assert_close(penalized(logits_BV, seen_BV, 1.7), expected_BV)


def test_all_cuts_together_are_transformers_warpers_in_their_order():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits_BV = 2 * torch.randn(50, 40)
    config = SampleConfig(temperature=1.4, top_k=25, top_p=0.9, min_p=0.04)
    warpers = [
        transformers.TemperatureLogitsWarper(1.4),
        transformers.TopKLogitsWarper(25),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.04),
    ]
    expected_BV = logits_BV
    for warper in warpers:
        expected_BV = warper(torch.zeros(50, 1, dtype=torch.long), expected_BV)
    torch.testing.assert_close(distribution(logits_BV, config), expected_BV.softmax(-1))


def test_probabilities_are_the_models_own_before_penalty_and_temperature():
    logits_BV, seen_BV = torch.randn(2, 9), torch.ones(2, 9, dtype=torch.bool)
    config = SampleConfig(temperature=0, repetition_penalty=2.0)
    drawn = choose(logits_BV, seen_BV, torch.zeros(2, dtype=torch.float64), config, top=3)
    log_p_BV = logits_BV.log_softmax(-1)
    torch.testing.assert_close(drawn.log_p_B, log_p_BV[torch.arange(2), drawn.tokens_B])
    top_BK, top_tokens_BK = log_p_BV.topk(3)
    torch.testing.assert_close(drawn.top_log_p_BK, top_BK)
    assert drawn.top_tokens_BK is not None
    assert torch.equal(drawn.top_tokens_BK, top_tokens_BK)


def test_probabilities_that_nobody_asked_for_are_not_computed():
    logits_BV, seen_BV = torch.randn(2, 9), torch.zeros(2, 9, dtype=torch.bool)
    numbers_B = torch.zeros(2, dtype=torch.float64)
    assert choose(logits_BV, seen_BV, numbers_B, SampleConfig()).log_p_B is None
    drawn = choose(logits_BV, seen_BV, numbers_B, SampleConfig(), top=0)
    assert drawn.top_log_p_BK is not None
    assert drawn.top_log_p_BK.shape == (2, 0)


# --- Stops ----------------------------------------------------------------------------------------


def grown(text: str, *stops: str) -> tuple[Sample, list[str]]:
    """A sample that was fed the bytes of a text one by one, and what it showed at each."""
    one = Sample("", [], 0, BYTES, stops)
    pieces = []
    for byte in text.encode():
        if one.finish_reason is None:
            pieces.append(one.feed(byte))
    pieces.append(one.finish("length"))
    return one, pieces


@pytest.mark.parametrize(
    ("text", "stops", "shown", "reason"),
    [
        ("one END two", ("END",), "one ", "stop"),
        ("one EN two", ("END",), "one EN two", "length"),
        ("one EN", ("END",), "one EN", "length"),
        ("aaab", ("aab",), "a", "stop"),
        ("x y z", ("z", "y"), "x ", "stop"),
        ("abc", ("bcd", "abcd"), "abc", "length"),
        ("héé🙂!", ("🙂",), "héé", "stop"),
        ("END", ("END",), "", "stop"),
    ],
)
def test_a_text_ends_before_a_stop_string_even_one_in_pieces(text, stops, shown, reason):
    one, pieces = grown(text, *stops)
    assert (one.text, one.finish_reason) == (shown, reason)
    assert "".join(pieces) == shown


def test_no_part_of_a_stop_string_is_ever_shown():
    for n in range(1, 20):
        _, pieces = grown(("a" + "x" * n) + "STOP", "STOP")
        assert "S" not in "".join(pieces)
    _, pieces = grown("abSTx", "STOP")
    assert pieces == ["a", "b", "", "", "STx", ""]  # shown as soon as it is no stop string


def test_the_end_of_text_ends_a_sample_and_is_no_token_of_it():
    one = Sample("", [], 0, BYTES)
    shown = one.feed(65) + one.feed(256)
    assert (shown, one.tokens, one.finish_reason) == ("A", [65], "end_of_text")


def test_the_longest_start_of_a_stop_string_is_held():
    assert longest_start("a EN", ("END", "N")) == 2
    assert longest_start("a END", ("END",)) == 0
    assert longest_start("", ("END",)) == 0


# --- What is shown and kept -----------------------------------------------------------------------


def test_samples_are_shown_in_order_whatever_the_order_of_their_ends(
    capsys: pytest.CaptureFixture[str],
):
    samples = [Sample(f"{n}]", [0], 0, BYTES) for n in (1, 2, 3)]

    def pieces() -> Iterator[tuple[int, str]]:
        assert capsys.readouterr().out == "[1]"
        yield from ((2, "c"), (0, "a"), (1, "b"), (0, "A"))
        assert capsys.readouterr().out == "aA"
        for row in (1, 0):
            yield row, samples[row].finish("length")
        assert capsys.readouterr().out == "\n[2]b\n[3]c"
        yield 2, "C"
        yield 2, samples[2].finish("length")

    show(pieces(), samples, ["["] * 3)
    assert capsys.readouterr().out == "C\n"


def test_a_file_holds_what_was_finished_when_ctrl_c_came(tmp_path: Path):
    def interrupted() -> None:
        with records(tmp_path / "a.jsonl") as keep:
            keep([{"a": "é"}])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"a": "é"}\n'
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("token", "shown"), [(10, '"\\n"'), (34, '"\\""'), (200, "b'\\xc8'"), (256, '"<|endoftext|>"')]
)
def test_a_token_is_named_as_a_string_or_as_bytes(token: int, shown: str):
    assert name(BYTES, token) == shown


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.txt", "\n \n", "a.txt holds no prompts"),
        ("a.txt", "", "a.txt is empty"),
        ("a.jsonl", '{"prompt": "a"}\nb\n', "a.jsonl, prompt 2: this is not JSON"),
        ("a.jsonl", '{"prompt": ""}', "a.jsonl holds no prompts, or an empty one"),
        ("a.jsonl", "[1]", 'a.jsonl, prompt 1: want an object with a string "prompt" or "text"'),
        ("a.jsonl", "[" * 200_000, "a.jsonl, prompt 1: this is not JSON"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, file: str, text: str, message: str):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / file)


def test_prompts_are_divided_at_line_ends_and_nowhere_else(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\x0ctwo\r\n\n three \u2028 \x85\n".encode())
    assert read_prompts(tmp_path / "a.txt") == ["one\x0ctwo", " three \u2028 \x85"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl") == ["a\u2028b"]


# --- Scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
@pytest.mark.parametrize("n", [2, 12, 13, 14, 40])
@torch.no_grad()
def test_the_score_is_that_of_each_token_after_all_that_fits(architecture: Any, n: int):
    model, rng = small(architecture=architecture), np.random.default_rng(n)
    tokenizer = CharTokenizer(
        "".join(chr(97 + i) for i in range(26)) + "ABCDEFéöüáíóúâ", with_end_of_text=False
    )
    tokens = rng.integers(40, size=n).tolist()
    expected = 0.0
    for end in range(1, n):
        seen_1T = torch.tensor([tokens[max(0, end - 12) : end]])
        expected -= float(model(seen_1T)[0, -1].log_softmax(-1)[tokens[end]])
    found = score(model, tokenizer, tokens)
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert (found.n_tokens, found.n_bytes) == (n - 1, len(tokenizer.decode(tokens[1:]).encode()))


@pytest.mark.parametrize("stride", [1, 2, 5, 11, 12, 100])
def test_every_token_is_scored_once_whatever_the_stride(stride: int):
    model = small()
    tokens = np.random.default_rng(0).integers(40, size=61).tolist()
    found = score(model, ByteTokenizer(), tokens, stride)
    assert found.n_tokens == 60
    # the first token of each window that moves by all of its length sees itself alone
    assert found.nats == pytest.approx(score(model, ByteTokenizer(), tokens).nats, rel=0.05)


def test_one_token_cannot_be_scored():
    with pytest.raises(ValueError, match="a text must have 2 tokens to be scored: got 1"):
        score(small(), BYTES, [1])


def test_a_score_prints_loss_perplexity_and_bits_per_byte():
    shown = str(Score(nats=20 * math.log(2), n_tokens=10, n_bytes=40))
    assert shown == (
        "10 tokens, 40 bytes: loss 1.3863 nats per token, perplexity 4, 0.5000 bits per byte"
    )


# --- Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 8, 40, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_torchs_own_does(rows: int, bias: bool):
    linear = nn.Linear(96, 65, bias=bias)
    plain, x = copy.deepcopy(linear), torch.randn(2, rows, 96)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), plain(x))
        if has_bfloat16(CPU):
            y = PackedLinear(linear.bfloat16())(x.bfloat16())
            exact = F.linear(x.bfloat16().float(), plain.weight.bfloat16().float(), plain.bias)
            torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)


@needs_fbgemm
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_a_float16_layer_rounds_its_weight_and_nothing_else(rows: int, bias: bool):
    linear, x = nn.Linear(100, 65, bias=bias), torch.randn(2, rows, 100)
    exact = F.linear(x, linear.weight.half().float(), linear.bias)
    with torch.inference_mode():
        torch.testing.assert_close(Float16Linear(linear)(x), exact)
    assert not torch.equal(exact, linear(x))


@needs_fbgemm
def test_a_weight_too_large_for_float16_is_refused():
    linear = nn.Linear(4, 4)
    nn.init.constant_(linear.weight, 70_000.0)
    with pytest.raises(ValueError, match="float16 holds weights up to 65,504: got 70,000"):
        Float16Linear(linear)


@pytest.mark.parametrize("rows", [1, 3, 32, 33])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [96, 20, 100])
@pytest.mark.parametrize("layer", [pytest.param(Int8Linear, marks=needs_fbgemm), Int8WeightLinear])
def test_an_int8_layer_computes_with_rounded_weights(
    layer: Any, rows: int, bias: bool, channels: int
):
    linear, x = nn.Linear(channels, 65, bias=bias), torch.randn(2, rows, channels)
    most = largest_weight() if layer is Int8Linear else 127
    scale_O = linear.weight.abs().amax(1) / most
    rounded_OI = (linear.weight / scale_O[:, None]).round() * scale_O[:, None]
    assert (rounded_OI - linear.weight).abs().max() <= scale_O.max() / 2 + 1e-7
    exact = F.linear(x, rounded_OI, linear.bias)
    with torch.inference_mode():
        error = (layer(linear)(x) - exact).norm() / exact.norm()
    # half a step of 1/127 of the largest input, spread evenly, is about 0.6 % of a normal one's
    assert error < (0.015 if layer is Int8Linear else 1e-5)


@needs_fbgemm
def test_a_row_is_rounded_by_its_own_size_whatever_the_batch():
    linear = nn.Linear(64, 32)
    x = torch.randn(3, 64) * torch.tensor([[1.0], [1000.0], [1e-4]])
    exact = linear(x) - linear.bias
    with torch.inference_mode():
        layer = Int8Linear(linear)
        together = layer(x) - linear.bias
        for row in range(2):
            alone = layer(x[row : row + 1])[0] - linear.bias
            for found in (together[row], alone):
                assert (found - exact[row]).norm() < 0.03 * exact[row].norm()


@needs_fbgemm
def test_a_row_of_zeros_stays_zero_in_int8():
    linear = nn.Linear(64, 32, bias=False)
    with torch.inference_mode():
        layer = Int8Linear(linear)
        y = layer(torch.stack((torch.zeros(64), torch.ones(64))))
        nn.init.zeros_(linear.weight)
        assert torch.equal(Int8Linear(linear)(torch.ones(1, 64)), torch.zeros(1, 32))
    assert torch.equal(y[0], torch.zeros(32))
    assert y[1].norm() > 0


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
@pytest.mark.parametrize(
    ("kind", "near"), [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 0.05), ("int8", 0.05)]
)
def test_a_converted_model_has_nearly_the_same_logits(architecture: Any, kind: Any, near: float):
    if kind not in precision.available(CPU):
        pytest.skip(f"this processor has no {kind}")
    model, tokens_BT = small(architecture=architecture), torch.randint(40, (2, 12))
    expected = model(tokens_BT)
    found = convert(model, kind)(tokens_BT).float()
    assert (found - expected).norm() <= near * expected.norm()
    if kind != "float32":
        assert not torch.equal(found, expected)


@pytest.mark.parametrize("is_packed", [True, False])
def test_float32_takes_the_layer_that_is_faster_here(
    is_packed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "is_faster_packed", lambda *_: is_packed)
    model, tokens_BT = small(), torch.randint(40, (2, 12))
    expected = model(tokens_BT)
    convert(model, "float32")
    assert isinstance(model.lm_head, PackedLinear) == is_packed
    torch.testing.assert_close(model(tokens_BT), expected)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_precision_that_the_machine_has_not_is_refused(
    kind: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: False)
    monkeypatch.setattr(precision, "has_fbgemm", lambda: False)
    message = f"this cpu does not support precision {kind}: choose float32 or int8"
    with pytest.raises(ValueError, match=message):
        convert(small(), kind)


def test_smaller_weights_are_not_for_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: True)
    assert precision.available(torch.device("cuda")) == ["float32", "bfloat16"]


LIMITED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}


@pytest.mark.slow
@needs_fbgemm
def test_all_of_this_holds_on_a_processor_with_avx2_alone():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [__file__, "-k", "int8 or float16 or packed or converted or rounded"]
    done = subprocess.run(command, env=os.environ | LIMITED, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    code = "from sampling import layers; print(layers.largest_weight())"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=os.environ | LIMITED, capture_output=True, cwd=ROOT)
    assert found.stdout == b"63\n"


# --- A step in few calls --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        {"architecture": "gpt2"},
        {"architecture": "modern"},
        {"architecture": "modern", "n_kv_head": 1, "tie_embeddings": False},
        {"architecture": "modern", "n_head": 4, "n_kv_head": 2, "head_dim": 10},
    ],
)
@pytest.mark.parametrize("lengths", [(4, 4), (2, 5)])
@torch.inference_mode()
def test_a_step_computes_what_the_model_does(sizes: Any, lengths: tuple[int, int]):
    plain = small(**sizes)
    fast = copy.deepcopy(plain)
    use_steps(fast)
    prompts = [list(range(n)) for n in lengths]
    decoders = [Decoder(model, prompts, 30) for model in (plain, fast)]
    logits = [decoder.read() for decoder in decoders]
    for i in range(20):  # beyond the context of 12
        torch.testing.assert_close(logits[1], logits[0])
        logits = [decoder.feed(torch.tensor([i, i + 1])) for decoder in decoders]
    assert type(fast) is not type(plain)


@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_norm_in_few_calls_is_that_of_the_model(heads: tuple[int, ...], dtype: torch.dtype):
    norm = RMSNorm(8, eps=1e-6).to(dtype)
    nn.init.uniform_(norm.weight)
    x = torch.randn(2, *heads, 8, dtype=dtype)
    x[0] *= 1e-3  # so small that eps counts
    normalise = rms_norm_of(norm, norm.weight.expand(*heads, 8))
    torch.testing.assert_close(normalise(x), norm(x))


# --- Apple's GPUs ---------------------------------------------------------------------------------


class Mac(TorchDispatchMode):
    """The meta device stands for Apple's GPU: no tensor on it may be float64.

    What is copied from it to the host is zeros, and a number that the host asks for is 1.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode an operation that has parts comes as one
            of_parts = func.decompose(*args, **kwargs)
        if of_parts is not NotImplemented:
            return of_parts
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        where = kwargs.get("device")
        if where is not None and where.type == "mps":
            kwargs = kwargs | {"device": torch.device("meta")}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and where == CPU:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            is_there = isinstance(tensor, torch.Tensor) and tensor.is_meta
            assert not (is_there and tensor.dtype == torch.float64), f"{func} makes a float64"
        return result


def on_a_mac(**changes: Any) -> GPT:
    with torch.device("meta"):
        return GPT(ModelConfig(**(SIZES | changes)), cached_attention).eval()


def test_the_mac_of_these_tests_refuses_a_float64():
    with Mac(), pytest.raises(AssertionError, match="makes a float64"):
        torch.zeros(3, device="meta").double().cpu()
    with Mac():
        assert torch.ones(3, device="meta").cpu().double().tolist() == [0, 0, 0]


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_a_mac_evaluates_and_trains_without_a_float64(architecture: str):
    model = on_a_mac(architecture=architecture)
    tokens_BT = torch.randint(40, (2, 12))
    loss_model = LossModel(model, torch.float32)
    with Mac():
        found = evaluate(loss_model, [(tokens_BT, tokens_BT)] * 2, World(torch.device("meta")))
        loss_model(tokens_BT.to("meta"), tokens_BT.to("meta")).backward()
    assert found == 0
    assert model.wte.weight.grad is not None


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_a_mac_scores_without_a_float64(architecture: str):
    model = on_a_mac(architecture=architecture)
    with Mac():
        assert score(model, BYTES, list(range(30)), 5).n_tokens == 29


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_a_mac_samples_without_a_float64(architecture: str, monkeypatch: pytest.MonkeyPatch):
    mac = torch.device("mps", 0)
    monkeypatch.setattr(sample, "random_numbers", lambda seeds, _: random_numbers(seeds, mac))
    model = on_a_mac(architecture=architecture, vocab_size=BYTES.vocab_size)
    cuts: dict[str, Any] = {"repetition_penalty": 1.1, "top_k": 9, "top_p": 0.9, "min_p": 0.1}
    choice = SampleConfig(max_new_tokens=10, show_top=2, **cuts)
    samples = [Sample("", [1] * n, n, BYTES) for n in (3, 5, 3)]
    with Mac():
        for _ in sample.grow_samples(model, samples, choice):
            pass
    assert [one.tokens for one in samples] == [[0] * 10] * 3
