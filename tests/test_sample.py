"""Generation against NumPy, against a model without a cache, and as a user meets it."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model as model_file
import sample
from data.prepare import PrepareConfig, prepare
from data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from engine import checkpoint
from engine.device import HostCopy
from helpers import REPOSITORY, TINY, run_here, train_here, without_box, words, write_tiny
from model import GPT, Cache, ModelConfig
from sample import SampleConfig, grow_samples, write_samples
from sampling.cache import cached_attention
from sampling.choose import Drawn, distribution
from sampling.decode import Decoder
from sampling.fastest import NOT_TRIED
from sampling.load import Trained, load_model
from sampling.output import Sample, read_steps
from sampling.precision import available
from sampling.prompts import encode_prompt, read_text
from sampling.step import use_steps

LETTERS = CharTokenizer("abcdefgh", with_end_of_text=False)
V = LETTERS.vocab_size
both_architectures = pytest.mark.parametrize("architecture", ["gpt2", "modern"])


def randomised(architecture: Any = "gpt2", vocab_size: int = V, **changes: Any) -> GPT:
    """A model whose logits differ widely from token to token."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"context_length": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
    sizes |= {"vocab_size": vocab_size, "tie_embeddings": architecture == "gpt2"}
    model = GPT(ModelConfig(architecture=architecture, **sizes | changes), cached_attention).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


class Scripted(GPT):
    """A model that finds the next token of a script ten times likelier than anything else."""

    def __init__(self, script: list[int], vocab_size: int = 300) -> None:
        sizes: dict[str, Any] = {"context_length": 8, "n_layer": 1, "n_head": 1, "n_embd": 2}
        super().__init__(ModelConfig(vocab_size=vocab_size, **sizes))
        self.script = iter(script)
        self.before = lambda: None
        self.lm_head = nn.Identity()  # for the features are logits already

    def features(
        self, tokens_BT: Tensor, cache: Cache | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        assert cache is not None
        self.before()
        cache.place(tokens_BT.shape[1])
        return self.next_logits().expand(len(tokens_BT), 1, -1)

    def next_logits(self) -> Tensor:
        logits_V = torch.zeros(self.config.vocab_size)
        logits_V[next(self.script)] = 10.0
        return logits_V


def generated_together(
    model: GPT, prompts: list[list[int]], indices: list[int], **settings: Any
) -> list[list[int]]:
    """The tokens of texts that grow in one batch."""
    tokenizer = settings.pop("tokenizer", LETTERS)
    config = SampleConfig(**settings)
    samples = [
        Sample("", prompt, index, tokenizer, config.stop)
        for prompt, index in zip(prompts, indices, strict=True)
    ]
    for _ in grow_samples(model, samples, config):
        pass
    return [one.tokens for one in samples]


def generated(model: GPT, prompt: list[int], index: int = 0, **settings: Any) -> list[int]:
    return generated_together(model, [prompt], [index], **settings)[0]


def of_one(logits_V: Tensor, config: SampleConfig) -> Tensor:
    return distribution(logits_V[None], config)[0]


# --- The distribution -----------------------------------------------------------------------------


def reference(logits_V: np.ndarray, config: SampleConfig) -> np.ndarray:
    """The same by lists of tokens, from the likeliest on."""
    weights_V = np.exp((logits_V - logits_V.max()) / config.temperature)
    kept = sorted(range(len(logits_V)), key=lambda token: -weights_V[token])
    if config.top_k:
        kept = kept[: config.top_k]
    total, so_far, nucleus = sum(weights_V[kept]), 0.0, []
    for token in kept:
        nucleus.append(token)
        so_far += weights_V[token] / total
        if so_far >= config.top_p < 1:
            break
    kept = [token for token in nucleus if weights_V[token] >= config.min_p * weights_V.max()]
    probabilities_V = np.zeros(len(logits_V))
    probabilities_V[kept] = weights_V[kept] / sum(weights_V[kept])
    return probabilities_V


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.01},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"min_p": 0.4},
        {"min_p": 1.0},
        {"top_k": 10, "top_p": 0.8},
        {"top_k": 10, "min_p": 0.2},
        {"top_p": 0.8, "min_p": 0.2},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_the_distribution_is_the_one_computed_with_numpy(settings: Any):
    config = SampleConfig(**settings)
    rng = np.random.default_rng(0)
    for V in (2, 7, 60):
        for _ in range(40):
            logits_V = rng.normal(scale=2, size=V).astype(np.float32)
            found_V = of_one(torch.from_numpy(logits_V), config).numpy()
            expected_V = reference(logits_V.astype(np.float64), config)
            assert (found_V[expected_V == 0] == 0).all()
            np.testing.assert_allclose(found_V, expected_V, rtol=2e-4, atol=1e-7)


