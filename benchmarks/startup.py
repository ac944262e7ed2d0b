"""How long one waits for the first token, beside the import of torch alone."""

import re
import statistics
from pathlib import Path

from benchmarks.runs import python, run
from benchmarks.table import Row, ratio

ROUNDS = 5
TOKEN = re.compile(r"^ *\d+\.\d% ")  # of sample.py --show_top=1, which ends a line at each token


def start_rows(run_dir: Path, device: str) -> list[Row]:
    """Seconds from the start of each process, in turn: medians, and their ratio."""
    sample = python("sample.py", f"--out_dir={run_dir.resolve()}", "--show_top=1")
    commands = {
        "import torch": (python("-c", "import torch; print('0.0% imported')")),
        "first token of sample.py": [*sample, f"--device={device}"],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            taken[name].append(seconds_to_token(command))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    alone = medians["import torch"]
    return [
        {"until": name, "seconds": seconds, "over the import": ratio(seconds, alone)}
        for name, seconds in medians.items()
    ]


def seconds_to_token(command: list[str]) -> float:
    lines = run(command, until=lambda line: TOKEN.match(line.text) is not None).lines
    return next(line.seconds for line in lines if TOKEN.match(line.text))
