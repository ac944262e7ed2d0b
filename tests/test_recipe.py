"""The dial: what follows from the size of the model and of the dataset."""

import math
from typing import Any

import pytest
import torch

from engine.optim import OptimConfig
from engine.parallel import World
from engine.recipe import best_batch, complete, plan
from model import GPT, ModelConfig
from train import TrainConfig

GPT2 = {"n_parameters": 124_439_808, "n_tokens": 10**12, "context_length": 1024}


def test_gpt2_124m_is_trained_on_20_tokens_per_parameter_in_batches_of_nanochats_size():
    found = plan(**GPT2)
    assert found.batch_size * 1024 == 2**19
    assert found.max_steps * 2**19 == pytest.approx(20 * 124_439_808, rel=1e-3)
    assert found.rate_scale == pytest.approx(1, abs=0.01)


def test_a_small_dataset_is_seen_four_times():
    found = plan(10_000_000, 1_000_000, 256)
    assert found.max_steps * found.batch_size * 256 == pytest.approx(4_000_000, rel=0.01)


def test_the_best_batch_is_that_of_our_own_runs():
    assert best_batch(180 * 12 * 64) == pytest.approx(768, rel=0.05)
    assert best_batch(400 * 16 * 256) == pytest.approx(4096, rel=0.1)


@pytest.mark.parametrize("max_steps", [10, 180, 400, 10_000])
def test_given_steps_the_batch_is_the_best_for_the_tokens_that_follow(max_steps: int):
    found = plan(**GPT2, max_steps=max_steps)
    n_tokens = max_steps * found.batch_size * 1024
    exact = best_batch(n_tokens) / 1024
    assert found.max_steps == max_steps
    assert found.batch_size == 1 or abs(math.log2(found.batch_size / exact)) < 0.7


def test_given_a_batch_the_steps_use_up_the_tokens_and_the_rates_follow_its_root():
    twice, plain = plan(**GPT2, batch_size=1024), plan(**GPT2)
    assert twice.max_steps == pytest.approx(plain.max_steps / 2, rel=0.01)
    assert twice.rate_scale == pytest.approx(plain.rate_scale * math.sqrt(2))


def test_what_is_given_stays():
    found = plan(**GPT2, max_steps=7, batch_size=3)
    assert (found.max_steps, found.batch_size) == (7, 3)


def completed(n_processes: int = 1, **asked: Any) -> TrainConfig:
    """The config of a run of 10,000 tokens of a vocabulary of 50, on so many processes."""
    config = ModelConfig(vocab_size=50, n_layer=1, context_length=16)
    world = World(torch.device("cpu"), size=n_processes)
    return complete(TrainConfig(**asked), GPT(config), 10_000, world)


def test_a_completed_config_has_a_number_or_a_name_for_each_0_and_auto():
    config = completed()
    sizes: Any = {"n_embd": 64, "n_head": 1, "n_kv_head": 1, "head_dim": 64, "n_inner": 256}
    assert config.model == ModelConfig(vocab_size=50, n_layer=1, context_length=16, **sizes)
    n_parameters = 12 * 64**2 + 13 * 64 + 2 * 64 + (50 + 16) * 64
    found = plan(n_parameters, 10_000, 16)
    assert (config.max_steps, config.batch_size) == (found.max_steps, found.batch_size)
    assert config.micro_batch_size == config.batch_size
    assert config.optim == OptimConfig().with_rates(found.rate_scale)
    assert config.precision in ("float32", "bfloat16")
    assert config.eval_tokens == config.keep_every == 0  # where 0 has a meaning of its own


def test_a_completed_config_stays_as_it_is():
    config = completed()
    assert complete(config, GPT(config.model), 10_000, World(torch.device("cpu"))) == config


@pytest.mark.parametrize(("asked", "size"), [(0, 2), (1, 1), (2, 2), (3, 2)])
def test_a_micro_batch_is_at_most_what_a_process_has_of_a_batch(asked: int, size: int):
    config = completed(n_processes=4, batch_size=8, micro_batch_size=asked)
    assert (config.batch_size, config.micro_batch_size) == (8, size)