def test_equal_logits_at_the_edge_of_k_all_stay():
    probabilities_V = of_one(torch.tensor([3.0, 1.0, 3.0, 3.0]), SampleConfig(top_k=2))
    expected_V = torch.tensor([1.0, 0.0, 1.0, 1.0]) / 3
    torch.testing.assert_close(probabilities_V, expected_V, check_dtype=False)


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 1e30])
def test_no_temperature_is_too_low_or_too_high_to_draw_with(temperature: float):
    config = SampleConfig(temperature=temperature)
    probabilities_V = of_one(torch.tensor([-50.0, 80.0, 79.0]), config)
    likeliest = 1.0 if temperature < 1 else 1 / 3
    assert probabilities_V[1].item() == pytest.approx(likeliest)


def test_the_likeliest_token_is_never_cut():
    cuts = (
        SampleConfig(top_k=1),
        SampleConfig(top_p=1e-9),
        SampleConfig(min_p=1.0),
        SampleConfig(temperature=1e-4),
    )
    for config in cuts:
        probabilities_V = of_one(torch.tensor([0.1, 5.0, -2.0]), config)
        assert probabilities_V.tolist() == [0, 1, 0]


def test_tokens_are_drawn_as_often_as_the_distribution_says():
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -1.5, -9.0, -9.0])
    model, n = Scripted([], vocab_size=V), 4000
    model.next_logits = lambda: logits_V
    settings: dict[str, Any] = {"temperature": 1.5, "top_k": 6}
    texts = generated_together(model, [[0]] * 20, list(range(20)), max_new_tokens=200, **settings)
    counts_V = np.bincount(np.array(texts).flatten(), minlength=V)
    expected_V = n * reference(logits_V.numpy().astype(float), SampleConfig(**settings))
    assert counts_V[6:].sum() == 0
    chi_square = ((counts_V - expected_V)[:6] ** 2 / expected_V[:6]).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: once in a thousand


@pytest.mark.parametrize(("penalty", "fewest"), [(1.0, 1), (9.0, 6)])
@torch.no_grad()
def test_temperature_zero_takes_the_likeliest_token_after_the_penalty_of_those_so_far(
    penalty: float, fewest: int
):
    model = randomised()
    text = [1, 2]
    settings: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": penalty}
    for token in generated(model, [1, 2], max_new_tokens=10, **settings):
        logits_V = model(torch.tensor([text]))[0, -1]
        for seen in set(text):
            logits_V[seen] *= 1 / penalty if logits_V[seen] > 0 else penalty
        assert token == logits_V.argmax()
        text.append(token)
    assert len(set(text)) >= fewest  # unlike tokens: so the penalty counts those that were drawn


# --- Samples --------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_seed_and_index():
    model, settings = randomised(), {"temperature": 1.0, "max_new_tokens": 30}
    cases = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 7)]
    samples = [generated(model, [1], index, seed=seed, **settings) for seed, index in cases]
    assert samples == [generated(model, [1], index, seed=seed, **settings) for seed, index in cases]
    assert len(set(map(tuple, samples))) == len(cases)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The texts that were printed, without the lines that number them."""
    return [text.split("\n", 1)[1] for text in capsys.readouterr().out.split("--- sample ")[1:]]


@pytest.mark.parametrize("num_samples", [0, 1, 3])
def test_each_sample_is_the_same_whatever_their_number(
    num_samples: int, capsys: pytest.CaptureFixture[str]
):
    model, config = randomised(), SampleConfig(max_new_tokens=20, num_samples=num_samples)
    write_samples(Trained(model, LETTERS, False, 0), ["b"], config)
    expected = [generated(model, [1], i, max_new_tokens=20) for i in range(num_samples)]
    assert shown(capsys) == ["b" + LETTERS.decode(tokens) + "\n" for tokens in expected]


def test_generation_stops_at_the_end_of_a_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.end_of_text == 256
    model = Scripted([104, 105, 256, 104])
    assert generated(model, [0], tokenizer=tokenizer, temperature=0.0) == [104, 105]


def test_no_more_tokens_come_than_were_asked_for():
    for n in (0, 1, 40):
        assert len(generated(randomised(), [1], max_new_tokens=n)) == n


def test_tokens_outside_the_vocabulary_are_never_produced():
    padded = Scripted([V] * 500)
    assert set(generated(padded, [0], temperature=2.0, max_new_tokens=500)) <= set(range(V))
    likely_padding = randomised(vocab_size=10 * V)
    assert max(generated(likely_padding, [0], temperature=9.0, max_new_tokens=200)) < V
    assert max(generated(likely_padding, [0], temperature=0.0, max_new_tokens=20)) < V


# --- The cache ------------------------------------------------------------------------------------


def greedy_without_cache(model: GPT, prompt: list[int], n: int) -> list[int]:
    """Recompute everything for each token.

    Learned positions: when the context is full, its latest half goes on. Rotary ones: all of the
    text, in which each position sees the latest context_length.
    """
    limit, text = model.config.context_length, list(prompt)
    first = max(0, len(prompt) - limit)
    for _ in range(n):
        if len(text) - first > limit and not model.config.is_modern:
            first = len(text) - limit // 2
        logits_BTV = model(torch.tensor([text[first:]]))
        text.append(int(logits_BTV[0, -1].argmax()))
    return text[len(prompt) :]


@both_architectures
@pytest.mark.parametrize("length", [1, 11, 12, 13, 40])
def test_text_is_what_a_model_without_a_cache_writes_past_the_context_too(
    architecture: str, length: int, monkeypatch: pytest.MonkeyPatch
):
    model, rng = randomised(architecture), np.random.default_rng(length)
    prompt = rng.integers(V, size=length).tolist()
    tokens = generated(model, prompt, temperature=0.0, max_new_tokens=30)
    if architecture == "modern":  # a window over any length, by a band in the mask
        size = model.config.context_length
        monkeypatch.setattr(model_file, "causal_mask", partial(banded_mask, size))
        peer = GPT(replace(model.config, context_length=100)).eval()
        peer.load_state_dict(model.state_dict())
        prompt, model = prompt[-size:], peer
    assert tokens == greedy_without_cache(model, prompt, 30)
    assert len(set(tokens)) > 1


def banded_mask(width: int, T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, T): -∞ but for the latest `width` positions of each."""
    may_see_TT = torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - width)
    return torch.zeros(T, T, dtype=dtype, device=device).masked_fill(~may_see_TT, -math.inf)


