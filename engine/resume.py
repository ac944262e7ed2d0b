"""Pack and restore weights and optimizer state, and refuse to go on with a run that differs."""

import math
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cli
from engine import checkpoint, report, shares
from engine.guards import check_copies
from engine.optim import Optimizer
from engine.shard import assign
from model import ModelConfig, require

# What a checkpoint must share with the run that goes on from it, and what messages call it
WORDS = {"tokenizer": "tokenizer", "data": "dataset"}


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # finished updates
    best_val_loss: float = math.inf
    elapsed_seconds: float = 0.0

    def is_best(self, val_loss: float) -> bool:
        """Note a validation loss, and return whether it is the lowest so far."""
        before = self.best_val_loss
        self.best_val_loss = min(val_loss, before)
        return val_loss < before


Origin = dict[str, Any] | None  # the checkpoint of another run, whose weights a new one takes


def begin(config: Any) -> tuple[Any, Origin]:
    """Read the run to start from; return it, and the config with its architecture.

    The dropout stays the config's own. Raises ValueError or OSError if there is no such run, or if
    the config asks for another architecture.
    """
    if config.auto_resume:
        own = config.out_dir / "config.toml"
        if config.minutes and own.exists():  # it has the sizes that these minutes chose
            flags = (f"--out_dir={config.out_dir}", "--auto_resume")
            config = cli.parse_config(type(config), [str(own), *flags])
        config = replace(config, resume=own.exists())
    is_begun = config.resume and checkpoint.has_last(config.out_dir)
    if config.init_from is None or is_begun:
        return config, None
    origin = checkpoint.load(config.init_from, "best")
    architecture = architecture_of(origin, config.init_from, config.model)
    return replace(config, model=architecture), origin


def architecture_of(origin: dict[str, Any], path: Path, asked: ModelConfig) -> ModelConfig:
    """Return the architecture of a run to start from, with the dropout that is asked for.

    Raises ValueError if another architecture is asked for.
    """
    taken = ModelConfig(**{**origin["model_config"], "dropout": asked.dropout}).sized()
    unasked = (taken, ModelConfig(), ModelConfig(vocab_size=0, n_layer=0))
    for name, value in vars(asked).items():
        rule = f"init_from takes the model of {path}, whose {name} is {vars(taken)[name]}"
        is_fine = any(vars(one)[name] == value for one in unasked)
        require(is_fine, f"{rule}: leave model.{name} out, or give the same: got {value}")
    return taken


def restore(run: Any, origin: Origin) -> Progress:
    """Load the last checkpoint if config.resume, unless the run was killed before its first.

    A run that begins may take the weights of another. Raises ValueError if a checkpoint is of
    another model, tokenizer, dataset or order of windows, or of a later step.
    """
    config, dataset, model = run.config, run.dataset.identity(), run.model
    has_begun = (config.out_dir / "config.toml").exists()
    if not config.resume or (has_begun and not checkpoint.has_last(config.out_dir)):
        if origin is not None:
            way_out = f"prepare the data with --tokenizer={config.init_from}"
            problem = f"the dataset's tokenizer is not that of {config.init_from}: {way_out}"
            require(origin["tokenizer"] == dataset["tokenizer"], problem)
            load_weights(model, origin["model"])
        return Progress()
    state = newest(run)
    for what, asked in dataset.items():
        check_same(WORDS[what], asked, state[what])
    saved_config = ModelConfig(**state["model_config"]).sized()  # an older one has fewer fields
    check_same("model", asdict(model.config), asdict(saved_config))
    is_same = run.batches.order.kind == state.get("order", "held")  # the one of older runs
    require(is_same, "the checkpoint is of an older run, whose windows came in another order")
    done, most = state["step"], config.max_steps
    require(done <= most, f"max_steps must be at least the {done} steps done: got {most}")
    unpack(state, model, run.optimizers)
    return Progress(done, state["best_val_loss"], state["elapsed_seconds"])


