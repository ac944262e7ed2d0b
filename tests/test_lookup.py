"""Guesses from the text itself, and a conversation that keeps what it has read."""

from typing import Any

import numpy as np
import pytest
import torch

from data.tokenizer import CharTokenizer
from model import GPT
from sample import SampleConfig, generate, grow_samples
from sampling.converse import Conversation
from sampling.decode import Decoder, equal_start
from sampling.lookup import LONGEST_REST, Guesser, generate_by_lookup
from sampling.output import Sample
from test_sample import V, both_architectures, passes_of, randomised

LETTERS = CharTokenizer("abcdefgh", with_end_of_text=False)


def exact(architecture: str, **changes: Any) -> GPT:
    """A model in float64, where rounding decides about no token."""
    return randomised(architecture, context_length=40, **changes).double()


def written(write: Any, model: GPT, prompt: list[int], index: int, **settings: Any) -> list[int]:
    choice = SampleConfig(**settings)
    draws = write(model, [prompt], [(3, index)], 60, model.config.vocab_size, choice, top=2)
    return [int(drawn.tokens_B) for drawn in draws][:60]


# --- Guesses --------------------------------------------------------------------------------------


@both_architectures
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.5, "repetition_penalty": 1.3},
    ],
)
def test_text_is_the_same_with_guesses_for_every_seed(architecture: str, settings: Any):
    model, rng = exact(architecture, vocab_size=100), np.random.default_rng(0)
    for index in range(4):
        once = rng.integers(100, size=5).tolist()
        prompt = once * 2 if index % 2 else once
        plain = written(generate, model, prompt, index, **settings)
        assert written(generate_by_lookup, model, prompt, index, **settings) == plain
        assert len(plain) == 60  # of a context of 40


def test_log_probabilities_are_those_of_each_position():
    model, prompt = exact("modern"), [1, 2, 3, 1, 2, 3]
    both = [
        list(write(model, [prompt], [(1, 0)], 20, V, SampleConfig(temperature=0.0), top=3))[:20]
        for write in (generate, generate_by_lookup)
    ]
    for plain, guessed in zip(*both, strict=True):
        for a, b in zip(plain, guessed, strict=True):
            torch.testing.assert_close(a, b)


def test_a_text_that_repeats_itself_takes_fewer_passes(monkeypatch: pytest.MonkeyPatch):
    model = exact("modern")
    passes = passes_of(model, monkeypatch)
    plain = written(generate, model, [1, 2], 0, temperature=0.0)
    n_plain = len(passes)
    assert written(generate_by_lookup, model, [1, 2], 0, temperature=0.0) == plain
    n_guessed = len(passes) - n_plain
    assert plain[-12:-6] == plain[-6:] or len(set(plain[-12:])) < 6  # greedy text ends in a loop
    assert n_plain >= 60
    assert n_guessed < 0.8 * n_plain


def test_what_followed_a_run_last_time_is_guessed():
    guesser = Guesser([1, 2, 3, 4, 9, 1, 2, 3, 5, 7, 0, 1, 2, 3])
    guesser.n_guesses = 3
    assert guesser.guess(10) == [5, 7, 0]
    assert guesser.guess(2) == [5, 7]
    guesser.add([8, 2, 3])
    assert guesser.guess(10) == []  # 8 2 3 is new, although 2 3 is not


def test_a_guess_beyond_the_end_of_the_text_goes_round():
    guesser = Guesser([5, 1, 2, 1, 2, 1, 2])
    guesser.n_guesses = 5
    assert guesser.guess(5) == [1, 2, 1, 2, 1]


def test_after_wrong_guesses_there_are_ever_longer_rests_and_after_right_ones_none():
    guesser = Guesser([1, 2] * 4)
    rests = []
    for _ in range(8):
        rest = 0
        while not guesser.guess(10):
            rest += 1
        guesser.learn(0)
        rests.append(rest)
    assert rests == [0, 4, 8, 16, 32, LONGEST_REST, LONGEST_REST, LONGEST_REST]
    guesser.rest = 0
    guesser.learn(1)
    assert len(guesser.guess(10)) == 3
    guesser.learn(3)
    assert len(guesser.guess(10)) == 7


