"""`bench.py ablate`: what each choice of the recipe is worth, in loss at equal time."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ours
from benchmarks.ours import Trained
from benchmarks.runs import temporary_folder
from benchmarks.table import Row, Tables
from engine.cli import at_least

RECIPE = "the recipe"
WITHOUT: dict[str, tuple[str, ...]] = {
    RECIPE: (),
    "AdamW for all, at 3e-3": ("--optim.name=adamw", "--optim.learning_rate=3e-3"),
    "embeddings and norms at the head's rate": ("--optim.embedding_learning_rate=3e-3",),
    "GPT-2's architecture": ("--model.architecture=gpt2", "--model.tie_embeddings=True"),
    "the head tied to the embedding": ("--model.tie_embeddings=True",),
    "heads of 32 channels, not 64": ("--model.n_head=4",),
    "float32, not bfloat16": ("--precision=float32",),
    "Muon's momentum 0.95": ("--optim.muon_momentum=0.95",),
    "a constant rate, no decay": ("--optim.decay_fraction=0",),
    "weight decay 0.1": ("--optim.weight_decay=0.1", "--optim.muon_weight_decay=0.1"),
    "gradients clipped at 1": ("--optim.grad_clip=1",),
}


@dataclass(frozen=True, kw_only=True)
class AblateBench:
    """Train a config, then again without each of its choices, for as long."""

    config: Path = Path("config/race_cpu.toml")
    """A config of the recipe."""
    data: Path = Path("data/shakespeare_char")
    """A prepared dataset."""
    repeats: int = 3
    """Seeds."""

    def __post_init__(self) -> None:
        at_least(1, self, "repeats")


def measure(config: AblateBench) -> Tables:
    """Train every variant with every seed, in turn, each as long as the recipe takes."""
    losses: dict[str, list[float]] = {name: [] for name in WITHOUT}
    with temporary_folder() as folder:
        steps = steps_of_equal_time(config, folder)
        for seed in range(1, config.repeats + 1):
            for name, flags in WITHOUT.items():
                few = (f"--max_steps={steps[name]}", f"--eval_every={steps[name]}")
                out_dir = folder / f"{seed}_{len(losses[name])}_{steps[name]}"
                trained = ours.train(config.config, out_dir, *common(config, seed), *flags, *few)
                losses[name].append(trained.val_loss)
    return {"loss at equal time": [row(name, steps[name], losses[name]) for name in WITHOUT]}


def steps_of_equal_time(config: AblateBench, folder: Path) -> dict[str, int]:
    """How many steps of each variant take as long as the recipe's own.

    By the fastest run of each, in turn: what else the machine does only ever slows one down.
    """
    fastest: dict[str, Trained] = {}
    for turn in range(config.repeats):
        for name, flags in WITHOUT.items():
            out_dir = folder / f"timed_{len(fastest)}_{turn}"
            trained = ours.train(config.config, out_dir, *common(config, 0), *flags)
            if name not in fastest or trained.finished.seconds < fastest[name].finished.seconds:
                fastest[name] = trained
    recipe = fastest[RECIPE]
    steps = {n: run.steps_within(recipe.finished.seconds) for n, run in fastest.items()}
    return steps | {RECIPE: len(recipe.updates)}


def common(config: AblateBench, seed: int) -> tuple[str, ...]:
    return (f"--data.path={config.data.resolve()}", f"--seed={seed}")


def row(name: str, steps: int, losses: list[float]) -> Row:
    spread = max(losses) - min(losses)
    return {"without": name, "steps": steps, "loss": statistics.mean(losses), "spread": spread}