def newest(run: Any) -> dict[str, Any]:
    """Read the last checkpoint; with config.auto_resume, an older one if that is damaged.

    All processes take the same one. Raises ValueError or OSError if there is none.
    """
    config, world = run.config, run.world
    names = checkpoint.newest_first(config.out_dir) if config.auto_resume else ["last"]
    problem: Exception | None = None
    for name in names:
        state: dict[str, Any] = {}
        try:
            state = checkpoint.read(config.out_dir, name, world.rank, world.size)
        except (OSError, ValueError) as error:
            problem = error
            if config.auto_resume:
                print(f"skipped the {name} checkpoint: {error}", flush=True)
        if world.sum(torch.tensor(float(not state))) == 0:
            if world.is_main:
                checkpoint.go_on_from(config.out_dir, name)
            return state
    raise problem or ValueError(f"another process found {config.out_dir} damaged, as it says")


def check_same(what: str, asked: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise ValueError that names what differs between this run and the checkpoint."""
    for key in dict.fromkeys([*asked, *saved]):
        if key not in asked or key not in saved or asked[key] != saved[key]:
            raise ValueError(
                f"the checkpoint has another {what}: its {key} differs from this run's; resume "
                "with the run's own config.toml and dataset, or start anew in another out_dir"
            )


def pack(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Return the weights and the state of the optimizers, as they lie in memory."""
    return {"model": model.state_dict(), "optimizers": [one.state for one in optimizers]}


def unpack(state: dict[str, Any], model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Restore what `pack` returned. Raises ValueError if it is of another optimizer.

    The settings of the optimizers stay, so that a run can go on with a lower learning rate.
    """
    if "shares" in state:
        shares.read(state["shares"], shares.flat(pack(model, optimizers)))
        return
    has_optimizers = len(state["optimizers"]) > 0
    way_out = "start a new run from its weights with --init_from"
    require(has_optimizers, f"the checkpoint has no state of an optimizer to go on with: {way_out}")
    names = [optimizer.state.keys() for optimizer in optimizers]
    is_same = names == [saved.keys() for saved in state["optimizers"]]
    require(is_same, "a run goes on with its own optimizer: optim.name has changed")
    load_weights(model, state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        for name, tensors in optimizer.state.items():
            for tensor, saved_tensor in zip(tensors, saved[name], strict=True):
                assign(tensor, saved_tensor)


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    for name, tensor in model.state_dict().items():
        assign(tensor, weights[name])


def save(run: Any, names: list[str]) -> None:
    """Begin to write all that resuming and sampling need. Every process must call this."""
    run.watch.rest()
    run.log.flush(run.stop)  # raises, before anything is saved, if an update was not finite
    run.saver.close()  # its thread and check_copies would both speak with the other processes
    run.dataset.mapped.check_unchanged()
    check_copies(run.model, run.world)  # which waits for all, so that none saves if one has raised
    is_to_resume = "last" in names  # no run goes on from another, so no other needs the optimizers
    state = {
        "step": run.progress.step,
        "best_val_loss": run.progress.best_val_loss,
        "elapsed_seconds": run.log.elapsed_seconds,
        "config": report.repeating(run.config),
        "model_config": asdict(run.config.model),
        **run.dataset.identity(),
        "order": run.batches.order.kind,
        **pack(run.model, run.optimizers if is_to_resume else []),
    }
    run.saver.save(run.config.out_dir, state, names, run.world)


def leave(run: Any) -> None:
    """Asked to stop: save, say how to go on, and exit as shells expect."""
    has_best = math.isfinite(run.progress.best_val_loss)
    save(run, ["last"] if has_best else ["last", "best"])
    run.saver.close()
    run.world.wait_for_all()  # torchrun ends the others as soon as one leaves
    config = shlex.quote(f"{run.config.out_dir}/config.toml")
    run.log.end(run.progress.step, f"python train.py {config} --resume")
    raise SystemExit(run.stop.exit_code)
