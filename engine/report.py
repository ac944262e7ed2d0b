"""What a run says of itself: what will be trained, how fast, and at the end a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from engine.metrics import flops_per_token, mfu, read
from engine.parallel import World


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part, and their total; a tied head counts as 0."""
    counts = {"norms": 0, "embeddings": 0, "attention": 0, "mlp": 0, "head": 0}
    names = {"norms": ("norm.", "ln_"), "embeddings": ("wte", "wpe"), "attention": ("attn",)}
    names |= {"mlp": ("mlp",), "head": ("lm_head",)}  # the first that fits: attn.q_norm is a norm
    for name, parameter in model.named_parameters():
        part = next(part for part, pieces in names.items() if any(p in name for p in pieces))
        counts[part] += parameter.numel()
    return counts | {"total": sum(counts.values())}


def announce(
    model: nn.Module, config: dict[str, Any], n_tokens: int, world: World
) -> dict[str, int]:
    """Print the sizes of the model and of the run, which is in epochs too; return the model's."""
    parts = count_parameters(model)
    steps, per_step = config["max_steps"], config["batch_size"] * config["model"]["context_length"]
    print("parameters:", ", ".join(f"{number:,} {part}" for part, number in parts.items()))
    print(f"run: {steps:,} steps of {per_step:,} tokens, {steps * per_step / n_tokens:.2f} epochs")
    print(f"device: {world.size} x {world.device_name}, {config['precision']}", flush=True)
    return parts


def use_of(
    world: World, parts: dict[str, int], model: dict[str, int]
) -> Callable[[float], dict[str, float]]:
    """How a run uses its devices, given its tokens per second: MFU and memory, where known."""
    of_peak = mfu(flops_per_token(parts, model), world.device_name, world.size)
    return lambda tokens_per_second: of_peak(tokens_per_second) | world.peak_memory()


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


def conclude(
    out_dir: Path,
    best: float,
    bigram: float,
    entropy: float | None,
    to_bits: Callable[[float], float],
    picture: bool,
) -> None:
    """Print the best loss beside a bigram model's and the least possible, and what is next."""
    for name, loss in (("best", best), ("a bigram model's", bigram)):
        print(
            f"{name} validation loss: {loss:.4f} nats per token, {to_bits(loss):.4f} bits per byte"
        )
    levels = {"bigram model": bigram}
    if entropy is not None:
        print(above_entropy(best, entropy))
        levels["entropy"] = entropy
    if picture:
        plot_loss(out_dir, levels)
    drawn = ", loss.png" * picture
    print(f"written to {out_dir}: checkpoints, config.toml, metrics.jsonl{drawn}")
    print(f'next: python sample.py --out_dir={out_dir} --prompt="..."')


def above_entropy(loss: float, entropy: float) -> str:
    """1.02, 1.0 -> `2.00 % above the entropy of the text, 1.0000 nats per token`."""
    above = 100 * (loss / entropy - 1)
    return f"{above:.2f} % above the entropy of the text, {entropy:.4f} nats per token"
