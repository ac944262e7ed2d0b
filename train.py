"""Train a GPT from scratch. Read `train` from top to bottom: it tells the story of a run.

torchrun --nproc-per-node=8 train.py config/gpt2_124m.toml    # eight GPUs
"""

import contextlib
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import cli
import sample
from data.bigram import bigram_loss
from data.loader import Batches, DataConfig, Dataset, Windows, eval_batches
from engine import dial, parallel, report, resume
from engine.capture import Captured
from engine.device import DeviceName, HostCopy, Precision, Prefetch, sent
from engine.guards import Watch, check_repeatable
from engine.loss import LossModel, evaluate
from engine.metrics import Metrics, OnNonfinite, Update
from engine.optim import OptimConfig, Optimizer, build_optimizers, clip_gradients, schedule
from engine.parallel import StopRequest, World
from engine.replica import build_replica, sync_gradients
from engine.resume import Progress
from engine.saver import Saver
from engine.shard import Parallel
from engine.trial import Trial
from engine.wandb_run import WandbMode
from model import GPT, ModelConfig
from sampling.load import load_model


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that defines a run."""

    out_dir: Path = Path("out/run")
    """Folder for config.toml, metrics.jsonl, loss.png and the checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint in out_dir."""
    auto_resume: bool = False
    """Resume if out_dir has a run, else begin one: for jobs that are started again by a machine."""
    init_from: Path | None = None
    """Folder of a run to start from: its architecture, its best weights, its tokenizer."""
    minutes: float = 0.0
    """Choose what is 0 below, and model.n_layer, for a run of so many minutes; 0 has no limit."""
    seed: int = 1337
    """Random seed for weights, data order and dropout."""
    max_steps: int = 0
    """Number of optimizer updates; 0 plans a number that suits the minutes, or model and data."""
    batch_size: int = 0
    """Sequences per update, over all devices; 0 plans a number that suits the run."""
    micro_batch_size: int = 0
    """Sequences per pass on one device; 0 plans it. Affects memory, and dropout's masks."""
    eval_every: int = 0
    """Number of steps between evaluations, each of which also saves a checkpoint; 0 plans it."""
    keep_every: int = 0
    """Keep the checkpoint of every so many steps, from step 0, to watch it learn; 0 keeps none."""
    eval_tokens: int = 0
    """Evaluate on this many first tokens of the validation split; 0 takes all of it."""
    samples: int = 2
    """Samples to print at the end (none where no process has the model); 0 also skips loss.png."""
    device: DeviceName = "auto"
    """Device to train on; auto takes the best that is here."""
    precision: Precision = "auto"
    """Type of the matrix products (weights stay float32); auto takes bfloat16 if that is faster."""
    parallel: Parallel = "auto"
    """Processes hold the model (ddp), a share each (fsdp), or a share within a machine (hsdp)."""
    recompute: bool = False
    """Compute activations a second time instead of keeping them: less memory, slower steps."""
    compile: bool = False
    """Fuse operations by torch.compile: the start is slower, the steps are faster."""
    on_nonfinite: OnNonfinite = "stop"
    """What to do if a loss or gradient is not finite; the update is left out in any case."""
    verify_every: int = 0
    """Compute the gradient of every so many steps two more times; stop if these differ; 0 never."""
    wandb: WandbMode = "off"
    """Log to wandb: online (if logged in), offline (to sync later), or off."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=0))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        cli.at_least(0, self, "minutes", "max_steps", "batch_size", "micro_batch_size", "seed")
        cli.at_least(0, self, "eval_every", "keep_every", "eval_tokens", "samples", "verify_every")


@dataclass
class Run:
    """The parts of a run, and how far it has come."""

    config: TrainConfig
    world: World
    stop: StopRequest
    dataset: Dataset
    batches: Batches
    model: GPT  # what is saved
    loss_model: LossModel  # what is evaluated
    replica: nn.Module  # what is trained: in it, all processes average their gradients
    optimizers: list[Optimizer]
    log: Metrics
    progress: Progress
    compute_update: Captured
    clock: dial.Clock | None = None  # of a run that was given minutes
    saver: Saver = field(default_factory=Saver)
    watch: Watch = field(default_factory=Watch)


def train(asked: TrainConfig, world: World, stop: StopRequest) -> None:
    """Train a model as the config asks, on the processes of this world."""
    run = build(asked, world, stop)
    fetch = Prefetch(run.batches.batch, world.device)
    # `step` counts finished updates, so the last pass only evaluates and saves
    with contextlib.closing(run.log), contextlib.closing(run.saver), contextlib.closing(run.watch):
        for step in itertools.count(run.progress.step):
            run.progress.step = world.step = step
            config = run.config = dial.keep_time(run)
            is_last = step == config.max_steps
            if is_last or (step > 0 and step % config.eval_every == 0):
                evaluate_and_save(run)
            if stop.is_agreed:
                resume.leave(run)
            if config.keep_every and step % config.keep_every == 0:
                resume.save(run, [f"step_{step}"])
            if is_last:
                break
            run.watch.begin()
            update(run, fetch.batch(step))
    if world.is_main:
        conclude(run)


def build(asked: TrainConfig, world: World, stop: StopRequest) -> Run:
    """Prepare a run: its sizes, its data, its model, and how far it has come already."""
    asked, origin = resume.begin(asked)
    dataset = Dataset.open(asked.data.path)
    trial = Trial(lambda config: assemble(config, dataset, world, stop), update, dataset, world)
    asked, clock = dial.choose(asked, trial)
    run = assemble(asked, dataset, world, stop)
    run.log.close()
    run.progress, run.clock = resume.restore(run, origin), clock
    run.log = report.open_log(run)
    return run


def assemble(asked: TrainConfig, dataset: Dataset, world: World, stop: StopRequest) -> Run:
    """Put the parts of a run together, at step 0 and without a log."""
    train_T = dataset.tokens("train")
    vocab_size = dataset.fitting_vocab_size(asked.model.vocab_size)
    config, loss_model, replica, owners = build_replica(asked, vocab_size, len(train_T), world)
    optimizers = build_optimizers(loss_model.model, config.optim, loss_model.dtype, owners)
    windows = Windows(dataset.vocab_size, config.model.context_length, world.rank, world.size)
    batches = Batches(train_T, windows, config.batch_size, config.seed)
    parts = (dataset, batches, loss_model.model, loss_model, replica, optimizers)
    is_alone = world.size == 1 and owners.mesh is None
    captured = Captured(compute_update, world.device.type == "cuda" and is_alone)
    no_log = Metrics(None, 0, config.max_steps)
    return Run(config, world, stop, *parts, no_log, Progress(), captured)


def update(run: Run, batch: tuple[Tensor, ...]) -> None:
    """One optimizer update on this process's share of a batch."""
    started_at = time.perf_counter()
    config, world, step = run.config, run.world, run.progress.step
    fraction = schedule(step, config.max_steps, config.optim)  # of the peak rates
    check_repeatable(run, lambda: accumulate_gradients(run, batch))
    parallel.seed_dropout(config.seed, step, world)
    from_host = sent(torch.tensor((fraction, run.stop.signal is not None)), world.device)
    numbers = HostCopy(run.compute_update(run, from_host, *batch))
    run.log.flush(run.stop)  # the update before this one, which a GPU has finished by now
    seconds = time.perf_counter() - started_at
    speed = report.speed(world, config.model, config.precision, batch[0].numel() / seconds)
    rate = {"learning_rate": config.optim.learning_rate * fraction}
    run.log.update(Update(step, seconds, numbers, rate | speed))
    if world.device.type != "cuda":
        run.log.flush(run.stop)  # other devices have finished this one, too


