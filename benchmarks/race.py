"""`bench.py race`: nanoGPT's train.py and ours, in turn, on one text, judged by one evaluator."""

import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from benchmarks import nanogpt
from benchmarks.preparation import prepare
from benchmarks.runs import temporary_folder
from benchmarks.table import Repeated, Row, Tables, medians
from benchmarks.training import FIRST_SEED, steps_within, train
from data.loader import Dataset
from engine.device import DeviceName, find_device
from engine.loss import LossModel
from sampling.load import load_model
from sampling.prompts import read_text
from sampling.score import split_loss

THEM = "nanoGPT"
US = "ours"
US_EQUAL = "ours, equal time"
US_LONGER = "ours, more steps"
LONGER = 1.25  # a further try has this many times the steps
SAFETY = 0.95  # of the other's time, so that a run of equal time does not end after it
FEWEST_CHARACTERS = 10 * (256 + 2)  # 256: the context of nanoGPT's stock config


@dataclass(frozen=True, kw_only=True)
class Race(Repeated):
    """Race nanoGPT's own code, with its README's command, on a text."""

    nanogpt: Path
    """A checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT"""
    text: Path
    """A text file; the first 90 % of its characters train, the rest validates."""
    config: Path = Path("config/race_cpu.toml")
    """Our config."""
    tokenizer: Literal["char", "gpt2"] = "char"
    """How the text becomes tokens; nanoGPT's dataset of gpt2 tokens is called large."""
    device: DeviceName = "auto"
    """Device; on cuda nanoGPT runs its stock config, else its README's command for a CPU."""
    equal_time: bool = True
    """Train ours for as long as nanoGPT took, too, and longer where it ends above its loss."""
    flags: str = ""
    """More flags for our train.py, in one string."""
    their_flags: str = ""
    """More flags for nanoGPT's train.py, in one string."""

    def measure(self) -> Tables:
        """Race in rounds; while ours ends above the other's loss, try more steps.

        No run gets more steps than the run of equal time. Models are judged off the clock.
        """
        text = read_lines(self.text)
        rows: list[Row] = []
        with temporary_folder() as folder:
            checkout = nanogpt.copy(self.nanogpt, folder / "nanogpt")
            prepare_both(checkout, text, self.tokenizer, folder)
            for n in range(self.repeats):
                rows += self.round(n, checkout, folder)
            steps = math.ceil(LONGER * of_side(rows, US)["steps"])
            most = of_side(rows, US_EQUAL)["steps"] if self.equal_time else 0
            while shortest(rows) is None and steps < most:
                rows += [self.ours(US_LONGER, n, folder, steps) for n in range(self.repeats)]
                steps = math.ceil(LONGER * steps)
        return {"runs": rows, "summary": summary(rows)}

    def round(self, n: int, checkout: Path, folder: Path) -> list[Row]:
        """Run theirs, ours, and ours again for the steps that fit into the time of theirs.

        The last is left out without `equal_time`.
        """
        stock = nanogpt.STOCK if find_device(self.device) == "cuda" else nanogpt.CPU
        out_dir = folder / f"theirs_{n}"
        flags = (*stock, *shlex.split(self.their_flags), f"--out_dir={out_dir}")
        finished = nanogpt.train(checkout, FIRST_SEED + n, *flags)
        theirs: Row = {"run": THEM, "seed": str(FIRST_SEED + n), "steps": None}
        step_ms = statistics.median(map(float, nanogpt.UPDATE.findall(finished.text)))
        theirs |= {"step ms": step_ms, "whole process s": finished.seconds}
        model, context_length = nanogpt.load_loss(checkout, out_dir / "ckpt.pt")
        theirs |= self.judge(model, context_length, folder)
        rows = [theirs, self.ours(US, n, folder)]
        if self.equal_time:
            steps = steps_within(rows[-1], SAFETY * finished.seconds)
            rows.append(self.ours(US_EQUAL, n, folder, steps))
        return rows

    def ours(self, side: str, n: int, folder: Path, steps: int = 0) -> Row:
        """Train ours, for the steps of its config or for others."""
        seed, out_dir = FIRST_SEED + n, folder / f"ours_{n}_{steps}"
        flags = [f"--data.path={folder / 'data'}", f"--seed={seed}", f"--device={self.device}"]
        flags += shlex.split(self.flags)
        if steps:
            flags += [f"--max_steps={steps}", f"--eval_every={steps}"]
        row = {"run": side, "seed": str(seed)} | train(self.config, out_dir, *flags)
        model = load_model(out_dir, "last").model
        loss_model = LossModel(model, torch.float32)
        return row | self.judge(loss_model, model.config.context_length, folder)

    def judge(self, model: nn.Module, context_length: int, folder: Path) -> Row:
        """Evaluate a model in float32, in windows of its own context length, side by side."""
        dataset = Dataset.open(folder / "data")
        loss = split_loss(model.to(find_device(self.device)), context_length, dataset)
        return {"loss": loss, "parameters": sum(p.numel() for p in model.parameters())}


def of_side(rows: list[Row], name: str) -> Row:
    """Return the medians of one side."""
    return medians([row for row in rows if row["run"] == name])


def shortest(rows: list[Row]) -> Row | None:
    """Return the medians of our shortest runs that end at most at the other's loss, if any do."""
    tries: dict[int, list[Row]] = {}
    for row in rows:
        if row["run"] in (US, US_LONGER):
            tries.setdefault(row["steps"], []).append(row)
    target = of_side(rows, THEM)["loss"]
    return next((m for m in map(medians, tries.values()) if m["loss"] <= target), None)


def summary(rows: list[Row]) -> list[Row]:
    """Return the race in a few lines: medians over the rounds, and theirs divided by ours."""
    theirs, ours = of_side(rows, THEM), of_side(rows, US)
    pairs = {
        "whole process, s": ("whole process s", ours),
        "loss on the whole validation split": ("loss", ours),
        "time to nanoGPT's final loss, s": ("whole process s", shortest(rows)),
        "parameters": ("parameters", ours),
    }
    if any(row["run"] == US_EQUAL for row in rows):
        equal = of_side(rows, US_EQUAL)
        pairs["time of the run of equal time, s"] = ("whole process s", equal)
        pairs["loss at equal time"] = ("loss", equal)
    return [
        {"median": what, THEM: theirs[column]}
        | ({US: own[column], "ratio": theirs[column] / own[column]} if own else {US: "not reached"})
        for what, (column, own) in pairs.items()
    ]


def read_lines(path: Path) -> str:
    """Read a text with \n for every line end, as nanoGPT does. Raises ValueError if it is short."""
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    if len(text) < FEWEST_CHARACTERS:
        raise ValueError(
            f"{path} is too short: its last tenth must be longer than a context, which takes "
            f"{FEWEST_CHARACTERS:,} characters: got {len(text):,}"
        )
    return text


def prepare_both(checkout: Path, text: str, tokenizer: str, folder: Path) -> None:
    """Prepare the text on both sides. Raises ValueError if these differ in a token or a split."""
    path = folder / "input.txt"
    path.write_text(text, encoding="utf-8", newline="\n")
    prepare(path, tokenizer, folder / "data")
    if tokenizer == "gpt2":  # nanoGPT keeps such tokens in files of the same form
        (checkout / "data/large").symlink_to(folder / "data")
        return
    theirs = nanogpt.prepare(checkout, path)
    for name in ("train.bin", "val.bin"):
        if (theirs / name).read_bytes() != (folder / "data" / name).read_bytes():
            raise ValueError(f"the two sides have different tokens of this text in {name}")
