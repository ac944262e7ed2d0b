"""A small text, a small run, and processes to train in: what the tests of a run share."""

import contextlib
import hashlib
import importlib
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cli
import train
from data.prepare import PrepareConfig, prepare
from engine import checkpoint, metrics, resume
from engine.parallel import StopRequest, World

REPOSITORY = Path(__file__).parents[1]
PROCESS_SECONDS = 300  # longer than any process of these tests takes, on a busy machine too

on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux's limits of memory, /proc, /dev/full or strace"
)

# Everything that makes resuming hard: dropout, two optimizers, uneven micro-batches, three epochs
TINY = """
max_steps = 12
batch_size = 4
micro_batch_size = 3
eval_every = 4
samples = 0
device = "cpu"
precision = "float32"
[data]
path = "{dataset}"
[model]
architecture = "modern"
tie_embeddings = false
context_length = 16
n_layer = 2
n_head = 2
n_embd = 16
dropout = 0.1
[optim]
name = "muon"
learning_rate = 1e-2
warmup_steps = 3
"""
PLAIN = ("--optim.name=adamw", "--model.dropout=0")  # for losses that must agree to 1e-5

# A process that has imported everything, and is copied for each run
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["train", "sample", "data.prepare", "matplotlib.pyplot", "torch._dynamo", "pytest"]
)


def words(n: int, letters: str) -> str:
    """`n` words of a small invented language, in lines."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(80)]
    chosen = rng.choices(vocabulary, weights=[1 / rank for rank in range(1, 81)], k=n)
    return "".join(word + rng.choice("    .\n") for word in chosen)


def write_dataset(folder: Path, tokenizer: Any = "char", letters: str = "aeionrstlmé…") -> Path:
    """Prepare a dataset of 160 words under `folder`."""
    source, out = folder / "words.txt", folder / tokenizer
    source.write_text(words(160, letters), encoding="utf-8")
    prepare(PrepareConfig(sources=(str(source),), tokenizer=tokenizer, out=out))
    return out


def write_stories(folder: Path, n: int) -> Path:
    """Prepare a dataset of `n` stories in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.stories.N_STORIES", n)
        patch.setattr("data.stories.PATH", folder / "stories.jsonl")
        prepare(PrepareConfig(sources=("stories",), out=folder / "dataset"))
    return folder / "dataset"


def write_tiny(folder: Path) -> Path:
    """Write the config of a run of under a second, with its dataset beside it."""
    (folder / "tiny.toml").write_text(TINY.format(dataset=write_dataset(folder)))
    return folder / "tiny.toml"


def contents(folder: Path) -> dict[str, bytes]:
    """Return what each file in a folder holds, by its path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def train_here(config: Path, out_dir: Path, *flags: str) -> None:
    """Train in this process."""
    parsed = cli.parse_config(train.TrainConfig, [str(config), f"--out_dir={out_dir}", *flags])
    with signal_handlers_kept():
        train.train(parsed, World(torch.device("cpu")), StopRequest())


def run_here(main: Callable[[], None], name: str, *flags: object) -> int:
    """Run a script in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, flags)])
        try:
            cli.run(main)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def weights_alone(state: dict[str, Any], model: Any, optimizers: Any) -> None:
    """A control's `unpack`, which forgets the state of the optimizers."""
    resume.load_weights(model, state["model"])


def without_box(text: str) -> str:
    """Return the words in the boxes that tyro draws, in one line."""
    return " ".join(re.sub("[╭╮╰╯│─]", " ", text).split())


def start(script: str, *arguments: object, output: Path, **environment: str) -> BaseProcess:
    """Run a script in a process of its own, which appends what it prints to a file.

    Its `main` is called, or another function: "test_train:train_on_a_slow_disk".
    """
    settings = (script, [str(argument) for argument in arguments], str(output), environment)
    process = SERVER.Process(target=_run_script, args=settings)
    process.start()
    return process


def start_two(script: str, *arguments: object, output: Path) -> list[BaseProcess]:
    """Run a script in two processes that work together."""
    return start_many(2, script, *arguments, output=output)


def start_many(
    n: int, script: str, *arguments: object, output: Path, per_machine: int = 0
) -> list[BaseProcess]:
    """Run a script in `n` processes that work together, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    where["LOCAL_WORLD_SIZE"] = str(per_machine or n)
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n))
    return [start(script, *arguments, output=output, **where, **rank) for rank in ranks]


def finish(process: BaseProcess, seconds: float = PROCESS_SECONDS) -> int | None:
    """Wait for a process; return its exit code, negative if a signal killed it."""
    process.join(seconds)
    return process.exitcode


def wait_for_lines(path: Path, n: int) -> None:
    for _ in range(10_000):
        if path.exists() and len(path.read_text().splitlines()) >= n:
            return
        time.sleep(0.01)
    raise TimeoutError(f"{path} has fewer than {n} lines")


def _run_script(
    script: str, arguments: list[str], output: str, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    module, _, function = script.partition(":")
    sys.argv = [f"{module}.py", *arguments]
    cli.run(getattr(importlib.import_module(module), function or "main"))


def outcome(out_dir: Path) -> dict[str, Any]:
    """All that a run leaves but times and paths, with tensors as hashes of their bytes."""
    lines = metrics.read(out_dir / "metrics.jsonl")
    result: dict[str, Any] = {"metrics": [without_times(line) for line in lines]}
    for name in ("last", "best"):
        state = checkpoint.load(out_dir, name)
        result[name] = {key: plain(state[key]) for key in ("step", "best_val_loss", "model")}
        result[name]["optimizers"] = plain(state["optimizers"])
    return result


def without_times(line: dict[str, float]) -> dict[str, float]:
    times = ("elapsed_seconds", "tokens_per_second")
    return {key: value for key, value in line.items() if key not in times}


def losses(out_dir: Path) -> list[float]:
    """Training and validation losses of a run, in order."""
    lines = metrics.read(out_dir / "metrics.jsonl")
    return [line["train_loss"] if "train_loss" in line else line["val_loss"] for line in lines]


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    return value
