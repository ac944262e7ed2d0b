"""`bench.py train`: how fast a config trains here, and how near that is to what is possible."""

import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ours, table
from benchmarks.machine import probe
from benchmarks.ours import SETTLING_STEPS, Trained
from benchmarks.runs import temporary_folder
from benchmarks.table import Row, Tables
from engine.cli import at_least

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """Measure tokens/s, step time, memory and MFU of a config."""

    config: Path
    """A config of train.py, such as config/quickstart.toml."""
    steps: int = 30
    """Updates per repeat; the first ones do not count."""
    repeats: int = 3
    """Runs, each followed by a measurement of the machine's own rate."""
    flags: str = ""
    """More flags for train.py, in one string."""

    def __post_init__(self) -> None:
        at_least(2 * SETTLING_STEPS, self, "steps")
        at_least(1, self, "repeats")


def measure(config: TrainBench) -> Tables:
    """Train a few steps again and again, in turn with products of large matrices."""
    rows: list[Row] = []
    for repeat in range(config.repeats):
        with temporary_folder() as folder:
            flags = (*few_steps(config.steps), f"--seed={repeat}", *shlex.split(config.flags))
            trained = ours.train(config.config, folder / "run", *flags)
            rows.append(throughput(trained, probe(trained.out_dir)))
    return {"runs": rows, "median": [table.medians(rows)]}


def few_steps(steps: int) -> tuple[str, ...]:
    """Flags for a run that is only timed: it evaluates once, on hardly anything."""
    return (f"--max_steps={steps}", f"--eval_every={steps}", "--eval_tokens=2")


def throughput(trained: Trained, probed: dict[str, Any]) -> Row:
    """The speed of a run, and its MFU: the fraction of the machine's matrix products per second."""
    steps = trained.step_seconds
    tokens_per_second = trained.tokens_per_step / statistics.median(steps)
    flops = tokens_per_second * probed["flops_per_token"]
    return {
        "tokens/s": tokens_per_second,
        "step ms": 1000 * statistics.median(steps),
        "10 % below, ms": 1000 * percentile(steps, 10),
        "90 % below, ms": 1000 * percentile(steps, 90),
        "peak MiB": trained.peak_bytes / MEBIBYTE,
        "whole process s": trained.finished.seconds,
        "parameters": probed["parameters"],
        "TFLOP/s": flops / 1e12,
        "machine's TFLOP/s": probed["machine_flops"] / 1e12,
        "of": f"{'data sheet' if probed['is_known_peak'] else 'measured'}, {probed['precision']}",
        "MFU": flops / probed["machine_flops"],
    }


def percentile(values: list[float], percent: int) -> float:
    """The value that `percent` % of the values are at most."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