def test_no_guess_is_read_beyond_the_context_or_the_last_token(monkeypatch: pytest.MonkeyPatch):
    model = exact("gpt2")
    read: list[int] = []
    features = model.features

    def counted(tokens_BT: Any, cache: Any = None) -> Any:
        read.append(tokens_BT.shape[1])
        return features(tokens_BT, cache)

    monkeypatch.setattr(model, "features", counted)
    draws = generate_by_lookup(model, [[1] * 10], [(0, 0)], 12, V, SampleConfig(temperature=0.0))
    assert len(list(draws)) == 12
    assert sum(read) >= 10 + 11


# --- A conversation -------------------------------------------------------------------------------


def answer(model: GPT, prompt: list[int], decoder: Decoder | None, **settings: Any) -> list[int]:
    config = SampleConfig(max_new_tokens=6, temperature=0.7, **settings)
    sample = Sample("", prompt, 0, LETTERS)
    if isinstance(decoder, Conversation):
        decoder.turn(prompt)
    for _ in grow_samples(model, [sample], config, decoder):
        pass
    return sample.tokens


@both_architectures
@pytest.mark.parametrize("lookup", [False, True])
def test_a_conversation_says_what_reading_all_anew_would(architecture: str, lookup: bool):
    model, rng = exact(architecture), np.random.default_rng(0)
    conversation = Conversation(model)
    text: list[int] = []
    for turn in range(10):  # beyond the context of 40, and then back to how it began
        text = text if turn != 4 else text[:7]
        text = [*text, *rng.integers(V, size=5).tolist()]
        said = answer(model, text, conversation, lookup=lookup)
        assert said == answer(model, text, None)
        text += said
        assert turn != 3 or len(text) - 1 > 40  # from a prompt that had fitted


@both_architectures
def test_a_turn_reads_only_what_is_new(architecture: str, monkeypatch: pytest.MonkeyPatch):
    model = exact(architecture)
    conversation = Conversation(model)
    text = [1, 2, 3, 4, 5]
    text += answer(model, text, conversation)
    passes = passes_of(model, monkeypatch)
    answer(model, [*text, 6, 7], conversation)
    assert passes[0] == (1, 3)  # its last word, which nothing had read, and two more
    assert set(passes[1:]) == {(1, 1)}


@both_architectures
def test_a_pass_that_was_interrupted_is_not_taken_for_read(
    architecture: str, monkeypatch: pytest.MonkeyPatch
):
    model = exact(architecture)
    conversation = Conversation(model)
    calls = []

    def interrupted(*_: Any) -> None:
        calls.append(1)
        if len(calls) in (1, 4):  # the first prompt, and the second token after the next one
            raise KeyboardInterrupt

    hook = model.blocks[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(model, [1, 2, 3], conversation)
    conversation.turn([1, 2, 3, 4])
    sample = Sample("", [1, 2, 3, 4], 0, LETTERS)
    with pytest.raises(KeyboardInterrupt):
        for _ in grow_samples(model, [sample], SampleConfig(), conversation):
            pass
    hook.remove()
    assert len(sample.tokens) == 2
    text = [1, 2, 3, 4, *sample.tokens, 5]
    assert answer(model, text, conversation) == answer(model, text, None)


@pytest.mark.parametrize(
    ("a", "b", "n"),
    [([1, 2, 3], [1, 2, 4, 5], 2), ([], [1], 0), ([1, 2], [1, 2], 2), ([3], [4], 0)],
)
def test_the_equal_start_of_two_texts_is_counted(a: list[int], b: list[int], n: int):
    assert equal_start(a, b) == equal_start(b, a) == n
