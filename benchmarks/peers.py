"""Other people's generation beside ours, on the same weights: python -m benchmarks.peers

One text, greedily. First all must give the same tokens in float32; then they take turns. Prints
a line of JSON for each side, precision and prompt.
"""

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.decoding import GREEDY, available, fitting
from benchmarks.generation import ModelName, PrecisionName
from benchmarks.limits import wait
from benchmarks.others import Generate, Tick, nanogpt_generate, transformers_generate
from benchmarks.shapes import random_model, random_prompts
from benchmarks.table import Row
from engine import cli
from engine.parallel import DeviceName, find_device
from model import GPT
from sampling.decode import Decoder
from sampling.precision import convert

ROUNDS = 3
CHECKED = 8  # tokens on which all must agree
TOKENS = {"nanoGPT": 4, "transformers": 12, "ours": 24}  # of a turn, of seconds for each


@dataclass(frozen=True, kw_only=True)
class PeersConfig:
    """Time the tokens of each side in turn."""

    model: ModelName = "124M"
    """Sizes, of GPT-2's architecture."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT."""
    transformers: bool = False
    """Hugging Face's GPT2LMHeadModel, with its cache."""
    prompts: tuple[int, ...] = (16, 512)
    """Tokens of each prompt."""
    precisions: tuple[PrecisionName, ...] = ()
    """Of ours, besides float32 (default: all that the device has)."""
    device: DeviceName = "auto"
    """Where to run."""


@dataclass(frozen=True)
class Side:
    """One that generates."""

    name: str
    precision: PrecisionName
    generate: Generate

    def turn(self, prompt_1T: Tensor) -> list[float]:
        """Seconds of each token after the first."""
        stamps: list[float] = []

        def tick() -> None:
            wait(prompt_1T.device)
            stamps.append(time.perf_counter())

        self.generate(prompt_1T, TOKENS[self.name], tick)
        return [after - before for before, after in itertools.pairwise(stamps)]


def measure(config: PeersConfig) -> Iterator[Row]:
    """Let all agree, then take turns at each prompt."""
    device = torch.device(find_device(config.device))
    model = random_model(config.model, device)
    others = peers(config, model)
    ours = Side("ours", "float32", our_generate(convert(model, "float32")))
    lengths = fitting(config.prompts, model.config, max(TOKENS.values()))
    prompts = [random_prompts(model.config, 1, length) for length in lengths]
    prompts_1T = [torch.tensor(prompt, device=device) for prompt in prompts]
    for prompt_1T in prompts_1T:
        agree([ours, *others], prompt_1T)
    sides = [*others, ours]
    for precision in config.precisions or available(device):
        if precision == "float32":
            continue
        converted = convert(random_model(config.model, device), precision)
        sides.append(Side("ours", precision, our_generate(converted)))
    for prompt_1T in prompts_1T:
        yield from take_turns(sides, prompt_1T)


def agree(sides: list[Side], prompt_1T: Tensor) -> None:
    """Raise ValueError unless all choose the same tokens; this warms all up, too."""
    own, *others = ([*side.generate(prompt_1T, CHECKED, lambda: None)[0]] for side in sides)
    for side, other in zip(sides[1:], others, strict=True):
        if other != own:
            raise ValueError(
                f"{side.name} must choose the same tokens as ours in float32, greedily, after "
                f"{prompt_1T.shape[1]}: got {list(map(int, other))}, ours are {list(map(int, own))}"
            )


def take_turns(sides: list[Side], prompt_1T: Tensor) -> Iterator[Row]:
    """Each side again and again; its median time of a token."""
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for side, steps in zip(sides, taken, strict=True):
            steps += side.turn(prompt_1T)
    for side, steps in zip(sides, taken, strict=True):
        row: Row = {"side": side.name, "precision": side.precision, "prompt": prompt_1T.shape[1]}
        yield row | {"tokens/s": 1 / statistics.median(steps)}


def peers(config: PeersConfig, model: GPT) -> list[Side]:
    """The others, each with the weights of our model."""
    if model.config.is_modern:
        raise ValueError(f"peers need GPT-2's architecture, which {config.model} has not")
    found: list[Side] = []
    if config.nanogpt:
        found.append(Side("nanoGPT", "float32", nanogpt_generate(config.nanogpt, model)))
    if config.transformers:
        found.append(Side("transformers", "float32", transformers_generate(model)))
    return found


def our_generate(model: GPT) -> Generate:
    def generate(prompt_1T: Tensor, n: int, tick: Tick) -> Tensor:
        settings = (GREEDY, model.config.vocab_size, n)
        decoder = Decoder(model, prompt_1T.tolist(), [(0,)], *settings)
        tokens_1: list[Tensor] = []
        for _ in range(n):
            tokens_1.append(decoder.step().tokens_B)
            tick()
        return torch.stack(tokens_1, dim=1)

    return generate


def main() -> None:
    for row in measure(cli.parse_config(PeersConfig)):
        print(json.dumps(row))


if __name__ == "__main__":
    cli.run(main)
