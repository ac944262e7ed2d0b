"""`bench.py whole`: what a config costs from the start of the process to its end, and its loss."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ours, table
from benchmarks.runs import temporary_folder
from benchmarks.table import Row, Tables
from engine.cli import at_least

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class WholeBench:
    """Train all of a config, without samples, once for each seed."""

    config: Path
    """A config of train.py, such as config/quickstart.toml."""
    repeats: int = 3
    """Seeds, from 1337 on."""
    flags: str = ""
    """More flags for train.py, in one string."""

    def __post_init__(self) -> None:
        at_least(1, self, "repeats")


def measure(config: WholeBench) -> Tables:
    rows = [train(config, seed) for seed in range(1337, 1337 + config.repeats)]
    return {"runs": rows, "median": [table.medians(rows)]}


def train(config: WholeBench, seed: int) -> Row:
    """One run, with the loss on the whole validation split that it prints."""
    with temporary_folder() as folder:
        flags = (f"--seed={seed}", *shlex.split(config.flags))
        trained = ours.train(config.config, folder / "run", *flags)
    return {
        "seed": str(seed),
        "whole process s": trained.finished.seconds,
        "training steps s": trained.updates[-1]["elapsed_seconds"],
        "loss": trained.val_loss,
        "bits per byte": trained.bits_per_byte,
        "peak MiB": trained.peak_bytes / MEBIBYTE,
    }
