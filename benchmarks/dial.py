"""`bench.py dial`: the constants of engine/recipe.py's expected loss, fitted to short runs."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import files
from benchmarks.runs import temporary_folder
from benchmarks.table import Output, Row, Tables
from benchmarks.training import train
from data.loader import Dataset
from engine import recipe
from engine.count import product_weights
from engine.trial import PILOT_LAYERS, hardness
from sampling.load import load_model

CONTEXT_LENGTH = 256
SIZES = ((2, 0.125), (2, 0.25), (2, 0.5), (3, 0.5), (2, 1.0), (3, 1.0))  # layers, million tokens
MOST_PILOT_TOKENS = 300_000
FITTED = ("FLOOR", "SIZE", "ALPHA", "BETA")  # of engine/recipe.py


@dataclass(frozen=True)
class Point:
    """A finished run."""

    text: str
    hardness: float
    n_layer: int
    product_weights: int
    n_tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Dial(Output):
    """Fit the expected loss to runs, and try it on each text with the fit of the others."""

    data: tuple[Path, ...] = ()
    """Prepared datasets to make new runs of, which are added to the others."""
    runs: Path = Path("docs/dial.json")
    """File of all runs."""

    def measure(self) -> Tables:
        """Make the new runs, then fit."""
        points = [Point(**row) for row in json.loads(self.runs.read_text(encoding="utf-8"))]
        for path, (n_layer, millions) in itertools.product(self.data, SIZES):
            points.append(run(path, n_layer, round(millions * 1e6)))
            lines = ",\n".join(json.dumps(asdict(point)) for point in points)
            files.write_text(self.runs, f"[{lines}]\n")
        texts = sorted({point.text for point in points})
        rows: list[Row] = []
        for text in texts:
            of_others = fit([point for point in points if point.text != text])
            rows.append({"text left out": text} | errors(of_others, points, text))
        constants = fit(points)
        every = [{"text": text} | errors(constants, points, text) for text in texts]
        return {"fit": [dict(zip(FITTED, constants, strict=True))], "with all": every, "new": rows}


def run(path: Path, n_layer: int, n_tokens: int) -> Point:
    """Train by the recipe on so many tokens."""
    batch_size = recipe.planned_batch(n_tokens, CONTEXT_LENGTH)
    max_steps = round(n_tokens / (batch_size * CONTEXT_LENGTH))
    sizes = {"model.n_layer": n_layer, "batch_size": batch_size, "max_steps": max_steps}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    with temporary_folder() as folder:
        config = Path("config/modern.toml")
        row = train(config, folder, f"--data.path={path.resolve()}", *flags)
        weights = product_weights(load_model(folder, "last").model.config)
    n_tokens = max_steps * batch_size * CONTEXT_LENGTH
    return Point(path.name, hardness(Dataset.open(path)), n_layer, weights, n_tokens, row["loss"])


def pairs(points: list[Point]) -> list[tuple[Point, Point]]:
    """Return each pilot with each longer run on its text."""
    pilots = [p for p in points if p.n_layer == PILOT_LAYERS and p.n_tokens < MOST_PILOT_TOKENS]
    every = itertools.product(pilots, points)
    return [(a, b) for a, b in every if a.text == b.text and b.n_tokens > 1.9 * a.n_tokens]


def log_ratios(constants: Tensor, found: list[tuple[Point, Point]]) -> Tensor:
    """Return ln(expected / measured loss) of the longer run of each pair."""
    floor, size, alpha, beta = constants

    def column(get: Callable[[Point], float], i: int) -> Tensor:
        return torch.tensor([get(pair[i]) for pair in found], dtype=torch.float64)

    def reducible(i: int) -> Tensor:
        weights, tokens = column(lambda p: p.product_weights, i), column(lambda p: p.n_tokens, i)
        return recipe.reducible(weights, tokens, size, alpha, beta)

    lowest = floor * column(lambda p: p.hardness, 0)
    expected = lowest + (column(lambda p: p.loss, 0) - lowest) * reducible(1) / reducible(0)
    return expected.clamp(min=1e-3).log() - column(lambda p: p.loss, 1).log()


def fit(points: list[Point]) -> list[float]:
    """Return the constants of least squares."""
    found = pairs(points)
    start = [getattr(recipe, name) for name in FITTED]
    logs = torch.tensor(start, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = log_ratios(logs.exp(), found).square().mean()
        value.backward()
        return value.item()

    optimizer.step(loss)
    return logs.detach().exp().tolist()


def errors(constants: list[float], points: list[Point], text: str) -> Row:
    """Return by how much the expected losses of a text differ from the measured ones."""
    found = pairs([point for point in points if point.text == text])
    ratios = log_ratios(torch.tensor(constants, dtype=torch.float64), found).exp() - 1
    return {
        "pairs": len(found),
        "mean %": 100 * ratios.mean().item(),
        "root mean square %": 100 * math.sqrt(ratios.square().mean().item()),
    }