def passes_of(model: GPT, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tokens that a model will be given, pass after pass."""
    passes: list[tuple[int, ...]] = []
    features = model.features

    def counted(tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        passes.append(tuple(tokens_BT.shape))
        return features(tokens_BT, cache)

    monkeypatch.setattr(model, "features", counted)
    return passes


@pytest.fixture
def static(graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU decode as a GPU does."""
    monkeypatch.setattr(Decoder, "is_static", True)


@both_architectures
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("longest", [9, 30])  # of a context of 12
def test_each_text_of_a_batch_is_the_one_that_it_would_be_alone(
    architecture: str, is_static: bool, longest: int, request: pytest.FixtureRequest
):
    model, rng = randomised(architecture), np.random.default_rng(1)
    prompts = [rng.integers(V, size=n).tolist() for n in (3, 12, 1, 9, 30)]
    prompts, indices = [*prompts, prompts[0]], [0, 0, 3, 1, 0, 7]
    settings: dict[str, Any] = {"max_new_tokens": 25, "repetition_penalty": 1.2}
    prompts, indices = (prompts, indices) if longest == 30 else (prompts[2:4], indices[2:4])
    pairs = list(zip(prompts, indices, strict=True))
    alone = [generated(model, prompt, index, **settings) for prompt, index in pairs]
    if is_static:
        request.getfixturevalue("static")
    assert generated_together(model, prompts, indices, **settings) == alone
    assert len(set(map(tuple, alone))) >= len(alone) / 2


@both_architectures
@pytest.mark.parametrize("in_few_calls", [False, True])
@pytest.mark.usefixtures("static")
@torch.inference_mode()
def test_a_step_is_captured_once_and_repeated_while_the_host_counts_what_the_device_does(
    architecture: str, in_few_calls: bool, monkeypatch: pytest.MonkeyPatch
):
    model, same = randomised(architecture), randomised(architecture)
    if in_few_calls:
        use_steps(model)
    passes = passes_of(model, monkeypatch)
    decoder = Decoder(model, [[1, 2, 3]] * 2, max_new_tokens=9)
    decoder.read()
    tokens_BT = torch.tensor([[1, 2, 3]] * 2)
    for _ in range(9):
        logits_BV = decoder.feed(torch.tensor([1, 2]))
        tokens_BT = torch.cat((tokens_BT, torch.tensor([[1], [2]])), dim=1)
        assert decoder.cache.length == int(decoder.cache.end) == tokens_BT.shape[1]
        torch.testing.assert_close(logits_BV, same(tokens_BT)[:, -1], rtol=1e-4, atol=1e-4)
    assert passes == [(1, 3), *[(2, 1)] * 4]  # three to warm up, and the one that is recorded


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_prompt_is_read_once_for_all_of_its_samples_and_nothing_after_the_last_token(
    monkeypatch: pytest.MonkeyPatch, ahead: int
):
    model = randomised()
    monkeypatch.setattr(sample, "read_steps", lambda draws, _: read_steps(draws, ahead))
    passes = passes_of(model, monkeypatch)
    generated_together(model, [[1, 2, 3]] * 5, list(range(5)), max_new_tokens=3)
    assert passes == [(1, 3), (5, 1), (5, 1)]


def test_no_prompt_is_read_for_no_tokens(monkeypatch: pytest.MonkeyPatch):
    model = randomised()
    passes = passes_of(model, monkeypatch)
    assert generated(model, [1, 2, 3], max_new_tokens=0) == []
    assert passes == []


def test_samples_that_have_all_ended_are_not_continued(monkeypatch: pytest.MonkeyPatch):
    model = Scripted([104, 256, 105])
    passes = passes_of(model, monkeypatch)
    assert generated(model, [0], tokenizer=ByteTokenizer(), temperature=0.0) == [104]
    assert passes == [(1, 1), (1, 1)]


@both_architectures
@torch.inference_mode()
def test_a_decoder_does_not_keep_all_the_tokens_that_it_was_fed(architecture: str):
    model = randomised(architecture)
    decoder = Decoder(model, [[1, 2, 3]] * 2, max_new_tokens=100)
    decoder.read()
    kept = []
    for _ in range(100):
        decoder.feed(torch.tensor([1, 2]))
        lists = [value for value in vars(decoder).values() if isinstance(value, list)]
        kept.append(sum(len(one) for one in lists))
    limit = 2 if model.config.is_modern else 2 + model.config.context_length
    assert max(kept) <= limit  # its two prompts, and what a full context must be read from again


@both_architectures
def test_a_context_of_one_token_is_enough_to_go_on(architecture: Any):
    sizes: dict[str, Any] = {"context_length": 1, "n_layer": 1, "n_head": 1, "n_embd": 4}
    model = GPT(ModelConfig(architecture=architecture, vocab_size=V, **sizes)).eval()
    assert len(generated(model, [1, 2], max_new_tokens=5)) == 5


# --- A step ahead ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (0, "ask 1, read 1, ask 2, read 2, ask 3, read 3"),
        (1, "ask 1, ask 2, read 1, ask 3, read 2, read 3"),
    ],
)
def test_one_step_ahead_means_that_the_next_is_asked_for_before_one_is_read(
    monkeypatch: pytest.MonkeyPatch, ahead: int, expected: str
):
    events: list[str] = []

    class Noted(HostCopy):
        def read(self) -> Tensor:
            events.append(f"read {int(self.copy)}")
            return self.copy

    def draws() -> Iterator[Drawn]:
        for n in (1, 2, 3):
            events.append(f"ask {n}")
            yield Drawn(torch.tensor([n]))

    monkeypatch.setattr("sampling.output.HostCopy", Noted)
    steps = list(read_steps(draws(), ahead))
    assert [[step.token for step in rows] for rows in steps] == [[1], [2], [3]]
    assert ", ".join(events) == expected


