"""`bench.py dial`: the constants of engine/recipe.py's expected loss, fitted to short runs."""

import itertools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

import files
from benchmarks.runs import temporary_folder
from benchmarks.table import Output, Row, Tables
from benchmarks.training import train
from cli import read_toml
from data.loader import Dataset
from engine import recipe
from engine.count import product_weights
from engine.trial import PILOT_LAYERS, hardness
from model import ModelConfig

CONFIG = "config/modern.toml"
CONTEXT_LENGTH = 256
# Layers, and million tokens
SIZES = ((2, 0.06), (2, 0.125), (2, 0.25), (2, 0.5), (2, 1.0), (2, 2.0), (3, 1.0), (3, 3.0))
LEAST_GROWTH = 0.4  # of the tokens in the pairs of the fit, which compare sizes as well
PILOT_GROWTH = 7  # from a pilot to its run
MOST_GROWTH = 50
START = (0.35, 0.5, 0.4, 0.4, 0.3)  # of the fit


@dataclass(frozen=True)
class Point:
    """A finished run."""

    text: str
    hardness: float
    n_layer: int
    product_weights: int
    n_tokens: int
    n_unique: int
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
        rows: list[Row] = []
        for text in sorted({point.text for point in points}):
            of_others = fit([point for point in points if point.text != text])
            rows.append({"text left out": text} | errors(of_others, points, text))
        return {"fit": [dict(zip("abcαβ", fit(points), strict=True))], "new": rows}


def run(path: Path, n_layer: int, n_tokens: int) -> Point:
    """Train by the recipe on so many tokens."""
    dataset = Dataset.open(path)
    n_unique = len(dataset.tokens("train"))
    batch_size = recipe.planned_batch(n_tokens, CONTEXT_LENGTH)
    max_steps = max(1, round(n_tokens / (batch_size * CONTEXT_LENGTH)))
    n_tokens = max_steps * batch_size * CONTEXT_LENGTH
    model = read_toml(CONFIG)["model"] | {"vocab_size": dataset.vocab_size, "n_layer": n_layer}
    weights = product_weights(ModelConfig(**model))
    dropout, decay = recipe.regularisation(weights, n_tokens, n_unique, dataset.bytes_per_token)
    flags = [f"--model.n_layer={n_layer}", f"--batch_size={batch_size}", f"--max_steps={max_steps}"]
    flags += [f"--model.dropout={dropout}", f"--optim.muon_weight_decay={decay}"]
    with temporary_folder() as folder:
        row = train(Path(CONFIG), folder, f"--data.path={path.resolve()}", *flags)
    sizes = (n_layer, weights, n_tokens, n_unique)
    return Point(path.name, hardness(dataset), *sizes, row["loss"])


def pairs(points: list[Point], least_growth: float) -> list[tuple[Point, Point]]:
    """Return each run of a pilot's size with the others on its text, as many times as long."""
    pilots = (p for p in points if p.n_layer == PILOT_LAYERS)
    every = ((a, b) for a, b in itertools.product(pilots, points) if a.text == b.text and a != b)
    return [(a, b) for a, b in every if least_growth < b.n_tokens / a.n_tokens < MOST_GROWTH]


def columns(found: list[tuple[Point, Point]]) -> tuple[recipe.Pilot, list[Tensor]]:
    """Return the pilots of the pairs, and sizes and losses of their runs."""

    def column(name: str, i: int) -> Tensor:
        return torch.tensor([getattr(pair[i], name) for pair in found], dtype=torch.float64)

    pilot = recipe.Pilot(*(column(field.name, 0) for field in fields(recipe.Pilot)))
    return pilot, [column(n, 1) for n in ("product_weights", "n_tokens", "n_unique", "loss")]


def log_ratios(constants: Tensor, pilot: recipe.Pilot, runs: list[Tensor]) -> Tensor:
    """Return ln(expected / measured loss) of runs after their pilots."""
    *sizes, loss = runs
    return (recipe.expected_loss(pilot, *sizes, law=constants) / loss).log()


def fit(points: list[Point]) -> list[float]:
    """Return the constants of least squares, in which each text counts the same."""
    of_texts = [[p for p in points if p.text == t] for t in sorted({p.text for p in points})]
    found = [columns(pairs(some, LEAST_GROWTH)) for some in of_texts]
    logs = torch.tensor(START, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        means = [log_ratios(logs.exp(), *some).square().mean() for some in found]
        value = torch.stack(means).mean()
        value.backward()
        return value.item()

    optimizer.step(loss)
    return logs.detach().exp().tolist()


def errors(constants: list[float], points: list[Point], text: str) -> Row:
    """Return by how much the expected losses of a text differ from the measured ones."""
    found = pairs([point for point in points if point.text == text], PILOT_GROWTH)
    ratios = log_ratios(torch.tensor(constants, dtype=torch.float64), *columns(found)).exp() - 1
    mean, spread = ratios.mean().item(), ratios.square().mean().sqrt().item()
    return {"pairs": len(found), "mean %": 100 * mean, "root mean square %": 100 * spread}
