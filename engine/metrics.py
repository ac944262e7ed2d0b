"""Report numbers: a progress bar, one JSON object per line, and wandb if asked."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from engine.wandb_run import WandbRun

if TYPE_CHECKING:  # a measurement that reads a log must not hold torch in its memory
    from torch import Tensor

# bfloat16 FLOP/s of dense matrix products, from NVIDIA's data sheets
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L4": 121e12, "RTX 4090": 165e12}


class Metrics:
    """The log of a run, in metrics.jsonl, on the console, and in wandb if asked.

    Each line has the step, the number of finished updates, and either an evaluation of that
    state or the update that followed it.
    """

    def __init__(
        self, out_dir: Path | None, first_step: int, max_steps: int, elapsed_seconds: float = 0.0
    ) -> None:
        """Go on from `first_step`; without a folder, as in all processes but one, log nothing."""
        if out_dir is not None:
            forget_from(out_dir / "metrics.jsonl", first_step)
        path = Path(os.devnull) if out_dir is None else out_dir / "metrics.jsonl"
        self.file = path.open("a", encoding="utf-8")
        self.elapsed_seconds = elapsed_seconds
        self.use: Callable[[float], dict[str, float]] = lambda tokens_per_second: {}
        self.wandb: WandbRun | None = None
        self.unread: tuple[int, Tensor, float, int, float] | None = None
        self.bar = tqdm(
            initial=first_step,
            total=max_steps,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 15,  # a log file wants few lines
            disable=out_dir is None,
        )

    def update(
        self, step: int, numbers: "Tensor", rate: float, n_tokens: int, seconds: float
    ) -> None:
        """Take the (2,) loss and gradient norm of an update, at a learning rate `rate`.

        They are read and logged by the next `flush`: to read them now would wait for the device.
        """
        self.unread = (step, numbers, rate, n_tokens, seconds)

    def flush(self) -> None:
        """Log the last update, and move the bar. Raises ArithmeticError if it was not finite."""
        if self.unread is None:
            return
        (step, numbers, rate, n_tokens, seconds), self.unread = self.unread, None
        loss, grad_norm = numbers.tolist()
        check_finite(step, loss=loss, grad_norm=grad_norm)
        self.elapsed_seconds += seconds
        tokens_per_second = n_tokens / seconds
        values = {"train_loss": loss, "learning_rate": rate, "grad_norm": grad_norm}
        values["tokens_per_second"] = tokens_per_second
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", False)
        self.bar.update()
        self._write(step, values | self.use(tokens_per_second))

    def evaluation(self, step: int, loss: float, bits: float) -> None:
        """Log a validation loss in nats per token and in bits per byte, and print it."""
        self.flush()
        losses = f"{loss:.4f} nats per token, {bits:.4f} bits per byte"
        self.bar.write(f"step {step:6d}: validation loss {losses}", file=sys.stdout)
        self._write(step, {"val_loss": loss, "val_bits_per_byte": bits})

    def end(self, step: int, resume: str) -> None:
        """Close the bar and say under it how to go on, in the process that logs."""
        is_shown = not self.bar.disable
        self.bar.close()
        if is_shown:
            print(f"stopped after step {step}, which is saved: {resume}")

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _write(self, step: int, values: dict[str, float]) -> None:
        values |= {"elapsed_seconds": self.elapsed_seconds}
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(values, step)


def forget_from(path: Path, first_step: int) -> None:
    """Drop the lines that a resumed run will write again, and one that was cut off by a kill."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flops_per_token(parts: dict[str, int], model: dict[str, int]) -> int:
    """Operations of a forward and a backward pass (Chowdhery et al., 2022, app. B).

    6 for each weight of a matrix product, the output head's among them, and 12 for each
    channel of a query at each position that it may look at.
    """
    weights = parts["attention"] + parts["mlp"] + model["vocab_size"] * model["n_embd"]
    return 6 * weights + 12 * model["n_layer"] * model["n_embd"] * model["context_length"]


def mfu(flops_per_token: int, device_name: str, n_devices: int) -> Callable[[float], dict]:
    """Model FLOPs utilisation from tokens per second: the used fraction of the known peak."""
    peaks = [peak for name, peak in PEAK_FLOPS.items() if name in device_name]
    if not peaks:
        return lambda tokens_per_second: {}
    peak = peaks[0] * n_devices
    return lambda tokens_per_second: {"mfu": tokens_per_second * flops_per_token / peak}


def check_finite(step: int, **numbers: float) -> None:
    """Raise ArithmeticError, before weights are touched or saved, if a number is not finite."""
    if not all(map(math.isfinite, numbers.values())):
        shown = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise ArithmeticError(
            f"after step {step} a number is not finite ({shown}), so training stopped: lower the "
            "learning rate, then go on from the last checkpoint, if there is one, with --resume"
        )