@pytest.mark.parametrize(("is_cuda", "expected"), [(False, 0), (True, 1)])
def test_a_gpu_is_one_step_ahead_of_what_is_read(
    monkeypatch: pytest.MonkeyPatch, is_cuda: bool, expected: int
):
    asked: list[int] = []

    def noted(_draws: object, ahead: int) -> Iterator[Any]:
        asked.append(ahead)
        return iter(())

    monkeypatch.setattr(sample, "generate", lambda *_: iter(()))
    monkeypatch.setattr(sample, "read_steps", noted)
    model: Any = SimpleNamespace(wte=SimpleNamespace(weight=SimpleNamespace(is_cuda=is_cuda)))
    deque(grow_samples(model, [Sample("", [0], 0, LETTERS)], SampleConfig()))
    assert asked == [expected]


# --- Streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["naïve 🙂 日本\n", "é" * 20, "plain"])
def test_the_stream_is_the_text_and_never_breaks_a_character(
    text: str, capsys: pytest.CaptureFixture[str]
):
    tokens, pieces = list(text.encode()), []
    model = Scripted(tokens)
    model.before = lambda: pieces.append(capsys.readouterr().out)
    config = SampleConfig(temperature=0.0, max_new_tokens=len(tokens))
    write_samples(Trained(model, ByteTokenizer(), False, 0), [""], config)
    pieces.append(capsys.readouterr().out)
    assert "".join(pieces[1:]) == text + "\n"
    assert "\ufffd" not in "".join(pieces)
    whole = [bytes(tokens[:n]).decode(errors="ignore") for n in range(len(tokens) + 1)]
    so_far = ["".join(pieces[1 : n + 1]) for n in range(len(tokens) + 1)]
    assert so_far[:-1] == whole[:-1]  # each character is there as soon as it is complete


