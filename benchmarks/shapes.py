"""The models that `bench.py sample` measures: real sizes, random weights."""

from typing import Any

import torch

from benchmarks.generation import ModelName
from benchmarks.runs import ROOT
from engine import cli
from model import GPT, ModelConfig

SEED = 1337
LOUDER = 10  # fresh blocks add so little that a tied head mostly repeats the last token


def shape(name: ModelName) -> ModelConfig:
    """The sizes of a model; tiny ones only show that the parts work together."""
    if name == "124M":
        return ModelConfig()
    if name == "quickstart":
        sizes = cli.read_toml(str(ROOT / "config/quickstart.toml"))["model"]
        return ModelConfig(**sizes, vocab_size=4097)  # as its header prepares the dataset
    tiny: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32}
    return ModelConfig(**tiny, vocab_size=97, context_length=64)


def random_model(name: ModelName, device: torch.device) -> GPT:
    """The same numbers every time, ready to evaluate; each next token depends on all layers."""
    torch.manual_seed(SEED)
    model = GPT(shape(name))
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if parameter.endswith("c_proj.weight"):
                weight *= LOUDER
    return model.to(device).eval()


def random_prompts(config: ModelConfig, batch_size: int, length: int) -> list[list[int]]:
    """Texts that are all different, so that each must be read."""
    generator = torch.Generator().manual_seed(SEED)
    size = (batch_size, length)
    return torch.randint(config.vocab_size, size, generator=generator).tolist()
