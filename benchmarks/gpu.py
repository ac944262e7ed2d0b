"""`bench.py gpu`: all that needs a GPU in one call, each part within its share of the time."""

import json
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks import nanogpt, ours, race, training
from benchmarks.machine import probe
from benchmarks.nanogpt import STOCK, Checkout
from benchmarks.ours import SETTLING_STEPS
from benchmarks.runs import is_reached, temporary_folder
from benchmarks.session import SEED, GpuBench, Session, Speed
from benchmarks.sizes import FULL, TINY, flags
from benchmarks.table import Row, Tables, Value, cell
from benchmarks.verdict import THEM, US, Entry, judge
from data.sources import Corpus

RECIPE = flags(  # what config/modern.toml adds to GPT-2's sizes
    "--model.architecture=modern --model.tie_embeddings=False --optim.name=muon "
    "--optim.learning_rate=0 --optim.weight_decay=0 --optim.muon_weight_decay=0 "
    "--optim.grad_clip=inf --optim.warmup_steps=10 --optim.decay=linear "
    "--optim.decay_fraction=0.6 --optim.final_fraction=0"
)
PLANNED = 0.75  # of a part's time; the rest is for what was not foreseen


def prepare(session: Session) -> None:
    """GPT-2 tokens of the large text, for both sides: they keep them in files of the same form."""
    ours.prepare(
        session.config.text, session.sizes.tokenizer, session.data, limit_seconds=session.left()
    )
    (session.checkout.folder / "data/large").symlink_to(session.data)


def our_speed(session: Session, architecture: str) -> None:
    """Tokens per second, MFU and memory of ours."""
    few = training.few_steps(session.sizes.steps)
    trained = session.train(architecture, f"--model.architecture={architecture}", *few)
    probed = probe(trained.out_dir)
    row = training.throughput(trained, probed)
    session.tables["124M"].append({"run": f"ours, {architecture}", **row})
    step_seconds = statistics.median(trained.step_seconds)
    start_seconds = trained.finished.seconds - step_seconds * session.sizes.steps
    session.speeds[architecture] = Speed(step_seconds, start_seconds)
    if architecture == "gpt2":
        session.flops_per_token, session.peak = probed["flops_per_token"], probed["machine_flops"]


def their_speed(session: Session) -> None:
    """The same of nanoGPT, compiled; its MFU by our count of operations, which is the same."""
    finished = session.train_theirs("their_speed", session.sizes.steps)
    steps = nanogpt.step_seconds(finished)
    step_seconds = statistics.median(steps[SETTLING_STEPS:] or steps)
    tokens_per_second = session.sizes.tokens_per_step / step_seconds
    row: Row = {"run": THEM, "tokens/s": tokens_per_second, "step ms": 1000 * step_seconds}
    row["whole process s"] = finished.seconds
    if session.peak:
        row["MFU"] = tokens_per_second * session.flops_per_token / session.peak
    session.tables["124M"].append(row)
    start_seconds = finished.seconds - step_seconds * session.sizes.steps
    session.speeds[THEM] = Speed(step_seconds, start_seconds)


def race_to_target(session: Session) -> None:
    """Tiny Shakespeare: all of ours, then nanoGPT until its own estimate is at the target."""
    config, folder = session.config, session.folder
    path = config.shakespeare or Corpus.find(["shakespeare"]).files[0]
    data = race.prepare_both(session.checkout, race.read_text(path), folder / "shakespeare")
    target = config.target
    given = (f"--data.path={data}", *session.sizes.race)
    own = ours.train(config.race_config, folder / "race", *given, limit_seconds=session.left())
    entry = Entry(US, SEED, len(own.updates), own.finished, own.out_dir)
    judge([entry], data, session.checkout)
    loss, seconds = entry.result["loss"], own.finished.seconds
    them = their_seconds_to(session, config.target)
    us = seconds if loss <= target else f"not reached in {cell(seconds)}: {cell(loss)}"
    session.add_race(f"tiny Shakespeare, time to {target} nats, s", them, us)