def test_a_character_that_was_cut_off_is_shown_as_such(capsys: pytest.CaptureFixture[str]):
    config = SampleConfig(temperature=0.0, max_new_tokens=3)
    model = Scripted(list("a🙂".encode()))
    write_samples(Trained(model, ByteTokenizer(), False, 0), [""], config)
    assert shown(capsys) == ["a\ufffd\n"]


# --- Prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "starts_documents", "expected"),
    [
        (ByteTokenizer(), True, [256]),
        (ByteTokenizer(), False, [10]),
        (CharTokenizer("ab\n", with_end_of_text=True), True, [3]),
        (CharTokenizer("ab\n", with_end_of_text=False), False, [0]),
        (CharTokenizer("ab", with_end_of_text=False), False, [0]),
    ],
)
def test_an_empty_prompt_is_what_a_text_starts_with(
    tokenizer: Tokenizer, starts_documents: bool, expected: list[int]
):
    trained = Trained(randomised(), tokenizer, starts_documents, 0)
    assert encode_prompt("", trained) == expected


def test_a_run_knows_that_its_texts_were_separated_if_one_of_them_only_validates(tmp_path: Path):
    (tmp_path / "book.txt").write_text(words(160, "aeionrst"), encoding="utf-8")
    (tmp_path / "note.txt").write_text("a", encoding="utf-8")  # too short to be cut in two
    sources = (str(tmp_path / "book.txt"), str(tmp_path / "note.txt"))
    prepare(PrepareConfig(sources=sources, tokenizer="byte", out=tmp_path / "data"))
    (tmp_path / "tiny.toml").write_text(TINY.format(dataset=tmp_path / "data"))
    train_here(tmp_path / "tiny.toml", tmp_path / "run", "--max_steps=1")
    assert load_model(tmp_path / "run", "last").starts_documents


def test_a_prompt_that_names_the_end_of_text_is_plain_text():
    trained = Trained(randomised(), ByteTokenizer(), True, 0)
    assert encode_prompt("<|endoftext|>", trained) == list(b"<|endoftext|>")


# --- The script -----------------------------------------------------------------------------------

Script = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run, whose dataset is no longer there."""
    folder = tmp_path_factory.mktemp("trained")
    train_here(write_tiny(folder), folder / "run", "--max_steps=2")
    shutil.rmtree(folder / "char")
    return folder / "run"


@pytest.fixture
def script(trained: Path, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run sample.py on the trained model; return its exit code, output and error.

    Its dataset is gone, which every run says; `test_fastest.py` has more.
    """

    def run(*flags: object) -> tuple[int, str, str]:
        settings = (f"--out_dir={trained}", "--max_new_tokens=20", *flags)
        code = run_here(sample.main, "sample.py", *settings)
        said = capsys.readouterr()
        lines = said.err.splitlines(keepends=True)
        return code, said.out, "".join(line for line in lines if not line.startswith(NOT_TRIED))

    capsys.readouterr()  # what training printed
    return run


def test_sampling_needs_the_folder_of_the_run_alone(script: Script):
    code, text, error = script()
    assert (code, error) == (0, "")
    assert text.startswith("--- sample 1 of 1 (seed 1337)\n")
    assert len(text.splitlines(keepends=True)) > 1


def test_the_same_command_writes_the_same_text_and_another_seed_another(script: Script):
    flags = ("--num_samples=3", "--temperature=1.0")
    assert script(*flags) == script(*flags)
    texts = [script(*flags, f"--seed={seed}")[1].split("\n", 1)[1] for seed in (1, 2)]
    assert texts[0] != texts[1]


def test_a_prompt_file_keeps_its_line_ends(tmp_path: Path):
    (tmp_path / "prompt.txt").write_bytes(b"one\r\ntwo")
    assert read_text(tmp_path / "prompt.txt") == "one\r\ntwo"


@pytest.mark.parametrize("name", ["best", "last"])
def test_either_checkpoint_can_be_sampled(script: Script, name: str):
    assert script(f"--checkpoint={name}")[0] == 0


