"""Train a GPT from scratch: read `train` from top to bottom, and each name in it is a file.

python train.py config/quickstart.toml --resume               # go on where it stopped
torchrun --nproc-per-node=8 train.py config/gpt2_124m.toml    # eight GPUs
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import sample
from data.bigram import bigram_loss
from data.loader import Batches, DataConfig, Dataset, eval_batches
from engine import checkpoint, cli, parallel, recipe, report, resume
from engine.evaluate import evaluate
from engine.metrics import Metrics, check_finite
from engine.optim import OptimConfig, Optimizer, build_optimizers, schedule
from engine.parallel import DeviceName, Precision, Prefetch, StopRequest, World
from engine.wandb_run import WandbMode, start_wandb
from model import GPT, ModelConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that defines a run."""

    out_dir: Path = Path("out/run")
    """Folder for config.toml, metrics.jsonl, loss.png and the checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint in out_dir."""
    seed: int = 1337
    """Of the weights, the order of the data, and dropout."""
    max_steps: int = 0
    """Number of optimizer updates; 0 for as many as suit the model and the dataset."""
    batch_size: int = 0
    """Sequences per update, over all devices; 0 for as many as suit the run."""
    micro_batch_size: int = 0
    """Sequences per pass on one device: fits memory, not the result; 0 for all of its share."""
    eval_every: int = 250
    """Steps between evaluations; each also saves a checkpoint."""
    keep_every: int = 0
    """Keep the checkpoint of every so many steps, from step 0, to watch it learn; 0 for none."""
    eval_tokens: int = 0
    """Evaluate on the first so many tokens of the validation split; 0 for all of it."""
    samples: int = 2
    """Texts to print at the end, after loss.png is drawn; 0 for neither."""
    device: DeviceName = "auto"
    """Where to train; auto takes the best that is here."""
    precision: Precision = "auto"
    """Of the matrix products (weights stay float32); auto is bfloat16 where hardware has it."""
    compile: bool = False
    """Fuse operations by torch.compile: slower to start, then faster."""
    wandb: WandbMode = "off"
    """Log to wandb: online (if logged in), offline (to sync later), or off."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=0))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        cli.at_least(1, self, "eval_every")
        cli.at_least(0, self, "max_steps", "batch_size", "micro_batch_size", "seed")
        cli.at_least(0, self, "keep_every", "eval_tokens", "samples")


@dataclass
class Run:
    """The parts of a run, and how far it has come."""

    config: TrainConfig
    world: World
    stop: StopRequest
    dataset: Dataset
    window: dict[str, int]  # what this process reads of it
    model: GPT
    replica: nn.Module  # the model, or its wrapper that averages gradients over processes
    optimizers: list[Optimizer]
    step: int = 0  # finished updates
    best_val_loss: float = math.inf
    elapsed_seconds: float = 0.0  # before this process
    metrics: Metrics = field(init=False)

    @property
    def micro_batch_size(self) -> int:
        share = self.config.batch_size // self.world.size
        return min(self.config.micro_batch_size or share, share)


def train(config: TrainConfig, world: World, stop: StopRequest) -> None:
    """The whole run."""
    # Data
    dataset = Dataset.open(config.data.path)
    vocab_size = dataset.fitting_vocab_size(config.model.vocab_size)
    model_config = replace(config.model, vocab_size=vocab_size)
    config = replace(config, model=model_config, precision=world.precision(config.precision))
    window = {"vocab_size": dataset.vocab_size, "context_length": config.model.context_length}
    window |= {"rank": world.rank, "world_size": world.size}
    train_T = dataset.tokens("train")

    # Model: built the same in every process, then compiled, then replicated
    torch.manual_seed(config.seed)
    model = GPT(config.model).to(world.device)
    config = recipe.complete(config, model, len(train_T))
    replica = parallel.replicate(model, world, compiled=config.compile)
    optimizers = build_optimizers(model, config.optim, getattr(torch, config.precision))

    # Where to start
    batches = Batches(train_T, batch_size=config.batch_size, seed=config.seed, **window)
    fetch = Prefetch(batches.batch, world.device)
    run = Run(config, world, stop, dataset, window, model, replica, optimizers)
    if config.resume:
        restore(run)
    run.metrics = open_log(run)

    # The loop: a step is a finished update, so the last pass only evaluates and saves
    with contextlib.closing(run.metrics):
        for step in range(run.step, config.max_steps + 1):
            run.step, is_last = step, step == config.max_steps
            if is_last or (step and step % config.eval_every == 0):
                evaluate_and_save(run)
            if stop.on_any_rank(world):
                leave(run)
            if config.keep_every and step % config.keep_every == 0:
                save(run, [f"step_{step}"])
            if not is_last:
                update(run, fetch.batch(step))
    if world.is_main:
        conclude(run)


def update(run: Run, batch: tuple[Tensor, ...]) -> None:
    """One optimizer update on this process's share of a batch."""
    started_at, config = time.perf_counter(), run.config
    fraction = schedule(run.step, config.max_steps, config.optim)
    parallel.seed_dropout(config.seed, run.step, run.world)
    loss = accumulate_gradients(run, batch)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.optim.grad_clip)
    for optimizer in run.optimizers:
        optimizer.step(fraction)
    run.model.zero_grad()
    run.metrics.flush()  # the update before this one, which the device has finished by now
    rate, n_tokens = config.optim.learning_rate * fraction, batch[0].numel() * run.world.size
    seconds = time.perf_counter() - started_at
    run.metrics.update(run.step, torch.stack((loss, grad_norm)), rate, n_tokens, seconds)


