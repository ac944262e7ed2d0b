"""The dial: minutes in, sizes out."""

import itertools
import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import cli
import train
from data.loader import Dataset
from engine import checkpoint, dial, recipe
from engine.count import product_weights
from engine.dial import Clock, Planner
from engine.optim import OptimConfig
from engine.parallel import World
from engine.resume import Progress
from engine.trial import Trial, hardness, seconds_per_token, spread
from helpers import losses, outcome, train_here, write_dataset
from model import ModelConfig

PILOT = recipe.Pilot(product_weights=400_000, n_tokens=100_000, loss=2.0, hardness=2.0)
MACHINE = World(torch.device("cpu"))
FALLING = ("--optim.decay=linear", "--optim.decay_fraction=0.6")
FREE = ("--model.n_layer=0", "--model.n_embd=0", "--model.n_head=0", "--model.dropout=0")
UNPLANNED = ("--max_steps=0", "--batch_size=0", "--micro_batch_size=0", "--eval_every=0")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has just started, and ends as soon as it has trained."""
    monkeypatch.setattr(dial, "STARTED_AT", time.perf_counter())
    monkeypatch.setattr(dial, "ENDING_SECONDS", 0.0)
    monkeypatch.setattr("engine.trial.LEAST_PILOT_STEPS", 4)
    monkeypatch.setattr("engine.trial.TIMED_STEPS", 1)


def expected(
    n_weights: float, n_tokens: float, hardness: float = 2.0, n_unique: float = 1e30
) -> float:
    pilot = replace(PILOT, hardness=hardness)
    return recipe.expected_loss(pilot, n_weights, n_tokens, n_unique).item()


def test_a_pilot_is_expected_to_lose_what_it_lost():
    assert expected(400_000, 100_000) == pytest.approx(2.0)


def test_the_expected_loss_falls_with_weights_and_tokens_but_never_below_its_floor():
    assert expected(4e6, 1e5) < 2.0 > expected(4e5, 1e6) > expected(4e6, 1e6)
    assert expected(1e15, 1e18) == pytest.approx(2.0 * (1 - recipe.LAW[0]), rel=0.02)
    assert expected(1e15, 1e18, hardness=0.01) == pytest.approx(0.1, rel=0.2)


def test_the_expected_loss_is_that_of_the_formula():
    a, b, c, alpha, beta = recipe.LAW

    def reducible(n: float, d: float) -> float:
        return c / n**alpha + 1 / d**beta

    share = a + b * math.log(2.0 / 1.5)
    found = 2.0 * (1 - share + share * reducible(3.0, 5.0) / reducible(0.4, 0.1))
    assert expected(3e6, 5e6, hardness=1.5) == pytest.approx(found)


def test_the_easier_a_text_is_for_a_compressor_the_more_a_run_is_expected_to_learn():
    assert expected(4e6, 1e6, 1.0) < expected(4e6, 1e6, 2.0) < expected(4e6, 1e6, 3.0) < 2.0


def test_repeated_tokens_are_worth_less_than_new_ones_and_more_than_none():
    new = expected(4e6, 8e6)
    assert expected(4e6, 8e6, n_unique=8e6) == pytest.approx(new)
    assert new < expected(4e6, 8e6, n_unique=4e6) < expected(4e6, 8e6, n_unique=1e6)
    assert expected(4e6, 8e6, n_unique=1e6) < expected(4e6, 1e6)
    # R* = 1: a text that is repeated for ever is worth 2 of it
    assert expected(4e6, 1e12, n_unique=1e6) == pytest.approx(expected(4e6, 2e6))
    # 1 + R* (1 - exp(-2 / R*)) of it in 3 epochs
    worth = 2 - math.exp(-2)
    assert expected(4e6, 3e6, n_unique=1e6) == pytest.approx(expected(4e6, worth * 1e6))


def test_the_constants_are_those_of_the_fit_in_docs():
    benchmark = pytest.importorskip("benchmarks.dial")
    rows = json.loads(Path("docs/dial.json").read_text(encoding="utf-8"))
    fitted = benchmark.fit([benchmark.Point(**row) for row in rows])
    assert fitted == pytest.approx(recipe.LAW, rel=0.01)


def test_a_text_repeated_often_for_its_length_gets_dropout_and_decay():
    few = recipe.regularisation(n_weights=600, n_tokens=4500, n_unique=1000, bytes_per_token=3)
    once = recipe.regularisation(n_weights=100_000, n_tokens=1000, n_unique=1000, bytes_per_token=3)
    assert few == once == (0, 0)
    both = recipe.regularisation(n_weights=1700, n_tokens=4500, n_unique=1000, bytes_per_token=3)
    assert both == (0.1, 0.1)


@pytest.mark.parametrize(
    ("memorised", "bytes_per_token", "best"),  # of those that were tried (docs/recipe.md)
    [
        (13, 3.63, 0.1),
        (36, 3.76, 0.2),
        (41, 3.7, 0.2),
        (68, 5.8, 0.25),
        (101, 3.76, 0.3),
        (79, 1.0, 0.1),
    ],
)
def test_dropout_is_near_the_best_that_was_measured(
    memorised: int, bytes_per_token: float, best: float
):
    sizes = {"n_weights": 1000 * memorised, "n_tokens": 2000, "n_unique": 1000}
    dropout, decay = recipe.regularisation(**sizes, bytes_per_token=bytes_per_token)
    assert dropout == pytest.approx(best, abs=0.03)
    assert decay == 0.1


def test_seconds_lie_on_the_line_through_two_speeds():
    small, large = (1e6, 1.0), (3e6, 2.0)
    assert seconds_per_token(5e6, small, large) == pytest.approx(3.0)
    assert seconds_per_token(4e6, (2e6, 1.0)) == pytest.approx(2.0)  # one: the line through 0


def test_a_larger_size_always_counts_as_slower_and_no_size_takes_less_than_nothing():
    assert seconds_per_token(6e6, (1e6, 2.0), (3e6, 1.0)) == pytest.approx(1.3)
    assert seconds_per_token(1e6, (1e6, 0.1), (2e6, 2.0)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("step", "seconds", "steps", "is_timed"),  # of 100; the rates fall in the last 60 %
    [
        (39, 39.0, 100, True),
        (0, 41.0, 100, True),  # nothing is known of its speed
        (40, 50.0, 100, False),
        (30, 40.5, 75, False),  # slower than planned
        (40, 10.0, 400, True),  # faster than planned: the fall begins later
    ],
)
def test_a_run_gets_the_steps_that_fill_its_time_when_its_rates_would_begin_to_fall(
    tmp_path: Path, step: int, seconds: float, steps: int, is_timed: bool
):
    now = time.perf_counter()
    optim = OptimConfig(decay_fraction=0.6)
    out_dir = tmp_path / "run"
    config = train.TrainConfig(out_dir=out_dir, max_steps=100, optim=optim, auto_resume=True)
    bar = SimpleNamespace(total=100)
    run = SimpleNamespace(
        config=config,
        progress=Progress(step),
        world=MACHINE,
        clock=Clock(now - seconds, now + 100 - seconds),
        log=SimpleNamespace(bar=bar),
    )
    found = dial.keep_time(run).max_steps
    assert abs(found - steps) <= 1
    assert bar.total == found
    assert (run.clock is not None) == is_timed
    if found != 100:
        written = cli.read_toml(str(out_dir / "config.toml"))
        assert (written["max_steps"], written["auto_resume"]) == (found, False)


class Text:
    """A dataset of which only sizes are asked."""

    bytes_per_token = 1.0

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = {"train": n_tokens, "val": 10_000}

    def bits_per_byte(self, loss: float) -> float:
        return loss

    def tokens(self, split: str) -> range:
        return range(self.n_tokens[split])

    def fitting_vocab_size(self, asked: int) -> int:
        return 64


def choice(
    monkeypatch: pytest.MonkeyPatch,
    minutes: float,
    n_tokens: int = 10**9,
    world: World = MACHINE,
    **asked: Any,
):
    """What is chosen on a machine of 100 GFLOP/s in float32."""
    monkeypatch.setattr(dial, "STARTED_AT", time.perf_counter())
    file, flags = "config/modern.toml", [f"--{name}={value}" for name, value in asked.items()]
    config = cli.parse_config(train.TrainConfig, [file, f"--minutes={minutes}", *flags])
    return Planner(config, Text(n_tokens), world, PILOT).best(32, (1e6, 1e-5), (1e7, 1e-4))


def test_more_minutes_give_a_larger_model_more_tokens_and_a_lower_loss(
    monkeypatch: pytest.MonkeyPatch,
):
    found = [choice(monkeypatch, minutes) for minutes in (1, 10, 100, 1000)]
    sizes = [chosen.config.model.n_layer for chosen in found]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    tokens = [chosen.config.max_steps * chosen.config.batch_size for chosen in found]
    assert tokens == sorted(tokens)
    expected = [chosen.loss for chosen in found]
    assert expected == sorted(expected, reverse=True)


def test_the_choice_is_the_best_of_all_sizes_and_each_fills_the_time(
    monkeypatch: pytest.MonkeyPatch,
):
    best = choice(monkeypatch, 10)
    n_layer = best.config.model.n_layer
    for other in (n_layer - 1, n_layer + 1):
        found = choice(monkeypatch, 10, **{"model.n_layer": other})
        assert found.config.model.n_layer == other
        assert found.loss > best.loss
    tokens = best.config.max_steps * best.config.batch_size * 256
    config = replace(best.config.model, vocab_size=64)
    seconds = tokens * 1e-11 * dial.flops_per_token(config)
    assert seconds + best.evaluation_seconds == pytest.approx(600 - dial.ENDING_SECONDS, rel=0.02)


@pytest.mark.parametrize("n_processes", [1, 3])
@pytest.mark.parametrize("max_steps", [200, 1000, 20_000])
def test_the_size_of_so_many_steps_fills_the_time(
    monkeypatch: pytest.MonkeyPatch, max_steps: int, n_processes: int
):
    monkeypatch.setattr(World, "sum", lambda world, value: value)
    world = replace(MACHINE, size=n_processes)
    best = choice(monkeypatch, 60, world=world, max_steps=max_steps)
    assert best.config.max_steps == max_steps
    assert best.config.batch_size % n_processes == 0
    config = replace(best.config.model, vocab_size=64)
    n_tokens = max_steps * best.config.batch_size * 256
    seconds = n_tokens * 1e-11 * dial.flops_per_token(config) + best.evaluation_seconds
    assert 0.8 < seconds / (3600 - dial.ENDING_SECONDS) <= 1.0


@pytest.mark.parametrize("minutes", [1, 10, 100])
def test_the_size_that_is_taken_was_timed_in_steps_of_the_run_however_slow_the_pilot_was(
    monkeypatch: pytest.MonkeyPatch, minutes: int
):
    monkeypatch.setattr(dial, "STARTED_AT", time.perf_counter())
    config = cli.parse_config(train.TrainConfig, ["config/modern.toml", f"--minutes={minutes}"])
    timed: list[tuple[int, int]] = []

    def speed(config: train.TrainConfig, _: float) -> tuple[float, float]:
        """100 GFLOP/s, in steps of at least 4,096 tokens."""
        timed.append((config.model.n_layer, config.batch_size))
        flops = dial.flops_per_token(replace(config.model, vocab_size=64))
        return flops, flops / 1e11 * max(1.0, 16 / config.batch_size)

    planner = Planner(config, Text(10**9), MACHINE, PILOT)
    trial: Any = SimpleNamespace(speed=speed)
    found = dial.settle(planner, trial, (1e6, 1e-4), 1.0)
    assert (found.config.model.n_layer, found.config.batch_size) in timed
    n_tokens = found.config.max_steps * found.config.batch_size * 256
    seconds = n_tokens * speed(found.config, 1.0)[1]
    assert seconds == pytest.approx(60 * minutes - dial.ENDING_SECONDS, rel=0.07)


@pytest.mark.parametrize(
    ("minutes", "n_processes", "given", "batch_size"),
    [(1, 1, 0, 2), (10, 1, 0, 8), (100, 3, 0, 15), (10, 1, 5, 5)],
)
def test_a_pilot_has_the_batch_that_is_planned_for_its_tokens_and_fills_its_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch, minutes: int, n_processes: int, given: int, batch_size: int
):
    found: list[train.TrainConfig] = []

    class Assembled(Exception):
        pass

    def assemble(config: train.TrainConfig) -> None:
        found.append(config)
        raise Assembled

    def speed(config: train.TrainConfig, _: float) -> tuple[float, float]:
        """20,000 tokens a second in small steps, and twice as many in large ones."""
        return 1e6, 5e-5 if config.batch_size < 8 else 2.5e-5

    flags = ["config/modern.toml", f"--batch_size={given}"]
    config = cli.parse_config(train.TrainConfig, flags)
    trial = Trial(assemble, lambda *_: None, Text(10**9), replace(MACHINE, size=n_processes))
    monkeypatch.setattr(trial, "speed", speed)
    with pytest.raises(Assembled):
        trial.pilot(config, 60 * minutes)
    assert found[0].batch_size == batch_size
    seconds = found[0].max_steps * batch_size * 256 * speed(found[0], 0.0)[1]
    assert seconds == pytest.approx(min(3 * minutes, 120), rel=0.05)


def test_the_sizes_to_choose_from_lie_close_and_keep_what_is_asked_for():
    config = ModelConfig(architecture="modern", vocab_size=64, n_layer=0)
    weights = [product_weights(size) for size in recipe.sizes(config, 12)]
    assert len(weights) == 22
    assert all(1.05 < b / a < 2.3 for a, b in itertools.pairwise(weights))

    def found(**asked: int) -> list[tuple[int, int]]:
        models = recipe.sizes(replace(config, **asked), 3)
        return [(model.n_layer, model.sized().n_embd) for model in models]

    assert found() == [(2, 128), (2, 192), (3, 192), (3, 256)]
    assert found(n_layer=5) == [(5, 320), (5, 384)]
    assert found(n_embd=256) == [(2, 256), (3, 256)]
    assert found(n_head=8) == [(2, 128), (3, 192)]  # more channels may not be as many for each


@pytest.mark.parametrize(("of_calls", "n_embd"), [(0.0, 128), (0.6, 192)])
def test_where_calls_take_most_of_the_time_a_larger_model_is_chosen(
    monkeypatch: pytest.MonkeyPatch, of_calls: float, n_embd: int
):
    monkeypatch.setattr(dial, "STARTED_AT", time.perf_counter())
    config = cli.parse_config(train.TrainConfig, ["config/modern.toml", "--minutes=3"])
    planner = Planner(config, Text(10**9), MACHINE, PILOT)
    timed: list[int] = []

    def speed(config: train.TrainConfig, _: float) -> tuple[float, float]:
        """As slow as 100 GFLOP/s in the first size, of whose time calls are a share."""
        timed.append(config.model.n_layer)
        flops = dial.flops_per_token(replace(config.model, vocab_size=64))
        first = first_flops or flops
        return flops, (of_calls * first + (1 - of_calls) * flops) / 1e11

    first_flops = 0.0
    first_flops, _ = speed(planner.best(4, (1e6, 1e-5)).config, 1.0)
    trial: Any = SimpleNamespace(speed=speed)
    found = dial.settle(planner, trial, (1e6, 1e-5), 1.0)
    assert found.config.model.sized().n_embd == n_embd
    assert len(set(timed)) > 1


def test_the_second_size_is_timed_with_the_dropout_of_the_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dial, "STARTED_AT", time.perf_counter())
    config = cli.parse_config(train.TrainConfig, ["config/modern.toml", "--minutes=10"])
    timed: list[float] = []

    def speed(config: train.TrainConfig, _: float) -> tuple[float, float]:
        timed.append(config.model.dropout)
        flops = dial.flops_per_token(replace(config.model, vocab_size=64))
        return flops, flops / 1e11

    planner = Planner(config, Text(100_000), MACHINE, PILOT)
    trial: Any = SimpleNamespace(speed=speed)
    dial.settle(planner, trial, (1e6, 1e-5), 1.0)
    assert timed[0] > 0
    assert timed[1] == timed[0]


def test_to_compile_the_sizes_are_timed_plain_and_the_chosen_one_is_timed_once_more_compiled(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(dial, "STARTED_AT", time.perf_counter())
    flags = ["config/modern.toml", "--minutes=10", "--compile"]
    asked = cli.parse_config(train.TrainConfig, flags)
    timed: list[tuple[bool, int]] = []

    def speed(config: train.TrainConfig, _: float) -> tuple[float, float]:
        """100 GFLOP/s, and compiled twice as many."""
        timed.append((config.compile, config.model.sized().n_embd))
        flops = dial.flops_per_token(replace(config.model, vocab_size=64))
        return flops, flops / (2e11 if config.compile else 1e11)

    def pilot(config: train.TrainConfig, _: float) -> tuple[recipe.Pilot, tuple[float, float]]:
        timed.append((config.compile, 0))
        return PILOT, (1e6, 1e-5)

    trial: Any = SimpleNamespace(speed=speed, pilot=pilot, world=MACHINE, dataset=Text(10**9))
    found, _ = dial.choose(asked, trial)
    plain, _ = dial.choose(replace(asked, compile=False), trial)
    n = timed.index((True, found.model.n_embd))
    assert [compiled for compiled, _ in timed] == [False] * n + [True] + [False] * n
    assert (found.compile, plain.compile) == (True, False)
    assert found.model.n_embd == plain.model.sized().n_embd
    tokens = [config.max_steps * config.batch_size for config in (found, plain)]
    assert tokens[0] == pytest.approx(2 * tokens[1], rel=0.05)


def test_a_short_text_is_regularised_and_what_is_set_is_kept(monkeypatch: pytest.MonkeyPatch):
    assert choice(monkeypatch, 10).config.model.dropout == 0
    given: dict[str, Any]
    for given, both in (
        ({}, (0.1, 0.1)),
        ({"model.dropout": 0.3}, (0.3, 0.1)),
        ({"optim.muon_weight_decay": 0.3}, (0.1, 0.3)),
    ):
        given |= {"n_tokens": 200_000, "batch_size": 4, "eval_tokens": 512}
        found = choice(monkeypatch, 10, **given).config
        assert (found.model.dropout, found.optim.muon_weight_decay) == both
        assert (found.batch_size, found.eval_tokens, found.minutes) == (4, 512, 0.0)


def test_a_validation_split_that_takes_too_long_is_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.trial.EVALUATION_SHARE", 1e-6)
    assert 0 < choice(monkeypatch, 1).config.eval_tokens < 10_000


def test_text_that_returns_is_easier_than_text_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = Dataset.open(write_dataset(tmp_path))
    rng = np.random.default_rng(0)
    found = {}
    for name, period in (("random", 60_000), ("returns", 15)):
        text = np.tile(rng.integers(15, size=period), 60_000 // period).astype(np.uint16)
        splits = {"train": text[:30_000], "val": text[30_000:]}
        monkeypatch.setattr(dataset, "tokens", splits.__getitem__)
        found[name] = hardness(dataset)
    assert found["random"] == pytest.approx(math.log(15), rel=0.4)
    assert found["returns"] < 0.1 * found["random"]


def test_windows_are_spread_over_the_whole_split():
    firsts = [window_1S[0, 0].item() for window_1S in spread(np.arange(1000), 10, 4)]
    assert firsts == [0, 330, 660, 990]
    assert [w.shape for w in spread(np.arange(7), 10, 4)] == [(1, 7)]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("given", [50, 0])  # 0: there is time for a single window
def test_the_pilot_is_scored_on_the_tokens_that_the_run_evaluates(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int
):
    lengths: list[int] = []

    def watched(tokens_N: np.ndarray, *rest: int) -> Iterator[torch.Tensor]:
        lengths.append(len(tokens_N))
        return spread(tokens_N, *rest)

    monkeypatch.setattr("engine.trial.spread", watched)
    monkeypatch.setattr("engine.trial.EVALUATION_SHARE", 1e-9)
    flags = ("--minutes=0.1", f"--eval_tokens={given}", *UNPLANNED, *FREE, *FALLING)
    train_here(tiny, tmp_path / "run", *flags)
    config = cli.read_toml(str(tmp_path / "run/config.toml"))
    assert lengths[0] == config["eval_tokens"] == (given or config["model"]["context_length"])


@pytest.mark.usefixtures("short")
def test_minutes_become_plain_numbers_in_the_config_which_repeats_the_run(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train_here(tiny, tmp_path / "run", "--minutes=0.1", *UNPLANNED, *FREE, *FALLING)
    assert "expected: " in capsys.readouterr().out
    config = cli.read_toml(str(tmp_path / "run/config.toml"))
    assert config["minutes"] == 0
    assert min(config["max_steps"], config["batch_size"], config["model"]["n_layer"]) > 0
    assert checkpoint.load(tmp_path / "run", "last")["step"] == config["max_steps"]
    train_here(tmp_path / "run/config.toml", tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(tmp_path / "run")


@pytest.mark.usefixtures("short")
def test_steps_that_are_given_are_done_however_much_time_is_left(tiny: Path, tmp_path: Path):
    train_here(tiny, tmp_path / "run", "--minutes=0.1", *FALLING)
    assert cli.read_toml(str(tmp_path / "run/config.toml"))["max_steps"] == 12
    assert len(losses(tmp_path / "run")) == 12 + 3


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("is_saved", [True, False])
def test_a_job_of_some_minutes_that_is_started_again_goes_on_with_what_they_chose(
    tiny: Path, tmp_path: Path, is_saved: bool
):
    job = ("--minutes=0.1", "--auto_resume", *UNPLANNED, *FREE, *FALLING)
    train_here(tiny, tmp_path / "run", *job)
    before = (tmp_path / "run/config.toml").read_text()
    expected = outcome(tmp_path / "run")
    if not is_saved:  # it was killed before its first checkpoint
        (tmp_path / "run/checkpoints.json").unlink()
    train_here(tiny, tmp_path / "run", *job)
    assert (tmp_path / "run/config.toml").read_text() == before
    assert outcome(tmp_path / "run") == expected


@pytest.mark.usefixtures("short")
def test_a_run_that_is_asked_to_stop_while_it_is_planned_ends_at_once_and_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    started: list[int] = []

    def update(run: train.Run, batch: tuple[torch.Tensor, ...]) -> None:
        started.append(run.progress.step)
        run.stop.signal = signal.SIGTERM
        original(run, batch)

    original = train.update
    monkeypatch.setattr(train, "update", update)
    with pytest.raises(SystemExit) as stop:
        train_here(tiny, tmp_path / "run", "--minutes=1", *UNPLANNED, *FREE, *FALLING)
    assert stop.value.code == 128 + signal.SIGTERM
    assert len(started) < 4
    assert "stopped while planning" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("short")
def test_a_run_of_some_minutes_takes_no_weights_of_another(tiny: Path, tmp_path: Path):
    train_here(tiny, tmp_path / "run")
    with pytest.raises(ValueError, match="minutes plan a new run, and init_from goes on with one"):
        train_here(tiny, tmp_path / "b", "--minutes=1", f"--init_from={tmp_path / 'run'}")
