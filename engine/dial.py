"""The dial: minutes in, sizes out.

1. A pilot, a small model that trains for a twentieth of the time, shows how hard the text is.
2. The size of the lowest expected loss is timed, and chosen anew, until the choice was timed.
3. When the rates would begin to fall, the time that is left decides on the number of steps, as no
   machine keeps the speed of a short trial.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

import files
from engine import recipe
from engine.count import flops_per_token, product_weights
from engine.parallel import World
from engine.report import repeating
from engine.trial import (
    EVALUATION_COST,
    EVALUATION_SHARE,
    PILOT_LAYERS,
    TIMED_SHARE,
    Speed,
    Trial,
    most_eval_tokens,
    seconds_per_token,
)
from model import ModelConfig, require

# When the process started: until here it has imported torch, in one thread
STARTED_AT = time.perf_counter() - time.process_time()
MOST_EVALUATIONS = 10
MORE_STEPS = 1.25  # than planned: until then a run does not evaluate more often than planned
ENDING_SECONDS = 4.0  # for samples, a picture, and a bigram model
MOST_ROUNDS = 4


@dataclass(frozen=True)
class Clock:
    """Tells how much of its time a run has used."""

    started_at: float
    ends_at: float

    def passed(self, world: World) -> float:
        """Return the share of the time that has passed in the main process, in all processes."""
        share = (time.perf_counter() - self.started_at) / (self.ends_at - self.started_at)
        return world.sum(torch.tensor(share if world.is_main else 0.0)).item()


def keep_time(run: Any) -> Any:
    """Return the config of a run; its clock, if it has one, changes the number of steps.

    That is when the rates would begin to fall. If they would too early, the run gets more steps,
    and goes on at its peak rates; when it is time, it gets those that fill what is left.
    """
    config, step = run.config, run.progress.step
    if run.clock is None or step == 0:
        return config
    before_fall = 1 - config.optim.decay_fraction
    passed = run.clock.passed(run.world)
    if passed < before_fall and step < before_fall * config.max_steps:
        return config
    steps = math.ceil(step / min(passed, before_fall))  # the fall begins here, or later
    config = replace(config, max_steps=max(step + 1, steps))
    run.log.bar.total = config.max_steps
    if passed >= before_fall:
        run.clock = None
    if run.world.is_main:
        files.write_text(config.out_dir / "config.toml", repeating(config))
    return config


@dataclass(frozen=True)
class Choice:
    """A config with all sizes, and what it would do."""

    config: Any
    evaluation_seconds: float
    loss: float  # expected, in nats per token


@dataclass(frozen=True)
class Planner:
    """Weighs sizes against each other."""

    asked: Any
    dataset: Any
    world: World
    pilot: recipe.Pilot

    def best(self, most_layers: int, *speeds: Speed) -> Choice:
        """Return the choice of the lowest expected loss, by the speeds of one or two sizes."""
        left, sizes = self.seconds_left(), recipe.sizes(self.asked.model, most_layers)
        found = [self.choice(model, left, *speeds) for model in sizes]
        possible = [choice for choice in found if choice is not None]
        way_out = "give more, or leave out what is fixed"
        shown = f"minutes are too few for this run: got {self.asked.minutes:g}; {way_out}"
        require(possible != [], shown)
        return min(possible, key=lambda choice: choice.loss)

    def choice(self, model: ModelConfig, left: float, *speeds: Speed) -> Choice | None:
        """Return what a size would do in the seconds that are left; None if they are too few."""
        asked, T = self.asked, model.context_length
        sizes = replace(model, vocab_size=self.dataset.fitting_vocab_size(model.vocab_size))
        seconds = seconds_per_token(flops_per_token(sizes), *speeds)
        n_unique, n_val_tokens = (len(self.dataset.tokens(split)) for split in ("train", "val"))
        most = most_eval_tokens(60 * asked.minutes, seconds, T)
        eval_tokens = asked.eval_tokens or (most if most < n_val_tokens else 0)
        evaluation_seconds = (eval_tokens or n_val_tokens) * EVALUATION_COST * seconds
        n_tokens = (left - evaluation_seconds) / seconds
        if n_tokens < max(1, asked.max_steps) * max(self.world.size, asked.batch_size) * T:
            return None
        rows = recipe.planned_batch(n_tokens, T)
        if asked.max_steps:  # then their size fills the time
            rows = int(n_tokens / (asked.max_steps * T))
        batch_size = asked.batch_size or self.world.size * max(1, rows // self.world.size)
        max_steps = asked.max_steps or max(1, round(n_tokens / (batch_size * T)))
        n_tokens = max_steps * batch_size * T
        n_weights = product_weights(sizes)
        loss = recipe.expected_loss(self.pilot, n_weights, n_tokens, n_unique).item()
        found = {"batch_size": batch_size, "max_steps": max_steps, "eval_tokens": eval_tokens}
        bytes_per_token = self.dataset.bytes_per_token
        dropout, decay = recipe.regularisation(n_weights, n_tokens, n_unique, bytes_per_token)
        model = replace(model, dropout=model.dropout or dropout)
        optim = replace(asked.optim, muon_weight_decay=asked.optim.muon_weight_decay or decay)
        config = replace(asked, minutes=0.0, model=model, optim=optim, **found)
        return Choice(config, evaluation_seconds, loss)

    def seconds_left(self) -> float:
        """Return the time for updates and evaluations, by the clock of the main process."""
        left = STARTED_AT + 60 * self.asked.minutes - ENDING_SECONDS - time.perf_counter()
        return self.world.sum(torch.tensor(left if self.world.is_main else 0.0)).item()


def choose(asked: Any, trial: Trial) -> tuple[Any, Clock | None]:
    """Return the config with its sizes chosen for `asked.minutes`, and the clock of the run.

    Without minutes the config stays as it is, and there is no clock. Raises ValueError if the time
    is too short, or if the run would go on with the numbers of another.
    """
    if not asked.minutes:
        return asked, None
    rule = "minutes plan a new run, and"
    require(not asked.resume, f"{rule} resume goes on with one: take {asked.out_dir}/config.toml")
    require(not asked.init_from, f"{rule} init_from goes on with one: leave out minutes")
    require(asked.minutes < math.inf, "minutes must be finite: got inf")
    seconds, world, dataset = 60 * asked.minutes, trial.world, trial.dataset
    if world.is_main:
        print(f"planning {asked.minutes:g} minutes: a trial of this machine and this text ...")
    plain = replace(asked, compile=False)  # else each size that is tried takes 20 seconds more
    pilot, speed = trial.pilot(replace(plain, minutes=0.0), seconds)
    planner = Planner(plain, dataset, world, pilot)
    choice = settle(planner, trial, speed, TIMED_SHARE * seconds)
    if asked.compile:
        speed = trial.speed(replace(choice.config, compile=True), TIMED_SHARE * seconds)
        model = replace(choice.config.model.sized(), dropout=asked.model.dropout)
        choice = replace(planner, asked=replace(asked, model=model)).best(0, speed)
    found = choice.config
    if not asked.eval_every:
        evaluations = int(EVALUATION_SHARE * seconds / choice.evaluation_seconds)
        evaluations = max(1, min(evaluations, MOST_EVALUATIONS))
        found = replace(found, eval_every=math.ceil(MORE_STEPS * found.max_steps / evaluations))
    if world.is_main:
        bits = dataset.bits_per_byte(choice.loss)
        shown = f"{choice.loss:.2f} nats per token, {bits:.2f} bits per byte"
        print(f"expected: {shown}, give or take {recipe.ERROR:.0%}")
    # All evaluations but the last one are spread over the training, so the clock sees them
    left = planner.seconds_left() - choice.evaluation_seconds
    now = time.perf_counter()
    is_fixed = asked.max_steps > 0 or asked.optim.decay_fraction == 1
    return found, None if is_fixed else Clock(now, now + left)


def settle(planner: Planner, trial: Trial, speed: Speed, most_seconds: float) -> Choice:
    """Choose and time in turn, until the choice is a size, and a batch size, that were timed.

    The pilot's speed is only the first guess, as its steps are smaller than those of the run. A
    choice has at most twice the layers of any before, as the speed of larger sizes is a guess.
    """
    choice = planner.best(2 * PILOT_LAYERS, speed)
    speeds: dict[tuple[int, int, int], Speed] = {}
    for _ in range(MOST_ROUNDS):
        size = (choice.config.model.n_layer, choice.config.model.n_embd, choice.config.batch_size)
        if size in speeds:
            break
        last = speeds[size] = trial.speed(choice.config, most_seconds)
        if len(speeds) == 1 and not planner.asked.model.n_layer:  # how does time grow with size?
            dropping = replace(planner.asked.model, dropout=choice.config.model.dropout)
            larger = recipe.sizes(dropping, size[0] + 1)[-1]
            speed = trial.speed(replace(choice.config, model=larger), most_seconds)
        choice = planner.best(2 * max(speeds)[0], speed, last)
    return choice
