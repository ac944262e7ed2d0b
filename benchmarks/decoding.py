"""How fast a model of random weights reads prompts and goes on: python -m benchmarks.decoding

For each precision, prompt and batch size one line of JSON, with the machine's own bandwidth just
before and after, and the limit that follows from it.
"""

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch

from benchmarks.generation import ModelName, PrecisionName
from benchmarks.limits import Memory, cache_bytes, seconds, weight_bytes
from benchmarks.shapes import random_model, random_prompts, shape
from benchmarks.table import Row
from engine import cli
from engine.parallel import DeviceName, find_device
from model import GPT, ModelConfig
from sampling.choose import Choice
from sampling.decode import Decoder
from sampling.precision import check, convert

GREEDY = Choice(temperature=0)
SETTLING_STEPS = 3  # not timed: the second one sets up what the others use
AT_ONCE = {"cpu": 1, "cuda": 8}  # steps timed together: waiting for a GPU would slow it down
READS, READ_SECONDS = 3, 3.0  # of the prompts: so often, unless it takes longer


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """Time the reading of prompts and the steps after it."""

    model: ModelName
    """Its sizes."""
    precisions: tuple[PrecisionName, ...] = ()
    """Of the weights (default: all that the device has)."""
    prompts: tuple[int, ...] = (16, 512)
    """Tokens of each prompt, cut to what leaves room for the steps."""
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    """Texts that grow at once."""
    steps: int = 24
    """Tokens per text that are timed."""
    device: DeviceName = "auto"
    """Where to run."""


def measure(config: DecodingConfig) -> Iterator[Row]:
    """Yield a row for each precision, prompt and batch size."""
    device = torch.device(find_device(config.device))
    memory, sizes = Memory(device), shape(config.model)
    for precision in config.precisions or available(device):
        model = convert(random_model(config.model, device), precision)
        for length in fitting(config.prompts, sizes, config.steps):
            for batch_size in config.batch_sizes:
                found = Measurement(model, precision, length, batch_size, config.steps)
                yield {"model": config.model} | found.row(memory)


def fitting(prompts: Iterable[int], config: ModelConfig, steps: int) -> list[int]:
    """(16, 512), of which 200 leave room for the steps -> [16, 200]."""
    new = 1 + SETTLING_STEPS + steps
    room = config.context_length - new
    if room < 1:
        limit = f"a context of {config.context_length} tokens"
        raise ValueError(f"steps must be fewer: {new} new tokens leave no prompt in {limit}")
    return list(dict.fromkeys(min(room, prompt) for prompt in prompts))


@dataclass(frozen=True)
class Measurement:
    """Texts of one length that are read, and grow."""

    model: GPT
    precision: PrecisionName
    prompt: int
    batch_size: int
    steps: int

    def row(self, memory: Memory) -> Row:
        """Read, then grow between two measurements of the memory."""
        read_seconds, decoder = self.read()
        before = memory.bandwidth()
        step_seconds = self.grow(decoder)
        bandwidth = (before + memory.bandwidth()) / 2
        context = self.prompt + SETTLING_STEPS + (self.steps + 1) // 2  # of the step in the middle
        assert decoder.cache is not None
        # a step reads the weights once, and the cache of each text
        n_bytes = weight_bytes(self.model.config, self.precision)
        n_bytes += cache_bytes(decoder.cache, context)
        limit = bandwidth * self.batch_size / n_bytes
        return {
            "precision": self.precision,
            "prompt": self.prompt,
            "batch": self.batch_size,
            "prefill tokens/s": self.batch_size * self.prompt / read_seconds,
            "decode tokens/s": self.batch_size / step_seconds,
            "step ms": 1000 * step_seconds,
            "MB a step": n_bytes / 1e6,
            "memory GB/s": bandwidth / 1e9,
            "limit tokens/s": limit,
            "of limit": self.batch_size / step_seconds / limit,
        }

    def read(self) -> tuple[float, Decoder]:
        """Median time to the first tokens, and the texts as they are then."""
        taken: list[float] = []
        while True:
            decoder = self.start()
            taken.append(seconds(decoder.step, decoder.device))
            if len(taken) == READS or sum(taken) >= READ_SECONDS:
                return statistics.median(taken), decoder

    def start(self) -> Decoder:
        config = self.model.config
        prompts = random_prompts(config, self.batch_size, self.prompt)
        new = 1 + SETTLING_STEPS + self.steps
        seeds = [(0, row) for row in range(self.batch_size)]
        return Decoder(self.model, prompts, seeds, GREEDY, config.vocab_size, new)

    def grow(self, decoder: Decoder) -> float:
        """Median time of a step."""
        for _ in range(SETTLING_STEPS):
            decoder.step()
        at_once = min(AT_ONCE[decoder.device.type], self.steps)

        def several() -> None:
            for _ in range(at_once):
                decoder.step()

        taken = [seconds(several, decoder.device) for _ in range(self.steps // at_once)]
        return statistics.median(taken) / at_once


def available(device: torch.device) -> list[PrecisionName]:
    """Every precision that this device has."""
    found: list[PrecisionName] = []
    for precision in get_args(PrecisionName):
        try:
            check(precision, device)
        except ValueError:
            continue
        found.append(precision)
    return found


def main() -> None:
    for row in measure(cli.parse_config(DecodingConfig)):
        print(json.dumps(row))


if __name__ == "__main__":
    cli.run(main)
