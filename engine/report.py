"""What a run says of itself: what will be trained, how fast, and at the end a picture."""

import itertools
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import cli
import files
from engine import checkpoint
from engine.count import count_parameters, flops_per_token, peak_flops
from engine.guards import Repeated
from engine.metrics import Metrics, read
from engine.parallel import World
from engine.wandb_run import start_wandb
from model import GPT, ModelConfig


def open_log(run: Any) -> Metrics:
    """Say what will be trained, put the config into the run's folder, and open its log."""
    config, world, start = run.config, run.world, run.progress
    skip = config.on_nonfinite == "skip"
    if not world.is_main:
        return Metrics(None, start.step, config.max_steps, skip=skip)
    announce(run.model, asdict(config), len(run.batches.tokens_N), world, start.step)
    text = repeating(config)
    repeated = lines_to_repeat(config.out_dir, text, start.step) if config.resume else []
    lock = open_folder(config.out_dir, config.resume)
    try:
        files.write_text(config.out_dir / "config.toml", text)
        wandb = start_wandb(config.wandb, config.out_dir, asdict(config))
        return Metrics(
            config.out_dir,
            start.step,
            config.max_steps,
            start.elapsed_seconds,
            wandb,
            lock,
            skip=skip,
            repeated=Repeated(repeated, config.precision),
        )
    except BaseException:  # Ctrl-C as well
        lock.close()
        raise


def repeating(config: Any) -> str:
    """Return the config.toml with which a run is repeated."""
    return cli.dump_config(replace(config, resume=False, auto_resume=False))


def lines_to_repeat(out_dir: Path, config: str, first_step: int) -> list[dict[str, float]]:
    """Return what a run had logged from a step on, if it had this config."""
    before, log = out_dir / "config.toml", out_dir / "metrics.jsonl"
    is_there = log.exists() and before.exists()
    if not is_there or before.read_text(encoding="utf-8") != config:
        return []
    return [line for line in read(log) if line["step"] >= first_step]


def open_folder(out_dir: Path, resume: bool) -> files.Lock:
    """Make the run's folder; a new run sets an older one aside.

    Returns a lock, which keeps other runs out until it is closed. Raises OSError if there is one.
    """
    if not out_dir.name:
        raise ValueError(f"out_dir must have a name, such as out/run: got {out_dir}")
    if out_dir.exists():
        files.Lock(out_dir).close()  # nobody may be writing to it
    if (out_dir / checkpoint.RECORD).exists() and not resume:
        names = (f"{out_dir.name}_{number}" for number in itertools.count(1))
        aside = next(path for name in names if not (path := out_dir.with_name(name)).exists())
        out_dir.rename(aside)
        config = aside / "config.toml"
        if config.exists():  # that run goes on in its new place, not in this one
            own = f"out_dir = {cli.to_toml(aside)}"
            text = re.sub("(?m)^out_dir = .*", lambda _: own, config.read_text(encoding="utf-8"))
            files.write_text(config, text)
        print(f"{out_dir} held another run, which is now in {aside}")
    out_dir.mkdir(parents=True, exist_ok=True)
    return files.Lock(out_dir)


def announce(
    model: GPT, config: dict[str, Any], n_tokens: int, world: World, first_step: int = 0
) -> None:
    """Print the size of the model, and that of the run, in epochs too."""
    steps = config["max_steps"]
    per_step = config["batch_size"] * config["model"]["context_length"]
    parts = count_parameters(model)
    print("parameters:", ", ".join(f"{number:,} {part}" for part, number in parts.items()))
    print(f"run: {steps:,} steps of {per_step:,} tokens, {steps * per_step / n_tokens:.2f} epochs")
    shared = f", {config['parallel']}" if world.size > 1 else ""
    print(f"device: {world.size} x {world.device_name}, {config['precision']}{shared}", flush=True)
    if world.size == 1 and config["parallel"] in ("fsdp", "hsdp"):
        print(f"parallel={config['parallel']}: this one process holds the whole model")
    if config["resume"] and first_step == 0:
        print(f"{config['out_dir']} has no checkpoint to resume: the run starts at step 0")


def speed(world: World, config: ModelConfig, precision: str, rate: float) -> dict[str, float]:
    """Return tokens/s of all processes, from the `rate` of this one; of a GPU, memory and MFU too.

    MFU is told where the GPU's FLOP/s are known.
    """
    tokens_per_second = rate * world.size
    found = {"tokens_per_second": tokens_per_second}
    if world.device.type != "cuda":
        return found
    found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(world.device)
    peak = peak_flops(world.device_name, precision)
    if peak is not None:
        found["mfu"] = tokens_per_second * flops_per_token(config) / (peak * world.size)
    return found


def conclude(
    out_dir: Path,
    best: float,
    bigram: float,
    entropy: float | None,
    to_bits: Callable[[float], float],
    with_picture: bool,
) -> None:
    """Print the best loss beside a bigram model's and the least possible, and what is next."""
    losses = {"best validation loss": best, "a bigram model's validation loss": bigram}
    if entropy is not None:
        above = 100 * (best / entropy - 1)
        losses[f"entropy of the text (the best is {above:.2f} % above)"] = entropy
    for name, loss in losses.items():
        print(f"{name}: {loss:.4f} nats per token, {to_bits(loss):.4f} bits per byte")
    written = ["checkpoints", "config.toml", "metrics.jsonl"]
    if with_picture:
        plot_loss(out_dir, losses)
        written.append("loss.png")
    print(f"written to {out_dir}: {', '.join(written)}")
    print_next(out_dir)


def print_next(out_dir: Path) -> None:
    print(f'next: python sample.py --out_dir={shlex.quote(str(out_dir))} --prompt="..."')


def plot_loss(out_dir: Path, levels: dict[str, float]) -> None:
    """Draw training and validation loss against the step into loss.png, with lines at `levels`."""
    import matplotlib  # slow to import, and needed once

    matplotlib.use("agg")
    from matplotlib import pyplot

    records = read(out_dir / "metrics.jsonl")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, style in (("train_loss", "-"), ("val_loss", "o-")):
        found = [record for record in records if key in record]
        steps = [record["step"] for record in found]
        axes.plot(steps, [record[key] for record in found], style, label=key, linewidth=0.8)
    for name, level in levels.items():
        axes.axhline(level, label=f"{name}: {level:.2f}", color="gray", linestyle="--")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with files.whole(out_dir / "loss.png", "wb") as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
