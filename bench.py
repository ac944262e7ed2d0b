"""Measure what the README claims, on your machine: each command prints its tables.

    python bench.py train config/race_cpu.toml           # tokens/s, step time, memory, MFU
    python bench.py race --nanogpt=PATH --text=FILE      # the same text against nanoGPT's code
    python bench.py whole config/quickstart.toml         # a whole run: its seconds and its loss
    python bench.py ablate                               # what each choice of the recipe is worth
    python bench.py prepare                              # MB/s of each tokenizer
    python bench.py sample                               # generated tokens/s, and their limit
    python bench.py stories                              # what a model has learned from stories
    python bench.py dial                                 # the fit of the losses that minutes give
    python bench.py scale --data=DATASET                 # sizes, processes, and a cluster's needs
    python bench.py check --text=FILE                    # does this device compute what a CPU does
    python bench.py gpu --nanogpt=PATH --text=FILE --shakespeare=FILE    # all that needs a GPU
    python bench.py table                                # the recorded results as markdown

All but table take --help, and --json=FILE to add a record to a file, such as docs/results.json.
Training and preparation are measured from outside, as whole processes.
"""

import importlib
import shlex
import signal
import sys
from datetime import UTC, datetime

import cli
import files
from benchmarks import table

MEASUREMENTS = {  # where each command is, and what describes it
    "train": ("training", "Train"),
    "race": ("race", "Race"),
    "whole": ("training", "Whole"),
    "ablate": ("training", "Ablate"),
    "prepare": ("preparation", "Prepare"),
    "stories": ("stories", "Stories"),
    "sample": ("generation", "Sample"),
    "dial": ("dial", "Dial"),
    "scale": ("scale", "Scale"),
    "check": ("check", "Check"),
    "gpu": ("gpu", "Gpu"),
}


def main() -> None:
    """Run the command that the first argument names."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # end as by Ctrl-C
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        print(__doc__)
    elif command == "table":
        print("\n\n".join(map(table.report, table.read(table.RESULTS))))
    elif command in MEASUREMENTS:
        measure(command, arguments)
    else:
        names = ", ".join([*MEASUREMENTS, "table"])
        raise ValueError(f"bench.py measures {names}: got {command}; see bench.py --help")


def measure(command: str, arguments: list[str]) -> None:
    """Measure, print the tables, and keep the record where that is asked for."""
    module, kind = MEASUREMENTS[command]
    config_type = getattr(importlib.import_module(f"benchmarks.{module}"), kind)
    is_config = arguments[:1] != [] and not arguments[0].startswith("-")
    flags = [f"--config={arguments[0]}", *arguments[1:]] if is_config else arguments
    config = cli.parse_config(config_type, flags)  # a config is measured, not read as flags
    if config.json:
        files.check_writable(config.json)
    record = {
        "benchmark": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "bench.py", command, *arguments]),
        "tables": config.measure(),
        "machine": table.describe_machine(),
    }
    print(table.report(record))
    if config.json:
        table.add(config.json, record)


if __name__ == "__main__":
    cli.run(main)
