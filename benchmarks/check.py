"""`bench.py check`: does this device compute what a CPU does, in every way that a run may go?"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.preparation import prepare
from benchmarks.runs import temporary_folder
from benchmarks.table import Output, Row, Tables
from benchmarks.training import train
from data.loader import Dataset
from engine.device import DeviceName
from sampling.decode import Decoder
from sampling.load import load_model

CONFIG = Path(__file__).with_suffix(".toml")
HALF_THE_STEPS = "--max_steps=10"
STEPS = "--max_steps=20"
BFLOAT16 = "--precision=bfloat16"
PROMPT_TOKENS = 8
NEW_TOKENS = 16
# How far apart losses in nats, or logits, may be
ROUNDING = 1e-3  # float32, summed in another order
NOISE = 1e-4  # the same operations on a GPU that adds in any order
MOST_OF_BFLOAT16 = 0.05
TOO_FAR = "TOO FAR"


@dataclass(frozen=True, kw_only=True)
class Check(Output):
    """Compare the losses of short runs, and decoded logits with those of one forward pass."""

    text: Path
    """A text file, such as that of tiny Shakespeare."""
    flags: str = ""
    """More flags for train.py, in one string."""
    device: DeviceName = "auto"
    """Device to check."""

    def measure(self) -> Tables:
        """Train a few times, each in a process of its own, and decode one text."""
        with temporary_folder() as folder:
            prepare(self.text, "char", folder / "data")
            plain = self.loss(folder / "plain")
            self.loss(folder / "half", HALF_THE_STEPS)
            resumed = train(folder / "half/config.toml", folder / "half", "--resume", STEPS)["loss"]
            rows = [
                row("on the CPU", plain, self.loss(folder / "cpu", "--device=cpu"), ROUNDING),
                row("compiled", plain, self.loss(folder / "compiled", "--compile"), ROUNDING),
                row("bfloat16", plain, self.loss(folder / "bf16", BFLOAT16), MOST_OF_BFLOAT16),
                row("resumed", plain, resumed, NOISE),
                row("logits, decoded", 0.0, self.decoded_apart(folder), ROUNDING),
            ]
        return {"against float32, eager, undisturbed, in one pass": rows}

    def loss(self, out_dir: Path, *flags: str) -> float:
        """Return the last validation loss of a run with these flags."""
        data, device = f"--data.path={out_dir.parent / 'data'}", f"--device={self.device}"
        return train(CONFIG, out_dir, data, device, *shlex.split(self.flags), *flags)["loss"]

    def decoded_apart(self, folder: Path) -> float:
        """Return how far logits of cached steps, on a GPU captured ones, are from one pass's."""
        model = load_model(folder / "plain", "last", self.device).model
        tokens = Dataset.open(folder / "data").tokens("val", PROMPT_TOKENS + NEW_TOKENS)
        tokens_1T = torch.tensor(tokens.tolist(), device=model.wte.weight.device)[None]
        decoder = Decoder(model, [tokens_1T[0, :PROMPT_TOKENS].tolist()], NEW_TOKENS)
        steps = [decoder.read()]
        for token_1 in tokens_1T[:, PROMPT_TOKENS:].unbind(1):
            steps.append(decoder.feed(token_1).clone())  # a captured step writes over its logits
        with torch.inference_mode():
            logits_TV = model(tokens_1T)[0, PROMPT_TOKENS - 1 :]
        return (torch.cat(steps) - logits_TV).abs().max().item()


def row(what: str, plain: float, other: float, most: float) -> Row:
    difference = abs(other - plain)
    found: Row = {"check": what, "plain": plain, "other": other, "difference": difference}
    return found | {"at most": most, "outcome": "ok" if difference <= most else TOO_FAR}
