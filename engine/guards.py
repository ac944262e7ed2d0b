"""What a run watches for while it trains: mistakes that would otherwise pass in silence."""

import faulthandler
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.parallel import World, is_shared, local, seed_dropout

MOST_REPEATED = 10  # steps that are compared
REPEATED_WITHIN = {"float32": 1e-3}  # nats; kernels of less precision may add up in any order
LESS_PRECISE = 1e-2
RECENT = 128  # losses that a spike is judged by
SPIKE = 6.0  # standard deviations above their mean
SLOW = 20  # times the median of the recent steps; then something hangs
LEAST_SECONDS = 10.0  # that no step is called slow before
STDERR = 2  # the file descriptor, which is there where sys.stderr is not


class Repeated:
    """The losses that a run had logged after its last checkpoint, when it was interrupted.

    A run that goes on does those steps once more. If the first of them turn out otherwise, it does
    not go on as it was: the data, the random numbers, the optimizer or the code are not the same.
    Later ones may differ, because rounding grows.
    """

    def __init__(self, lines: Sequence[dict[str, float]] = (), precision: str = "float32") -> None:
        """Take the lines of the log that will be written again."""
        logged = [line for line in lines if "train_loss" in line]
        self.losses = {line["step"]: line["train_loss"] for line in logged[:MOST_REPEATED]}
        self.within = REPEATED_WITHIN.get(precision, LESS_PRECISE)

    def check(self, step: int, loss: float) -> None:
        """Raise ArithmeticError if a loss is not the one that was logged."""
        before = self.losses.get(step, loss)
        if not abs(loss - before) <= self.within:
            raise ArithmeticError(
                f"step {step} has a loss of {loss:.4f}, but before the run was interrupted it was "
                f"{before:.4f}: data, optimizer, code or machine have changed; if that is meant, "
                "start it with --resume once more: what was logged before is no longer compared"
            )


class Spikes:
    """Finds losses far above the recent ones."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)

    def height(self, loss: float) -> float:
        """Return how many standard deviations a loss is above the recent ones, 0 if unknown."""
        height = 0.0
        if len(self.recent) == RECENT:
            mean = sum(self.recent) / RECENT
            deviation = math.sqrt(sum((one - mean) ** 2 for one in self.recent) / RECENT)
            height = (loss - mean) / deviation if deviation > 0 else 0.0
        self.recent.append(loss)
        return height


class Watch:
    """Prints where each thread is when a step takes far longer than the recent ones."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.began_at = 0.0  # the step
        self.armed_at = 0.0  # the timer, which short steps share, as each arming costs 0.1 ms

    def begin(self) -> None:
        """A step begins, so the one before it, if there was one, has ended."""
        now = time.perf_counter()
        if self.began_at > 0:
            self.recent.append(now - self.began_at)
        self.began_at = now
        if len(self.recent) == RECENT and now - self.armed_at > LEAST_SECONDS / 2:
            seconds = max(LEAST_SECONDS, SLOW * statistics.median(self.recent))
            faulthandler.dump_traceback_later(seconds + LEAST_SECONDS / 2, file=STDERR)
            self.armed_at = now

    def rest(self) -> None:
        """Something else than a step begins, which may take long."""
        faulthandler.cancel_dump_traceback_later()
        self.began_at = 0.0
        self.armed_at = 0.0

    close = rest  # when a run fails: in a notebook the timer would outlive it


def check_repeatable(run: Any, accumulate_gradients: Callable[[], Tensor]) -> None:
    """Compute the gradients of a step two more times, if it is one of `verify_every`.

    Every process must call this. Raises ArithmeticError if the two differ: a damaged device may
    compute wrong numbers that look right.
    """
    step, every, found = run.progress.step, run.config.verify_every, []
    if every == 0 or step % every != 0:
        return
    for _ in range(2):
        seed_dropout(run.config.seed, step, run.world)
        loss = accumulate_gradients()
        found.append(bits_of([loss, *(p.grad for p in run.model.parameters() if p.requires_grad)]))
        run.model.zero_grad()
    if run.world.sum(torch.tensor(float(found[0] != found[1]))) > 0:
        raise ArithmeticError(
            f"after step {step} the same gradients were computed twice, and they differ: a "
            "device is at fault, or its kernels add up in any order, as many of a GPU do; go on "
            "from the last checkpoint with --resume on another machine, or with --verify_every=0"
        )


def bits_of(tensors: Iterable[Any]) -> int:
    """Return the sum of the bits, taken as integers: one bit that differs changes it."""
    parts = [local(t).detach().view(torch.int32).sum(dtype=torch.int64) for t in tensors]
    return int(sum(parts))


def check_copies(model: torch.nn.Module, world: World) -> None:
    """Raise ArithmeticError if processes that must have the same weights do not.

    Every process must call this. A flipped bit would otherwise go unnoticed for weeks.
    """
    if world.host_group is None:
        return
    parameters: list[Any] = list(model.state_dict().values())  # never the gathered ones
    place: Any = None
    if is_shared(parameters[0]):
        mesh = parameters[0].device_mesh
        place = mesh.get_local_rank(mesh.ndim - 1)  # those of another rank have other rows
    found = world.gather((place, bits_of(parameters)))
    first = dict(reversed(found))
    strange = [rank for rank, (place, sum_) in enumerate(found) if sum_ != first[place]]
    if strange:
        raise ArithmeticError(
            f"after step {world.step} processes {strange} have different weights from the first "
            "one with the same share: a device, the network or a kernel is at fault; go on from "
            "the last checkpoint with --resume, on another machine if it happens again"
        )
