"""What a run says of itself: what will be trained, how fast, and at the end a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.metrics import read
from engine.parallel import World


def announce(parts: dict[str, int], config: dict[str, Any], n_tokens: int, world: World) -> None:
    """Print the sizes of the model and the run, the run in epochs of so many tokens too."""
    steps, per_step = config["max_steps"], config["batch_size"] * config["model"]["context_length"]
    print("parameters:", ", ".join(f"{number:,} {part}" for part, number in parts.items()))
    print(f"run: {steps:,} steps of {per_step:,} tokens, {steps * per_step / n_tokens:.2f} epochs")
    print(f"device: {world.size} x {world.device_name}, {config['precision']}", flush=True)


def plot_loss(out_dir: Path, levels: dict[str, float]) -> None:
    """Draw training and validation loss against the step into loss.png, with lines at `levels`."""
    import matplotlib  # slow to import, and needed once

    matplotlib.use("agg")
    from matplotlib import pyplot

    records = read(out_dir / "metrics.jsonl")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, style in (("train_loss", "-"), ("val_loss", "o-")):
        points = [(record["step"], record[key]) for record in records if key in record]
        steps, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, losses, style, label=key, linewidth=0.8)
    for name, level in levels.items():
        axes.axhline(level, label=name, color="gray", linestyle="--")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out_dir / "loss.png", dpi=120)
    pyplot.close(figure)


def conclude(out_dir: Path, best: float, bigram: float, to_bits: Callable[[float], float]) -> None:
    """Print the best loss beside a bigram model's, draw its course, and say what is next."""
    for name, loss in (("best", best), ("a bigram model's", bigram)):
        print(
            f"{name} validation loss: {loss:.4f} nats per token, {to_bits(loss):.4f} bits per byte"
        )
    plot_loss(out_dir, {"bigram model": bigram})
    print(f"written to {out_dir}: checkpoints, config.toml, metrics.jsonl, loss.png")
    print(f'next: python sample.py --out_dir={out_dir} --prompt="..."')
