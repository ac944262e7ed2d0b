"""`bench.py race`: nanoGPT's train.py and ours, in turn, on the same text."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import nanogpt, ours
from benchmarks.machine import probe
from benchmarks.nanogpt import Checkout
from benchmarks.runs import temporary_folder
from benchmarks.table import Tables
from benchmarks.verdict import THEM, US, US_EQUAL, Entry, judge, reached, summary
from data.format import SPLITS, token_file
from engine.cli import at_least

LONGER = 1.25  # a further try has so many times the steps
SAFETY = 0.95  # of the other's time, so that a run of equal time does not end after it
TINY_STEPS = 20
TINY_CONTEXT = 16
TINY_CHARACTERS = 10 * (TINY_CONTEXT + 2)
FEWEST_CHARACTERS = 10 * (256 + 2)  # 256 is the longest context that is raced
TINY_THEIRS = (
    *f"--max_iters={TINY_STEPS} --lr_decay_iters={TINY_STEPS} --eval_interval=10".split(),
    *f"--block_size={TINY_CONTEXT} --n_layer=1 --n_head=2 --n_embd=16 --eval_iters=2".split(),
)
DeviceName = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True, kw_only=True)
class RaceBench:
    """Race nanoGPT's own code, with its README's command, on a text."""

    nanogpt: Path
    """A checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT"""
    text: Path
    """A text file; the first 90 % of its characters train, the rest validates."""
    config: Path = Path("config/race_cpu.toml")
    """Our config."""
    repeats: int = 3
    """Rounds; each has its own seed."""
    seed: int = 1337
    """Of the first round."""
    target: float = 0.0
    """Also the time until an evaluation of a run's own prints at most this loss; 0 for none."""
    device: DeviceName = "auto"
    """On cuda nanoGPT runs its stock config, else its README's command for a CPU."""
    tiny: bool = False
    """Small sizes and few steps, which only show that a race can be run here."""

    def __post_init__(self) -> None:
        at_least(1, self, "repeats")
        at_least(0, self, "seed", "target")

    def their_flags(self, device: str) -> tuple[str, ...]:
        flags = nanogpt.STOCK if device == "cuda" else nanogpt.CPU
        return (*flags, *(TINY_THEIRS if self.tiny else ()))

    def our_flags(self, seed: int) -> tuple[str, ...]:
        steps = (f"--max_steps={TINY_STEPS}", f"--eval_every={TINY_STEPS}")
        return (f"--seed={seed}", f"--device={self.device}", *(steps if self.tiny else ()))


def measure(config: RaceBench) -> Tables:
    """Race in rounds, then judge all models, off the clock."""
    check(config)
    on_gpu = config.device in ("auto", "cuda") and probe()["gpu"] is not None
    with temporary_folder() as folder:
        checkout = Checkout.copy(config.nanogpt, folder / "nanogpt")
        fewest = TINY_CHARACTERS if config.tiny else FEWEST_CHARACTERS
        data = prepare_both(checkout, read_text(config.text, fewest), folder)
        their_flags = config.their_flags("cuda" if on_gpu else "cpu")
        entries: list[Entry] = []
        for seed in range(config.seed, config.seed + config.repeats):
            entries += race(config, checkout, their_flags, data, seed, folder / str(seed))
        judge(entries, data, checkout, f"--device={config.device}")
        entries += reach(config, entries, data, checkout, folder)
    return {"runs": [entry.row() for entry in entries], "summary": summary(entries, config.target)}


def check(config: RaceBench) -> None:
    """Raise OSError or ValueError for what would fail only after a long run."""
    nanogpt.check(config.nanogpt)
    for path in (config.text, config.config):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")


def race(
    config: RaceBench,
    checkout: Checkout,
    their_flags: tuple[str, ...],
    data: Path,
    seed: int,
    folder: Path,
) -> list[Entry]:
    """One round: theirs, ours, and ours with as many steps as fit into the time of theirs."""
    theirs = checkout.train(folder / "theirs", seed, *their_flags)
    flags = (f"--data.path={data}", *config.our_flags(seed))
    first = ours.train(config.config, folder / "ours", *flags)
    steps = first.steps_within(SAFETY * theirs.seconds)
    longer = (*flags, f"--max_steps={steps}", f"--eval_every={steps}")
    second = ours.train(config.config, folder / "equal", *longer)
    return [
        Entry(THEM, seed, 0, theirs, folder / "theirs/ckpt.pt"),
        Entry(US, seed, len(first.updates), first.finished, first.out_dir),
        Entry(US_EQUAL, seed, steps, second.finished, second.out_dir),
    ]


def reach(
    config: RaceBench, entries: list[Entry], data: Path, checkout: Checkout, folder: Path
) -> list[Entry]:
    """Where ours ended above the other's loss: again with more steps, until it ends below.

    The config's steps are enough for one text; another may be harder. At most those of the run
    of equal time are tried.
    """
    steps, most = (next(e.steps for e in entries if e.side == name) for name in (US, US_EQUAL))
    tried: list[Entry] = []
    while reached(entries + tried) is None and (steps := math.ceil(LONGER * steps)) < most:
        new: list[Entry] = []
        for seed in range(config.seed, config.seed + config.repeats):
            flags = (f"--data.path={data}", *config.our_flags(seed), f"--max_steps={steps}")
            run = ours.train(config.config, folder / f"{seed}/{steps}", *flags)
            new.append(Entry(f"{US}, more steps", seed, steps, run.finished, run.out_dir))
        judge(new, data, checkout, f"--device={config.device}")
        tried += new
    return tried


def read_text(path: Path, fewest: int = FEWEST_CHARACTERS) -> str:
    """Read a text with \\n for every line end, as nanoGPT does. Raises ValueError if it is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    if len(text) < fewest:
        raise ValueError(
            f"{path} is too short: its last tenth must be longer than a context, "
            f"which takes {fewest:,} characters: got {len(text):,}"
        )
    return text


def prepare_both(checkout: Checkout, text: str, folder: Path) -> Path:
    """Prepare the text by characters on both sides; return our dataset.

    Raises ValueError if the two are not the same tokens in the same splits.
    """
    path = folder / "input.txt"
    path.write_text(text, encoding="utf-8", newline="\n")
    data = folder / "data"
    ours.prepare(path, "char", data)
    theirs = checkout.prepare(text)
    for split in SPLITS:
        if (theirs / f"{split}.bin").read_bytes() != (data / token_file(split)).read_bytes():
            raise ValueError(f"the two sides have different {split} tokens of this text")
    return data
