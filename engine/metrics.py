"""The log of a run: a progress bar, one JSON object per line, and wandb if asked."""

import json
import math
import os
import sys
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

import files
from engine.device import HostCopy
from engine.guards import SPIKE, Repeated, Spikes
from engine.parallel import StopRequest
from engine.wandb_run import WandbRun
from model import require

OnNonfinite = Literal["stop", "skip"]
MOST_SKIPPED = 10  # updates in a row that are not finite; then the run ends all the same


class Update(NamedTuple):
    """An update whose numbers may still be on their way from the device."""

    step: int
    seconds: float
    numbers: HostCopy  # loss, gradient norm, and more than 0 if a process was asked to stop
    values: dict[str, float]  # what else its line has


class Metrics:
    """Writes a line for each evaluation, and for each update.

    The step in a line is the number of updates that were finished before.
    """

    def __init__(
        self,
        out_dir: Path | None,
        first_step: int,
        max_steps: int,
        elapsed_seconds: float = 0.0,
        wandb: WandbRun | None = None,
        lock: files.Lock | None = None,
        *,
        skip: bool = False,
        repeated: Repeated | None = None,
    ) -> None:
        """Go on from `first_step`. Without a folder, as in all processes but one, log nothing.

        `skip` counts updates that are not finite instead of ending. The lock is held until `close`.
        """
        if out_dir is not None:
            forget_from(out_dir / "metrics.jsonl", first_step)
        self.lock, self.skip, self.repeated = lock, skip, repeated or Repeated()
        self.spikes = Spikes()
        self.skipped = 0
        self.skipped_in_a_row = 0
        path = Path(os.devnull) if out_dir is None else out_dir / "metrics.jsonl"
        self.file = path.open("a", encoding="utf-8")
        self.elapsed_seconds = elapsed_seconds
        self.wandb = wandb
        self.unread: deque[Update] = deque()
        self.bar = tqdm(
            initial=first_step,
            total=max_steps,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 15,  # a log file needs few lines
            disable=out_dir is None,
        )

    def update(self, update: Update) -> None:
        """Take an update, which a later `flush` logs."""
        self.unread.append(update)

    def flush(self, stop: StopRequest) -> None:
        """Wait for the numbers of all updates so far, log them, and note a request to stop.

        Raises ArithmeticError if a number is not finite.
        """
        while self.unread:
            update = self.unread.popleft()
            loss, grad_norm, asked_to_stop = update.numbers.read().tolist()
            stop.is_agreed = stop.is_agreed or asked_to_stop > 0
            self.elapsed_seconds += update.seconds
            rate = f"{update.values['tokens_per_second']:,.0f} tokens/s"
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate}", refresh=False)
            self.bar.update()
            self._write(update.step, self._judged(update.step, loss, grad_norm) | update.values)

    def _judged(self, step: int, loss: float, grad_norm: float) -> dict[str, float]:
        """Return what to log of an update. Raises ArithmeticError if the run should end."""
        is_skipped = self.skip and not math.isfinite(loss + grad_norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
        if is_skipped and self.skipped_in_a_row < MOST_SKIPPED:
            self.skipped += 1
            self._say(f"step {step:6d}: skipped, as loss or gradient is not finite")
            return {"skipped_updates": self.skipped}
        check_finite(step, loss=loss, grad_norm=grad_norm)
        self.repeated.check(step, loss)
        height = self.spikes.height(loss)
        if height > SPIKE:
            self._say(f"step {step:6d}: loss {loss:.4f} is {height:.0f} deviations above the last")
        return {"train_loss": loss, "grad_norm": grad_norm}

    def _say(self, line: str) -> None:
        if not self.bar.disable:  # else every process would say it
            self.bar.write(line, file=sys.stdout)

    def evaluation(self, step: int, loss: float, bits: float) -> None:
        """Log and print a validation loss. Raises ArithmeticError if it is not finite."""
        check_finite(step, val_loss=loss)
        losses = f"{loss:.4f} nats per token, {bits:.4f} bits per byte"
        self._say(f"step {step:6d}: validation loss {losses}")
        self._write(step, {"val_loss": loss, "val_bits_per_byte": bits})

    def end(self, step: int, resume: str) -> None:
        """Close the bar and say under it how to go on, in the process that logs."""
        is_shown = not self.bar.disable
        self.bar.close()
        if is_shown:
            print(f"stopped and saved at step {step}; go on with: {resume}")

    def close(self) -> None:
        with ExitStack() as stack:  # in reverse, and each whatever becomes of the others
            if self.lock is not None:
                stack.callback(self.lock.close)
            if self.wandb is not None:
                stack.callback(self.wandb.finish)
            stack.enter_context(suppress(OSError))  # of a line that did not fit, as was said
            stack.callback(self.file.close)
            stack.callback(self.bar.close)

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step, **values, "elapsed_seconds": self.elapsed_seconds}
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            error.filename = self.file.name
            raise
        if self.wandb is not None:
            self.wandb.log(values | {"elapsed_seconds": self.elapsed_seconds}, step)


def forget_from(path: Path, first_step: int) -> None:
    """Drop the lines from a step on, at which a run resumes, and one that a kill cut off."""
    if not path.exists():
        return
    kept = [line for line in read(path) if line["step"] < first_step]
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def read(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl, but not a last one that a kill has cut."""
    with files.readable(path):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        numbers = [number for line in found for number in (line["step"], *line.values())]
        require(all(isinstance(n, int | float) for n in numbers), "a line must hold numbers")
        return found


def check_finite(step: int, **numbers: float) -> None:
    """Raise ArithmeticError, before anything is logged or saved, if a number is not finite."""
    if not all(map(math.isfinite, numbers.values())):
        shown = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise ArithmeticError(
            f"after step {step} a number is not finite ({shown}), so training stopped: lower the "
            "learning rate, then go on from the last checkpoint, if there is one, with --resume"
        )