def test_a_checkpoint_of_format_1_is_sampled_as_one_of_today(
    script: Script, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its config of the model also named the kernel of attention."""
    state = checkpoint.load(trained, "best")
    state["model_config"]["attention"] = "fused"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 1)
        checkpoint.save(tmp_path, state, ["best"])
    written = torch.load(next(tmp_path.glob("*.pt")), weights_only=True)
    assert (written["format"], written["model_config"]["attention"]) == (1, "fused")
    assert script(f"--out_dir={tmp_path}") == script()
    old, new = load_model(tmp_path, device="cpu"), load_model(trained, device="cpu")
    assert old.model.config == new.model.config
    assert old[2:] == new[2:] == (False, 2)


def test_a_byte_order_mark_is_no_part_of_a_text(script: Script, tmp_path: Path):
    path = tmp_path / "text.txt"
    for flag in ("prompt_file", "score", "prompts"):
        path.write_text("nor a…é mor", encoding="utf-8")
        without = script(f"--{flag}={path}")
        path.write_text("\ufeffnor a…é mor", encoding="utf-8")
        assert script(f"--{flag}={path}") == without
        assert without[0] == 0
    path.write_text("\ufeff", encoding="utf-8")
    assert "is empty, so there is nothing to continue" in script(f"--prompt_file={path}")[2]


def test_a_prompt_is_shown_and_continued_from_the_command_line_or_a_file(
    script: Script, tmp_path: Path
):
    (tmp_path / "prompt.txt").write_text("aé…", encoding="utf-8")
    code, text, _ = script("--prompt=aé…")
    assert code == 0
    assert text.split("\n", 1)[1].startswith("aé…")
    assert script(f"--prompt_file={tmp_path / 'prompt.txt'}") == (code, text, "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature=-1"], "temperature must be at least 0: got -1.0"),
        (["--temperature=nan"], "temperature must be at least 0: got nan"),
        (["--top_k=-1"], "top_k must be at least 0: got -1"),
        (["--top_p=0"], "top_p must be in (0, 1]: got 0.0"),
        (["--top_p=1.5"], "top_p must be in (0, 1]: got 1.5"),
        (["--min_p=-0.1"], "min_p must be in [0, 1]: got -0.1"),
        (["--min_p=1.1"], "min_p must be in [0, 1]: got 1.1"),
        (["--num_samples=-1"], "num_samples must be at least 0: got -1"),
        (["--max_new_tokens=-1"], "max_new_tokens must be at least 0: got -1"),
        (["--batch_size=0"], "batch_size must be at least 1: got 0"),
        (["--show_top=-1"], "show_top must be at least 0: got -1"),
        (["--score_stride=0"], "score_stride must be at least 1: got 0"),
        (["--repetition_penalty=0"], "repetition_penalty must be 0.001 to 1000: got 0.0"),
        (["--output=a", "--show_top=3"], "keeps the texts of prompts: give it without show_top"),
        (["--output=a", "--interactive"], "of prompts: give it without interactive"),
        (["--output=a", "--score=b"], "of prompts: give it without score"),
        (["--stop", ""], "a stop string must not be empty: it would stop at once"),
        (
            ["--precision=int4"],
            "Expected one of ('auto', 'float32', 'float16', 'bfloat16', 'int8')",
        ),
        (["--interactive", "--prompts=a.txt"], "got prompts and interactive"),
        (["--seed=-1"], "seed must be at least 0: got -1"),
        (["--prompt=a", "--prompt_file=b"], "interactive, score: got prompt and prompt_file"),
        (["--checkpoint=first"], "Expected one of ('best', 'last')"),
        (
            ["--temprature=1"],
            "Unrecognized options: --temprature=1 Perhaps you meant: --temperature",
        ),
    ],
)
def test_a_bad_flag_is_refused_in_a_box_with_the_rule_and_the_value(
    script: Script, flags: list[str], message: str
):
    code, text, error = script(*flags)
    assert (code, text) == (2, "")
    assert error.startswith("╭")
    assert message in without_box(error)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=a\udcff"], "a prompt must be Unicode text, without half a character: got"),
        (["--score=nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--prompt_file=nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--prompt=aXbY"], "the character vocabulary lacks 'X', 'Y', 'b': use the characters"),
        (["--out_dir=nowhere"], "nowhere holds no checkpoint: train one with `python train.py"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(
    script: Script, flags: list[str], message: str
):
    code, text, error = script(*flags)
    assert (code, text) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_prompt_file_that_is_not_text_is_refused_by_name(script: Script, tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    code, text, error = script(f"--prompt_file={tmp_path / 'picture.png'}")
    assert (code, text) == (2, "")
    assert error.startswith(f"error: {tmp_path / 'picture.png'} is not UTF-8 text: ")


def test_a_reader_that_has_seen_enough_ends_sampling_quietly(trained: Path):
    command = f'"{sys.executable}" sample.py --out_dir="{trained}" --max_new_tokens=100000'
    said = subprocess.run(
        ["bash", "-c", f'{command} | head -2 | wc -l; echo "${{PIPESTATUS[0]}}"'],
        capture_output=True,
        cwd=REPOSITORY,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert said.stdout.split() == ["2", "0"]
    assert said.stderr.startswith(NOT_TRIED)
    assert said.stderr.count("\n") == 1


def test_standard_input_is_a_prompt_where_a_dash_names_it(
    script: Script, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("aé…".encode())))
    assert script("--prompt_file=-") == script("--prompt=aé…")


def test_each_line_of_a_file_is_continued_as_it_would_be_alone(script: Script, tmp_path: Path):
    prompts = ["aé", "…", "nor a", "aé"]
    (tmp_path / "lines.txt").write_text("aé\n\n…\nnor a\naé\n", encoding="utf-8")
    lines = "".join(
        json.dumps({"text" if n else "prompt": p}) + "\n" for n, p in enumerate(prompts)
    )
    (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8")
    alone = [script(f"--prompt={p}", "--num_samples=2")[1].split("--- ")[1:] for p in prompts]
    for name in ("lines.txt", "lines.jsonl"):
        for batch_size in (3, 100):
            flags = (
                f"--prompts={tmp_path / name}",
                "--num_samples=2",
                f"--batch_size={batch_size}",
            )
            together = script(*flags)[1].split("--- ")[1:]
            texts = [text.split("\n", 1)[1] for text in together]
            assert texts == [text.split("\n", 1)[1] for pair in alone for text in pair]
            assert together[2].startswith("prompt 2 of 4, sample 1 of 2 (seed 1337)\n…")


def test_a_file_of_samples_holds_texts_tokens_and_their_probabilities(
    script: Script, trained: Path, tmp_path: Path
):
    out = tmp_path / "samples.jsonl"
    flags = ("--prompt=aé", "--num_samples=3", "--temperature=1.5", "--top_k=4", "--stop", "l")
    code, said, _ = script(*flags, f"--output={out}")
    assert (code, said) == (0, f"written to {out}: 3 texts\n")
    model, tokenizer, *_ = load_model(trained, device="cpu")
    model.requires_grad_(False)
    printed = script(*flags)[1].split("--- sample ")[1:]
    for n, line in enumerate(out.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        assert (record["prompt"], record["sample"]) == ("aé", n)
        assert printed[n].split("\n", 1)[1] == "aé" + record["text"] + "\n"
        stopped = record["finish_reason"] == "stop"
        assert tokenizer.decode(record["token_ids"]) == record["text"] + ("l" if stopped else "")
        assert stopped or (record["finish_reason"], len(record["token_ids"])) == ("length", 20)
        text = tokenizer.encode("aé") + record["token_ids"]
        log_p_TV = [
            model(torch.tensor([text[:end][-16:]]))[0, -1].log_softmax(-1)
            for end in range(2, len(text))
        ]
        if len(text) <= 16:  # as long as nothing has left the context
            expected = [float(log_p_V[t]) for log_p_V, t in zip(log_p_TV, text[2:], strict=True)]
            assert record["log_probabilities"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_samples_of_a_smaller_precision_find_their_tokens_nearly_as_likely(
    script: Script, tmp_path: Path, precision: Any
):
    if precision not in available(torch.device("cpu")):
        pytest.skip(f"this processor has no {precision}")
    found = []
    for kind in ("float32", precision):
        out = tmp_path / f"{kind}.jsonl"
        assert script(f"--output={out}", f"--precision={kind}")[0] == 0
        found.append(json.loads(out.read_text(encoding="utf-8"))["log_probabilities"])
    assert found[1] == pytest.approx(found[0], abs=0.05)
    assert found[1] != found[0]


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(
    script: Script, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path, "is not a file"), (tmp_path / "file/a.jsonl", "(File exists)")):
        code, text, error = script(f"--output={path}")
        assert (code, text) == (2, "")
        assert f"{path} cannot be written" in error
        assert why in error


def test_an_error_while_samples_are_written_leaves_the_old_file_whole(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "samples.jsonl"
    out.write_text("old\n")

    def broken(*_: object) -> str:
        raise ValueError("broken")

    monkeypatch.setattr(Sample, "feed", broken)
    assert script(f"--output={out}")[0] == 2
    assert (out.read_text(), list(tmp_path.iterdir())) == ("old\n", [out])


@pytest.mark.parametrize("n_steps", [0, 12])
def test_ctrl_c_keeps_what_was_finished_and_else_the_old_file(
    script: Script, tmp_path: Path, n_steps: int, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "samples.jsonl"
    out.write_text("old\n")
    feed, calls = Sample.feed, []

    def interrupted(self: Sample, *step: Any) -> str:
        calls.append(self.index)
        if len(calls) > n_steps:
            raise KeyboardInterrupt
        return self.finish("stop") if calls.count(1) == 3 and self.index == 1 else feed(self, *step)

    monkeypatch.setattr(Sample, "feed", interrupted)
    script(f"--output={out}", "--num_samples=3")
    if n_steps:
        assert [json.loads(line)["sample"] for line in out.read_text().splitlines()] == [1]
    else:
        assert out.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [out]


def test_a_model_whose_numbers_are_none_is_refused():
    model = randomised()
    nn.init.constant_(model.get_parameter("ln_f.weight"), math.nan)
    with pytest.raises(ValueError, match="the model's logits must be finite"):
        generated(model, [1], max_new_tokens=1)


def test_the_top_tokens_are_shown_with_the_models_own_probabilities(script: Script, trained: Path):
    flags = ("--prompt=aé", "--show_top=3", "--max_new_tokens=4", "--temperature=0")
    lines = script(*flags)[1].splitlines()[1:]
    model, tokenizer, *_ = load_model(trained, device="cpu")
    model.requires_grad_(False)
    text = tokenizer.encode("aé")
    lines[0] = lines[0].removeprefix("aé")
    for line in lines[:4]:
        p_V = model(torch.tensor([text]))[0, -1].softmax(-1)
        top = p_V.topk(3)
        shown = [
            f'"{tokenizer.decode([t])}" {p:.1%}'
            for t, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        assert line.split(" | ")[1].replace("\\n", "\n") == "  ".join(shown)
        assert line.startswith(f"{float(top.values[0]):6.1%} ")
        text.append(int(top.indices[0]))


class Typing:
    """Lines as if typed; an exception is raised instead of a line."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = iter(lines)

    def __call__(self, prompt: str) -> str:
        line = next(self.lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def test_a_session_goes_on_with_all_that_was_typed_and_said(
    script: Script, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("builtins.input", Typing("aé", "X", KeyboardInterrupt, "nor"))
    code, said, _ = script("--interactive", "--max_new_tokens=5", "--temperature=0")
    assert code == 0
    first = script("--prompt=aé", "--max_new_tokens=5", "--temperature=0")[1].split("\n", 1)[1][:-1]
    second = script(f"--prompt={first}\nnor", "--max_new_tokens=5", "--temperature=0")[1]
    answers = [first.removeprefix("aé"), second.split("\n", 1)[1].removeprefix(f"{first}\nnor")]
    assert said.startswith(answers[0] + "\nerror: the character vocabulary lacks 'X'")
    assert said.endswith("\n" + answers[1] + "\n")


@pytest.mark.parametrize(
    ("letters", "joint"), [("abcdefg\n", "\n"), ("abcdefg ", " "), ("abcdefgh", "")]
)
def test_a_second_line_is_taken_whatever_the_vocabulary_lacks(
    letters: str,
    joint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    asked: list[str] = []

    def noted(model: GPT, samples: list[Sample], *rest: Any) -> Iterator[tuple[int, str]]:
        asked.append(samples[0].prompt)
        return grow_samples(model, samples, *rest)

    monkeypatch.setattr("builtins.input", Typing("a", "b"))
    monkeypatch.setattr(sample, "grow_samples", noted)
    tokenizer = CharTokenizer(letters, with_end_of_text=False)
    sample.talk(Trained(randomised(), tokenizer, False, 0), SampleConfig(max_new_tokens=2))
    said = capsys.readouterr().out
    assert asked == ["a", f"a{said[:2]}{joint}b"]
    assert "error" not in said


def test_ctrl_c_ends_an_answer_and_not_the_session(script: Script, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("builtins.input", Typing("aé", "nor"))
    feed, calls = Sample.feed, []

    def interrupted(self: Sample, *step: Any) -> str:
        calls.append(self.index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return feed(self, *step)

    monkeypatch.setattr(Sample, "feed", interrupted)
    assert script("--interactive", "--max_new_tokens=5")[0] == 0
    assert calls == [0, 0, 0, 1, 1, 1, 1, 1]


def test_a_text_is_scored_with_loss_perplexity_and_bits_per_byte(
    script: Script, trained: Path, tmp_path: Path
):
    text = "nor a…é mor"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    model, tokenizer, *_ = load_model(trained, device="cpu")
    tokens_T = torch.tensor(tokenizer.encode(text))
    with torch.no_grad():
        log_p_TV = model(tokens_T[None, :-1])[0].log_softmax(-1)
    loss = float(F.nll_loss(log_p_TV, tokens_T[1:]))
    bits = loss * 10 / math.log(2) / (len(text.encode()) - 1)
    code, said, _ = script(f"--score={tmp_path / 'text.txt'}")
    assert code == 0
    expected = (
        f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.4g}, {bits:.4f} bits per byte"
    )
    assert said == f"{tmp_path / 'text.txt'}: 10 tokens, 13 bytes: {expected}\n"
