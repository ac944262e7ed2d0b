"""The outcome of a race: every model judged by one evaluator, then medians and ratios."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import nanogpt, ours
from benchmarks.nanogpt import Checkout
from benchmarks.runs import Finished, python, run
from benchmarks.table import Row, cell, ratio

THEM, US, US_EQUAL = "nanoGPT", "ours", "ours, equal time"


@dataclass
class Entry:
    """One run of either side."""

    side: str
    seed: int
    finished: Finished
    model: Path
    """Folder of our run, or nanoGPT's checkpoint."""
    result: dict[str, float]
    """What the evaluator says of it."""

    def row(self) -> Row:
        return {
            "run": self.side,
            "seed": str(self.seed),
            "whole process s": self.finished.seconds,
            "loss": self.result["loss"],
            "parameters": int(self.result["parameters"]),
        }


def judge(entries: list[Entry], data: Path, checkout: Checkout, *flags: str) -> None:
    """Let one process evaluate every model."""
    own = [entry for entry in entries if entry.side != THEM]
    other = [entry for entry in entries if entry.side == THEM]
    command = python("-m", "benchmarks.evaluator", f"--data={data}", *flags)
    command += [f"--nanogpt={checkout.folder}", "--ours", *(str(entry.model) for entry in own)]
    command += ["--theirs", *(str(entry.model) for entry in other)] if other else []
    lines = run(command).lines[-len(entries) :]
    for entry, line in zip([*own, *other], lines, strict=True):
        entry.result = json.loads(line.text)


def summary(entries: list[Entry], target: float) -> list[Row]:
    """The race in a few lines: medians over the rounds, and how many times less ours is."""
    theirs, own, equal = (side(entries, name) for name in (THEM, US, US_EQUAL))
    reached = (
        own["seconds"] if own["loss"] <= theirs["loss"] else f"not reached: {cell(own['loss'])}"
    )
    rows: list[tuple[str, Any, Any]] = [
        ("whole process, s", theirs["seconds"], own["seconds"]),
        ("loss on the whole validation split", theirs["loss"], own["loss"]),
        ("time to nanoGPT's final loss, s", theirs["seconds"], reached),
        ("time of the run of equal time, s", theirs["seconds"], equal["seconds"]),
        ("loss at equal time", theirs["loss"], equal["loss"]),
        ("parameters", theirs["parameters"], own["parameters"]),
    ]
    if target:
        times = seconds_to(entries, THEM, target), seconds_to(entries, US, target)
        rows.append((f"time to its own first {target} nats, s", *times))
    return [{"median": what, THEM: a, US: b, "ratio": ratio(a, b)} for what, a, b in rows]


def side(entries: list[Entry], name: str) -> dict[str, float]:
    """Medians of one side."""
    own = [entry for entry in entries if entry.side == name]
    return {
        "seconds": statistics.median(entry.finished.seconds for entry in own),
        "loss": statistics.median(entry.result["loss"] for entry in own),
        "parameters": int(own[0].result["parameters"]),
    }


def seconds_to(entries: list[Entry], name: str, target: float) -> float | str:
    """Median time until a run printed an evaluation of at most `target`."""
    pattern = nanogpt.EVALUATION if name == THEM else ours.EVALUATION
    found = [e.finished.seconds_to(pattern, target) for e in entries if e.side == name]
    reached = [seconds for seconds in found if seconds is not None]
    return statistics.median(reached) if len(reached) == len(found) else "not reached"
