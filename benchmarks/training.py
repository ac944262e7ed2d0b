"""`bench.py train`, `whole` and `ablate`: run train.py again and again, and tabulate."""

import itertools
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.runs import python, run, seconds_of, temporary_folder
from benchmarks.table import MEBIBYTE, Repeated, Row, Tables, medians
from cli import read_toml
from engine import count, metrics
from engine.device import DTYPES, find_device
from sampling.load import load_model

SETTLING_STEPS = 5  # at the start, in which train.py compiles, allocates and warms caches
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # large enough to reach the full rate
PRODUCTS = 9
FIRST_SEED = 1337
RECIPE = "the recipe"
WITHOUT = Path(__file__).with_name("ablate.toml")


def train(config: Path, out_dir: Path, *flags: str) -> Row:
    """Train in a process of its own, without samples; return its time, memory and loss."""
    command = python("train.py", config.resolve(), f"--out_dir={out_dir}", "--samples=0", *flags)
    finished = run(command)
    lines = metrics.read(out_dir / "metrics.jsonl")
    steps = milliseconds(lines)
    low, middle, high = np.quantile(settled(steps), [0.1, 0.5, 0.9]).tolist()
    last = {"peak_memory_bytes": finished.peak_bytes}  # a GPU's allocator logs its own
    for line in lines:
        last |= line
    return {
        "steps": len(steps),
        "whole process s": finished.seconds,
        "training steps s": sum(steps) / 1000,
        "step ms": middle,
        "10 % below, ms": low,
        "90 % below, ms": high,
        "peak MiB": last["peak_memory_bytes"] / MEBIBYTE,
        "loss": last["val_loss"],
        "bits per byte": last["val_bits_per_byte"],
    }


def milliseconds(lines: list[dict[str, float]]) -> list[float]:
    """Return the time of each step in a log."""
    elapsed = [0.0, *(line["elapsed_seconds"] for line in lines if "train_loss" in line)]
    return [1000 * (after - before) for before, after in itertools.pairwise(elapsed)]


def settled(steps: list[float]) -> list[float]:
    """Return the times of the steps that count, if there are any."""
    return steps[SETTLING_STEPS:] or steps


def steps_within(row: Row, seconds: float) -> int:
    """Return how many updates a process can do in this time, judging by a run."""
    step_seconds = row["training steps s"] / row["steps"]
    others = row["whole process s"] - row["training steps s"]
    return max(1, int((seconds - others) / step_seconds))


@dataclass(frozen=True, kw_only=True)
class Train(Repeated):
    """Measure tokens/s, step time, memory and MFU of a config, over a few updates."""

    config: Path
    """A config of train.py, such as config/shakespeare_char_laptop.toml."""
    flags: str = ""
    """More flags for train.py, in one string."""
    steps: int = 30
    """Updates per run, of which the first ones do not count; 0 takes those of the config."""

    def measure(self) -> Tables:
        """Train once for each seed."""
        rows = [self.row(FIRST_SEED + n) for n in range(self.repeats)]
        return {"runs": rows, "median": [medians(rows)]}

    def row(self, seed: int, more_flags: str = "") -> Row:
        """Train, then multiply large matrices."""
        flags = [f"--seed={seed}", *shlex.split(f"{self.flags} {more_flags}")]
        if self.steps:
            few = (f"--max_steps={self.steps}", f"--eval_every={self.steps}", "--eval_tokens=2")
            flags += ["--minutes=0", *few]
        with temporary_folder() as folder:
            row: Row = {"seed": str(seed)}
            row |= train(self.config, folder, *flags)
            return row | utilisation(folder, row["step ms"] / 1000)


@dataclass(frozen=True, kw_only=True)
class Whole(Train):
    """Measure whole runs of a config: all that `train` does, and the loss that they reach."""

    steps: int = 0
    """Updates per run; 0 takes those of the config."""


def utilisation(out_dir: Path, step_seconds: float) -> Row:
    """Return the speed of a run, and its MFU: its share of the machine's matrix products."""
    settings, model = read_toml(str(out_dir / "config.toml")), load_model(out_dir, "last").model
    device, precision = find_device(settings["device"]), settings["precision"]
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    known = count.peak_flops(gpu, precision)
    peak = known or matrix_flops(device, precision)
    tokens_per_second = settings["batch_size"] * model.config.context_length / step_seconds
    flops = tokens_per_second * count.flops_per_token(model.config)
    return {
        "parameters": count.count_parameters(model)["total"],
        "tokens/s": tokens_per_second,
        "TFLOP/s": flops / 1e12,
        "machine's TFLOP/s": peak / 1e12,
        "of": f"{'measured' if known is None else 'data sheet'}, {precision}",
        "MFU": flops / peak,
    }


def matrix_flops(device: str, precision: str) -> float:
    """Return the FLOP/s of products of large square matrices: the median of a few."""
    n = MATRIX_SIZE[device]
    a_NN, b_NN = torch.randn(2, n, n, device=device, dtype=DTYPES[precision])
    # item() waits for a GPU, and the first product warms up
    seconds = [seconds_of(lambda: (a_NN @ b_NN)[0, 0].item()) for _ in range(1 + PRODUCTS)]
    return 2 * n**3 / statistics.median(seconds[1:])


@dataclass(frozen=True, kw_only=True)
class Ablate(Whole):
    """Measure the loss without each choice of the recipe, at equal time."""

    config: Path = Path("config/race_cpu.toml")
    """A config of the recipe."""

    def measure(self) -> Tables:
        """Time every variant in turn, then train each for as long as the recipe takes.

        The steps come from each variant's fastest run: other processes only slow it down.
        """
        variants = read_toml(str(WITHOUT))
        timed = [self.turn(0, variants) for _ in range(self.repeats)]
        fastest = {
            name: min((turn[name] for turn in timed), key=lambda row: row["whole process s"])
            for name in variants
        }
        seconds = fastest[RECIPE]["whole process s"]
        for name, row in fastest.items():
            steps = steps_within(row, seconds)
            variants[name] += f" --max_steps={steps} --eval_every={steps}"
        turns = [self.turn(1 + n, variants) for n in range(self.repeats)]
        rows: list[Row] = []
        for name in variants:
            losses = [turn[name]["loss"] for turn in turns]
            row: Row = {"without": name, "steps": turns[0][name]["steps"]}
            row |= {"loss": statistics.mean(losses), "spread": max(losses) - min(losses)}
            rows.append(row)
        return {"loss at equal time": rows}

    def turn(self, seed: int, variants: dict[str, str]) -> dict[str, Row]:
        """Train each variant once."""
        return {name: self.row(seed, flags) for name, flags in variants.items()}