def their_seconds_to(session: Session, target: float) -> Value:
    """When nanoGPT's stock run prints a validation loss of at most `target`."""
    seconds = session.left()
    try:
        finished = session.checkout.train(
            session.folder / "stock",
            SEED,
            *STOCK,
            *session.sizes.stock,
            limit_seconds=seconds,
            until=lambda line: is_reached(line, nanogpt.EVALUATION, target),
        )
    except TimeoutError:
        return f"not reached in {cell(seconds)}"
    reached = finished.seconds_to(nanogpt.EVALUATION, target)
    return reached or f"not reached in {cell(finished.seconds)}"


def race_to_their_loss(session: Session) -> None:
    """124M on the large text: all of nanoGPT's run, then ours in at most half of its time."""
    if not {THEM, "modern"} <= session.speeds.keys():
        raise ValueError("needs the speeds of both sides")
    halves = session.left() * PLANNED / 1.5
    steps = session.speeds[THEM].steps_within(halves)
    theirs = session.train_theirs("their_loss", steps, "--always_save_checkpoint=True")
    steps = session.speeds["modern"].steps_within(theirs.seconds / 2 * race.SAFETY)
    own = session.train("our_loss", *RECIPE, *training.few_steps(steps))
    entries = [
        Entry(US, 0, len(own.updates), own.finished, own.out_dir),
        Entry(THEM, 0, 0, theirs, session.folder / "their_loss/ckpt.pt"),
    ]
    most = f"--most_tokens={session.sizes.judged_tokens}"
    judge(entries, session.data, session.checkout, most)
    (loss, their_loss), seconds = (e.result["loss"] for e in entries), own.finished.seconds
    us = seconds if loss <= their_loss else f"not reached in {cell(seconds)}: {cell(loss)}"
    session.add_race(f"124M, time to nanoGPT's {their_loss:.4f} nats, s", theirs.seconds, us)
    session.add_race("124M, loss", their_loss, loss)


# What is done, in order, and its share of the time; the most telling first
PARTS: tuple[tuple[str, float, Callable[[Session], None]], ...] = (
    ("prepare", 0.08, prepare),
    ("speed, gpt2", 0.13, lambda session: our_speed(session, "gpt2")),
    ("speed, modern", 0.13, lambda session: our_speed(session, "modern")),
    ("speed, nanoGPT", 0.15, their_speed),
    ("race to the target", 0.23, race_to_target),
    ("race to nanoGPT's loss", 0.28, race_to_their_loss),
)


def measure(config: GpuBench) -> Tables:
    """All parts, one after another; one that fails or overruns is reported, and the next begins."""
    started_at = time.monotonic()
    if not config.tiny and probe()["gpu"] is None:
        raise ValueError(
            "bench.py gpu needs an NVIDIA GPU, and there is none here: --tiny tries its parts"
        )
    check(config)
    with temporary_folder() as folder:
        checkout = Checkout.copy(config.nanogpt, folder / "nanogpt")
        session = Session(config, folder, TINY if config.tiny else FULL, checkout)
        (folder / "shakespeare").mkdir()
        end = started_at
        for name, share, part in PARTS:
            end += share * 60 * config.minutes  # what a part leaves, the next ones may use
            session.limit_at = end
            session.tables["parts"].append(attempt(name, part, session))
            print(json.dumps(session.tables), file=sys.stderr)  # lest a time limit takes it all
    return session.tables


def attempt(name: str, part: Callable[[Session], None], session: Session) -> Row:
    """Do a part, and say how it went."""
    started_at, outcome = time.monotonic(), "done"
    try:
        part(session)
    except (ValueError, OSError) as error:
        outcome = str(error)
    return {"part": name, "seconds": time.monotonic() - started_at, "outcome": outcome}


def check(config: GpuBench) -> None:
    """Raise OSError for what is missing."""
    nanogpt.check(config.nanogpt)
    for path in (config.text, config.config, config.race_config, config.shakespeare):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path} is not here")
