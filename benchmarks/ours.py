"""Our side of a measurement: train.py and data.prepare as child processes, and what they log."""

import itertools
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs import Finished, python, run
from engine import metrics

EVALUATION = re.compile(r"^step +\d+: validation loss ([\d.]+)")
SETTLING_STEPS = 5  # at the start, which compile, allocate and warm caches


@dataclass(frozen=True)
class Trained:
    """A finished run of train.py."""

    out_dir: Path
    finished: Finished
    updates: list[dict[str, float]]
    """The lines of metrics.jsonl that are updates."""
    val_loss: float
    """Of the last evaluation, on the whole validation split."""
    bits_per_byte: float
    """The same."""

    @property
    def step_seconds(self) -> list[float]:
        """Of each update but the first ones."""
        elapsed = [0.0, *(update["elapsed_seconds"] for update in self.updates)]
        steps = [after - before for before, after in itertools.pairwise(elapsed)]
        return steps[SETTLING_STEPS:] or steps

    @property
    def tokens_per_step(self) -> int:
        """Of the last update, whose rate and time are both in the log."""
        before = self.updates[-2]["elapsed_seconds"] if len(self.updates) > 1 else 0.0
        last = self.updates[-1]
        return round(last["tokens_per_second"] * (last["elapsed_seconds"] - before))

    @property
    def peak_bytes(self) -> float:
        """The allocator's peak on a GPU, if the run logged it; else the process's."""
        logged = [u["peak_memory_bytes"] for u in self.updates if "peak_memory_bytes" in u]
        return max(logged, default=self.finished.peak_bytes)

    def steps_within(self, seconds: float) -> int:
        """How many updates a whole process has time for, by the measure of this one.

        What it took beyond as many settled updates is start-up, compilation, evaluation, saving.
        """
        settled = statistics.fmean(self.step_seconds)
        others = self.finished.seconds - settled * len(self.updates)
        return max(1, int((seconds - others) / settled))


def train(config: Path, out_dir: Path, *flags: str, **how: Any) -> Trained:
    """Train in a process of its own, without samples; `how` goes to `runs.run`."""
    command = python("train.py", config.resolve(), f"--out_dir={out_dir}", "--samples=0", *flags)
    finished = run(command, **how)
    lines = metrics.read(out_dir / "metrics.jsonl")
    updates = [line for line in lines if "train_loss" in line]
    last = [line for line in lines if "val_loss" in line][-1]
    return Trained(out_dir, finished, updates, last["val_loss"], last["val_bits_per_byte"])


def prepare(text: Path, tokenizer: str, out: Path, *flags: str, **how: Any) -> Finished:
    """Run data.prepare in a process of its own."""
    text = text.resolve()
    command = python("-m", "data.prepare", text, f"--tokenizer={tokenizer}", f"--out={out}", *flags)
    return run(command, **how)