def accumulate_gradients(run: Run, batch: tuple[Tensor, ...]) -> Tensor:
    """Add up the gradient of the mean loss over micro-batches; return that loss."""
    world, total = run.world, torch.zeros((), device=run.world.device)
    pairs = list(zip(*(tensor.split(run.micro_batch_size) for tensor in batch), strict=True))
    for i, (tokens_BT, targets_BT) in enumerate(pairs):
        parallel.sync_gradients(run.replica, enabled=i == len(pairs) - 1)
        with world.autocast(run.config.precision):
            loss = run.replica(tokens_BT, targets_BT)
        loss *= len(tokens_BT) / len(batch[0])  # the last one may be smaller
        loss.backward()
        total += loss.detach()
    return world.sum(total) / world.size


def evaluate_and_save(run: Run) -> None:
    """Log the validation loss; save the last checkpoint, which may be the best one too."""
    val_T = run.dataset.tokens("val", run.config.eval_tokens)
    at_once = max(run.micro_batch_size, 2**11 // run.config.model.context_length)
    batches = eval_batches(val_T, run.dataset.end_of_text, batch_size=at_once, **run.window)
    val_loss = evaluate(run.model, batches, run.world, run.config.precision, run.stop)
    if val_loss is None:  # asked to stop meanwhile
        return
    check_finite(run.step, val_loss=val_loss)
    run.metrics.evaluation(run.step, val_loss, run.dataset.bits_per_byte(val_loss))
    is_best = val_loss < run.best_val_loss
    run.best_val_loss = min(val_loss, run.best_val_loss)
    save(run, ["last", "best"] if is_best else ["last"])


def save(run: Run, names: list[str]) -> None:
    """Write all that resuming and sampling need, from the main process."""
    run.metrics.flush()  # raises, before anything is saved, if a gradient was not finite
    state = {
        "step": run.step,
        "best_val_loss": run.best_val_loss,
        "elapsed_seconds": run.metrics.elapsed_seconds,
        "config": cli.dump_config(replace(run.config, resume=False)),
        "model_config": asdict(run.config.model),
        "tokenizer": run.dataset.tokenizer.state(),
        "data": run.dataset.meta["splits"],
        **resume.pack(run.model, run.optimizers),
    }
    if run.world.is_main:
        checkpoint.save(run.config.out_dir, state, names)


def restore(run: Run) -> None:
    """Take up the last checkpoint. Raises ValueError if it is of another model or dataset."""
    state = checkpoint.load(run.config.out_dir, "last")
    resume.check_same("tokenizer", run.dataset.tokenizer.state(), state["tokenizer"])
    resume.check_same("model", asdict(run.config.model), state["model_config"])
    resume.check_same("dataset", run.dataset.meta["splits"], state["data"])
    resume.check_steps(state["step"], run.config.max_steps)
    resume.unpack(state, run.model, run.optimizers)
    run.step, run.elapsed_seconds = state["step"], state["elapsed_seconds"]
    run.best_val_loss = state["best_val_loss"]


def leave(run: Run) -> None:
    """Asked to stop: save, say how to go on, and exit as shells expect."""
    save(run, ["last"] if math.isfinite(run.best_val_loss) else ["last", "best"])
    run.metrics.end(run.step, f"python train.py {run.config.out_dir}/config.toml --resume")
    raise SystemExit(run.stop.exit_code)


def open_log(run: Run) -> Metrics:
    """Say what will be trained, put the config into the run's folder, and open its log."""
    config, world = run.config, run.world
    if not world.is_main:
        return Metrics(None, run.step, config.max_steps)
    parts = report.announce(run.model, asdict(config), len(run.dataset.tokens("train")), world)
    again = cli.dump_config(replace(config, resume=False))  # to run it again is to repeat it
    checkpoint.open_folder(config.out_dir, again, config.resume)
    metrics = Metrics(config.out_dir, run.step, config.max_steps, run.elapsed_seconds)
    metrics.use = report.use_of(world, parts, asdict(config.model))
    metrics.wandb = start_wandb(config.wandb, config.out_dir, asdict(config))
    return metrics


def conclude(run: Run) -> None:
    """Draw the loss, compare it with a bigram model's, print samples, and say what is next."""
    config, dataset = run.config, run.dataset
    train_T, val_T = dataset.tokens("train"), dataset.tokens("val", config.eval_tokens)
    bigram = bigram_loss(train_T, val_T, dataset.vocab_size)
    settings = sample.SampleConfig(num_samples=config.samples, seed=config.seed)
    sample.write_samples(run.model.eval(), dataset.tokenizer, [""], dataset.documents > 1, settings)
    levels = (run.best_val_loss, bigram, dataset.entropy(config.eval_tokens))
    report.conclude(config.out_dir, *levels, dataset.bits_per_byte, config.samples > 0)


def main() -> None:
    config = cli.parse_config(TrainConfig)
    with parallel.world(config.device) as world:
        train(config, world, StopRequest())


if __name__ == "__main__":
    cli.run(main)
