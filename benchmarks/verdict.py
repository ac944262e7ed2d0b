"""The outcome of a race: every model judged by one evaluator, then medians and ratios."""

import json
import statistics
from dataclasses import dataclass, field
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
    steps: int
    """Updates, of ours; 0 of theirs."""
    finished: Finished
    model: Path
    """Folder of our run, or nanoGPT's checkpoint."""
    result: dict[str, float] = field(default_factory=dict)
    """What the evaluator says of it."""

    def row(self) -> Row:
        return {
            "run": self.side,
            "seed": str(self.seed),
            "steps": self.steps or None,
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
    sooner = reached(entries)
    rows: list[tuple[str, Any, Any]] = [
        ("whole process, s", theirs["seconds"], own["seconds"]),
        ("loss on the whole validation split", theirs["loss"], own["loss"]),
        (
            "time to nanoGPT's final loss, s",
            theirs["seconds"],
            f"not reached: {cell(own['loss'])}" if sooner is None else sooner["seconds"],
        ),
        ("time of the run of equal time, s", theirs["seconds"], equal["seconds"]),
        ("loss at equal time", theirs["loss"], equal["loss"]),
        ("parameters", theirs["parameters"], own["parameters"]),
    ]
    if target:
        times = seconds_to(entries, THEM, target), seconds_to(entries, US, target)
        rows.append((f"time to its own first {target} nats, s", *times))
    return [{"median": what, THEM: a, US: b, "ratio": ratio(a, b)} for what, a, b in rows]


def reached(entries: list[Entry]) -> dict[str, float] | None:
    """Medians of our shortest runs that end at most at the other's loss, if any do."""
    theirs = side(entries, THEM)["loss"]
    own = [entry for entry in entries if entry.side not in (THEM, US_EQUAL)]
    budgets = dict.fromkeys(entry.steps for entry in own)
    ours_by_steps = (medians([e for e in own if e.steps == steps]) for steps in budgets)
    return next((found for found in ours_by_steps if found["loss"] <= theirs), None)


def side(entries: list[Entry], name: str) -> dict[str, float]:
    """Medians of one side."""
    return medians([entry for entry in entries if entry.side == name])


def medians(own: list[Entry]) -> dict[str, float]:
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
