"""Measure what the README claims, on your machine: each command prints its table.

    python bench.py train config/quickstart.toml         # tokens/s, step time, memory, MFU
    python bench.py race --nanogpt=PATH --text=FILE      # the same text against nanoGPT's code
    python bench.py whole config/quickstart.toml         # a whole run: its seconds and its loss
    python bench.py ablate                               # what each choice of the recipe is worth
    python bench.py prepare                              # MB/s of each tokenizer
    python bench.py sample                               # generated tokens/s, and their limit
    python bench.py stories                              # what a model has learned from stories
    python bench.py gpu --nanogpt=PATH --text=FOLDER     # all that needs a GPU, in ten minutes
    python bench.py table                                # the recorded results as markdown

Every command takes --help, --json=FILE to write its record there, and --record to add it to
docs/results.json. Everything is measured in child processes, from their start to their end.
"""

import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import (
    ablation,
    generation,
    gpu,
    machine,
    preparation,
    race,
    stories,
    table,
    training,
    whole,
)
from benchmarks.table import RESULTS, Tables
from engine import cli, files


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go besides the screen."""

    json: Path | None = None
    """File for the record of this measurement."""
    record: bool = False
    """Add the record to docs/results.json."""


@dataclass(frozen=True, kw_only=True)
class Train(training.TrainBench, Output):
    """Measure tokens/s, step time, memory and MFU of a config."""


@dataclass(frozen=True, kw_only=True)
class Race(race.RaceBench, Output):
    """Race nanoGPT's own code on a text: time, loss, and ratios."""


@dataclass(frozen=True, kw_only=True)
class Whole(whole.WholeBench, Output):
    """Measure whole runs of a config: seconds and loss."""


@dataclass(frozen=True, kw_only=True)
class Ablate(ablation.AblateBench, Output):
    """Measure the loss without each choice of the recipe, at equal time."""


@dataclass(frozen=True, kw_only=True)
class Prepare(preparation.PrepareBench, Output):
    """Measure data.prepare with every tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Stories(stories.StoriesBench, Output):
    """Judge a run of config/stories.toml: loss, pronouns, heads."""


@dataclass(frozen=True, kw_only=True)
class Sample(generation.SampleBench, Output):
    """Measure prefill and decode tokens/s, beside the limit that the memory sets."""


@dataclass(frozen=True, kw_only=True)
class Gpu(gpu.GpuBench, Output):
    """Measure all that needs a GPU, within a few minutes."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Print the recorded results as markdown."""

    results: Path = RESULTS
    """File of records."""


MEASUREMENTS: dict[str, tuple[type[Output], Callable[[Any], Tables]]] = {
    "train": (Train, training.measure),
    "race": (Race, race.measure),
    "whole": (Whole, whole.measure),
    "ablate": (Ablate, ablation.measure),
    "prepare": (Prepare, preparation.measure),
    "stories": (Stories, stories.measure),
    "sample": (Sample, generation.measure),
    "gpu": (Gpu, gpu.measure),
}


def main() -> None:
    """Run the command that the first argument names."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # end as by Ctrl-C
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("--help", "-h"):
        print(__doc__)
    elif command == "table":
        print_table(cli.parse_config(Table, arguments))
    elif command in MEASUREMENTS:
        measure(command, arguments)
    else:
        names = ", ".join([*MEASUREMENTS, "table"])
        raise ValueError(f"bench.py measures {names}: got {command}; see bench.py --help")


def measure(command: str, arguments: list[str]) -> None:
    """Measure, print the tables, and keep the record where that is asked for."""
    config_type, function = MEASUREMENTS[command]
    config = cli.parse_config(config_type, with_flag(arguments))
    if config.json:
        files.check_writable(config.json)
    record = {
        "benchmark": command,
        "date": machine.today(),
        "command": shlex.join(["python", "bench.py", command, *arguments]),
        "machine": machine.describe(),
        "tables": function(config),
    }
    print(table.report(record))
    if config.json:
        table.write(config.json, record)
    if config.record:
        table.append(RESULTS, record)


def with_flag(arguments: list[str]) -> list[str]:
    """`a.toml --steps=30` -> `--config=a.toml --steps=30`: it is measured, not read as flags."""
    if arguments and not arguments[0].startswith("-"):
        return [f"--config={arguments[0]}", *arguments[1:]]
    return arguments


def print_table(config: Table) -> None:
    records = table.read(config.results)
    if not records:
        raise ValueError(f"{config.results} holds no results yet: measure with --record")
    print("\n\n".join(map(table.report, records)))


if __name__ == "__main__":
    cli.run(main)