def compute_update(run: Run, from_host_2: Tensor, *batch: Tensor) -> Tensor:
    """Do what an update does on the device, where the numbers stay until they are asked for.

    Returns the mean loss, the norm of the gradient, and more than 0 if a process shall stop.
    """
    world = run.world
    fraction, asked_to_stop = from_host_2.unbind()
    loss = accumulate_gradients(run, batch)
    grad_norm = clip_gradients(run.model, run.config.optim.grad_clip)
    # One sum over the processes answers two questions: how large is the loss, and shall we stop?
    mean_loss, stop = (world.sum(torch.stack((loss, asked_to_stop))) / world.size).unbind()
    is_finite = (mean_loss + grad_norm).isfinite()  # else nothing is updated, and the log raises
    for optimizer in run.optimizers:
        optimizer.step(fraction, is_finite)
    run.model.zero_grad()
    return torch.stack((mean_loss, grad_norm, stop))


def accumulate_gradients(run: Run, batch: tuple[Tensor, ...]) -> Tensor:
    """Add up the gradient of the mean loss over micro-batches; return that loss."""
    size = run.config.micro_batch_size
    micro_batches = list(zip(*(tensor.split(size) for tensor in batch), strict=True))
    total = torch.zeros((), device=run.world.device)
    for i, (tokens_BT, targets_BT) in enumerate(micro_batches):
        sync_gradients(run.replica, enabled=i == len(micro_batches) - 1)
        loss = run.replica(tokens_BT, targets_BT)
        loss *= len(tokens_BT) / len(batch[0])  # the last one may be smaller
        loss.backward()
        total += loss.detach()
    return total


def evaluate_and_save(run: Run) -> None:
    """Log the validation loss; save the run as "last" and, if that loss is the lowest, "best"."""
    run.watch.rest()
    run.log.flush(run.stop)
    config, dataset = run.config, run.dataset
    tokens_T = dataset.tokens("val", config.eval_tokens)
    at_once = max(config.micro_batch_size, 2**12 // config.model.context_length)
    batches = eval_batches(tokens_T, run.batches.windows, at_once, dataset.end_of_text)
    val_loss = evaluate(run.loss_model, batches, run.world, run.stop)
    if val_loss is None:  # asked to stop meanwhile
        return
    run.log.evaluation(run.progress.step, val_loss, dataset.bits_per_byte(val_loss))
    resume.save(run, ["last", "best"] if run.progress.is_best(val_loss) else ["last"])


def conclude(run: Run) -> None:
    """Draw the loss, compare it with a bigram model's, print samples, and say what is next."""
    config, dataset = run.config, run.dataset
    val_T = dataset.tokens("val", config.eval_tokens)
    bigram = bigram_loss(dataset.tokens("train"), val_T, dataset.vocab_size)
    if config.samples > 0 and not parallel.is_shared(run.model.lm_head.weight):
        settings = sample.SampleConfig(num_samples=config.samples, seed=config.seed)
        sample.write_samples(load_model(config.out_dir, "last", config.device), [""], settings)
    levels = (run.progress.best_val_loss, bigram, dataset.entropy(config.eval_tokens))
    report.conclude(config.out_dir, *levels, dataset.bits_per_byte, config.samples > 0)


def main() -> None:
    config = cli.parse_config(TrainConfig)
    with parallel.world(config.device) as world:
        train(config, world, StopRequest())


if __name__ == "__main__":
    cli.run(main)
