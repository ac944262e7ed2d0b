"""Short runs that leave nothing behind: how fast is this machine, and how hard is this text?"""

import contextlib
import lzma
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.count import flops_per_token, product_weights
from engine.loss import evaluate
from engine.parallel import World
from engine.recipe import Pilot, planned_batch
from model import require

PILOT_LAYERS = 2
PILOT_SHARE = 0.05  # of the time
PILOT_SECONDS = 120.0  # at most
PILOT_TOKENS = 512  # in a step, of a process, until its speed tells how many are best
LEAST_PILOT_STEPS = 24
VAL_TOKENS = 2**15  # of those that the run evaluates score the pilot
EVALUATION_SHARE = 0.06  # of the time, at most
EVALUATION_COST = 1 / 3  # time to evaluate a token, as a share of the time to train on it
TIMED_SHARE = 0.02  # of the time; a size is timed until that has passed, or these steps are done
TIMED_STEPS = 4
TRAIN_BYTES = 600_000  # that LZMA compresses
VAL_BYTES = 100_000
PIECES = 8  # of each split, spread over it
LEAST_SLOPE = 0.3  # of seconds over operations: below it the machine has changed its speed

Speed = tuple[float, float]  # operations per token, and seconds per token
Update = Callable[[Any, tuple[Tensor, ...]], None]


class Trial:
    """Assembles runs of a dataset, and trains them with `update`."""

    def __init__(
        self, assemble: Callable[[Any], Any], update: Update, dataset: Any, world: World
    ) -> None:
        self.assemble, self.update = assemble, update
        self.dataset, self.world = dataset, world

    def speed(self, config: Any, most_seconds: float) -> Speed:
        """Return the speed of a run, once it is warm."""
        run = self.assemble(config)
        with contextlib.closing(run.log):
            found = [self._seconds(run, run.compute_update.settling_calls)]
            while len(found) < 2 or (len(found) <= TIMED_STEPS and sum(found[1:]) < most_seconds):
                found.append(self._seconds(run, 1))
        n_tokens = run.config.batch_size * run.config.model.context_length
        return flops_per_token(run.config.model), statistics.median(found[1:]) / n_tokens

    def pilot(self, config: Any, seconds: float) -> tuple[Pilot, Speed]:
        """Train a small model for a share of so many seconds, and score it."""
        T = config.model.context_length
        n_processes, share = self.world.size, min(PILOT_SHARE * seconds, PILOT_SECONDS)
        model = replace(config.model, n_layer=PILOT_LAYERS)
        rows = config.batch_size or max(1, PILOT_TOKENS // T) * n_processes
        small = replace(config, model=model, batch_size=rows, max_steps=LEAST_PILOT_STEPS)
        speed = self.speed(small, TIMED_SHARE * seconds / 2)
        planned = planned_batch(share / speed[1], T)
        if not config.batch_size and planned >= 2 * rows:  # it is faster, too
            small = replace(small, batch_size=n_processes * max(1, planned // n_processes))
            speed = self.speed(small, TIMED_SHARE * seconds / 2)
        steps = max(LEAST_PILOT_STEPS, round(share / (speed[1] * small.batch_size * T)))
        run = self.assemble(replace(small, max_steps=steps))
        with contextlib.closing(run.log):
            self._seconds(run, steps)
            first = config.eval_tokens or most_eval_tokens(seconds, speed[1], T)
            windows = spread(self.dataset.tokens("val", first), T + 1, VAL_TOKENS // T)
            batches = ((window_1S[:, :-1], window_1S[:, 1:]) for window_1S in windows)
            loss = evaluate(run.loss_model, batches, self.world) or math.nan
        require(math.isfinite(loss), "the pilot's loss is not finite: lower the learning rates")
        n_weights = product_weights(run.config.model)
        n_tokens = steps * small.batch_size * T
        return Pilot(n_weights, n_tokens, loss, hardness(self.dataset)), speed

    def _seconds(self, run: Any, steps: int) -> float:
        """Do so many updates; return how long they took, as a mean over the processes."""
        started_at = time.perf_counter()
        for _ in range(steps):
            batch = run.batches.batch(run.progress.step)
            self.update(run, tuple(tensor.to(self.world.device) for tensor in batch))
            run.progress.step += 1
            if run.stop.is_agreed:
                if self.world.is_main:
                    print("stopped while planning: there is nothing to go on with")
                raise SystemExit(run.stop.exit_code)
        run.log.flush(run.stop)  # waits for a GPU
        taken = torch.tensor(time.perf_counter() - started_at)
        return (self.world.sum(taken) / self.world.size).item()


def seconds_per_token(flops: float, *speeds: Speed) -> float:
    """Return the height at `flops` of the line through one or two speeds.

    It goes through the last one, and neither starts below 0 nor is nearly flat.
    """
    (x0, y0), (x1, y1) = speeds[0], speeds[-1]
    slope = (y1 - y0) / (x1 - x0) if x1 != x0 else math.inf
    slope = min(max(slope, LEAST_SLOPE * y1 / x1), y1 / x1)
    return y1 + slope * (flops - x1)


def most_eval_tokens(seconds: float, per_token: float, context_length: int) -> int:
    """Return how many tokens a run can evaluate, given the seconds to train on one."""
    return max(context_length, int(EVALUATION_SHARE * seconds / (EVALUATION_COST * per_token)))


def hardness(dataset: Any) -> float:
    """Return what LZMA needs for validation text after training text, in nats per token.

    It knows no grammar, but sees what returns, so code is easier than prose for it too.
    """
    bytes_per_token = dataset.bytes_per_token

    def text(split: str, most_bytes: int) -> bytes:
        length = max(1, round(most_bytes / bytes_per_token / PIECES))
        pieces = spread(dataset.tokens(split), length, PIECES)
        return "".join(dataset.tokenizer.decode(p.flatten().tolist()) for p in pieces).encode()

    before, after = text("train", TRAIN_BYTES), text("val", VAL_BYTES)
    added = len(lzma.compress(before + after, preset=1)) - len(lzma.compress(before, preset=1))
    return added * 8 / len(after) * math.log(2) * bytes_per_token


def spread(tokens_N: np.ndarray, length: int, n: int) -> Iterator[Tensor]:
    """Yield up to `n` windows (1, length), evenly spread over a split; one if it is short."""
    length = min(length, len(tokens_N))
    n = max(1, min(n, len(tokens_N) // length))
    for start in np.linspace(0, len(tokens_N) - length, n).astype(int).tolist():
        yield torch.from_numpy(np.asarray(tokens_N[start : start + length], np.int64))[None]
