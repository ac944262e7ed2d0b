"""One judge for the models of both sides: python -m benchmarks.evaluator --data=DATASET ...

The mean loss over the whole validation split in float32, in windows side by side of each model's
own context length: each token but the first is a target once. Prints one JSON object per model.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.nanogpt import import_model
from data.loader import Dataset
from engine import checkpoint, cli
from engine.parallel import DeviceName, find_device
from model import GPT, ModelConfig
from sampling.precision import SamplePrecision, convert

TOKENS_PER_PASS = 4096
LogitsOf = Callable[[Tensor, Tensor], Tensor]  # tokens_BT, targets_BT -> logits_BTV


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
    """Evaluate checkpoints of ours and of nanoGPT, in the order given, ours first."""

    data: Path
    """Folder that data.prepare wrote; both sides trained on its tokens."""
    ours: tuple[Path, ...] = ()
    """Folders of our runs, of which the last checkpoint counts."""
    theirs: tuple[Path, ...] = ()
    """Files that nanoGPT's train.py wrote."""
    nanogpt: Path | None = None
    """The checkout that they are from."""
    most_tokens: int = 0
    """Evaluate on the first so many tokens of the split; 0 for all."""
    precision: SamplePrecision = "float32"
    """Of the weights of ours."""
    device: DeviceName = "auto"
    """Where to evaluate."""


def evaluate_all(config: EvaluatorConfig) -> Iterator[dict[str, float]]:
    """Yield the loss and the size of each model."""
    device = find_device(config.device)
    ids = Dataset.open(config.data).tokens("val", config.most_tokens)
    tokens_N = torch.from_numpy(ids.astype(np.int64)).to(device)
    for out_dir in config.ours:
        ours = our_model(out_dir).to(device).eval()
        size = parameters(ours)
        if config.precision != "float32":
            ours = convert(ours, config.precision)
        loss = split_loss(lambda x, _, model=ours: model(x), tokens_N, ours.config.context_length)
        yield {"loss": loss, "parameters": size}
    for path in config.theirs:
        assert config.nanogpt is not None
        theirs, block_size = nanogpt_model(config.nanogpt, path)
        theirs = theirs.to(device).eval()
        loss = split_loss(lambda x, y, model=theirs: model(x, y)[0], tokens_N, block_size)
        yield {"loss": loss, "parameters": parameters(theirs)}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def split_loss(logits_of: LogitsOf, tokens_N: Tensor, context_length: int) -> float:
    """Mean loss in nats per token over a whole split."""
    total = 0.0
    for tokens_BT, targets_BT in windows(tokens_N, context_length):
        logits_BTV = logits_of(tokens_BT, targets_BT).float()
        sum_of_losses = F.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum"
        )
        total += sum_of_losses.item()
    return total / (len(tokens_N) - 1)


def windows(tokens_N: Tensor, context_length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets: batches of whole windows, then the rest, which is shorter."""
    inputs_N, targets_N = tokens_N[:-1], tokens_N[1:]
    whole = len(inputs_N) // context_length * context_length
    rows = max(1, TOKENS_PER_PASS // context_length)
    batches_BT = (ids[:whole].view(-1, context_length).split(rows) for ids in (inputs_N, targets_N))
    if whole:
        yield from zip(*batches_BT, strict=True)
    if whole < len(inputs_N):
        yield inputs_N[None, whole:], targets_N[None, whole:]


def our_model(out_dir: Path) -> GPT:
    state = checkpoint.load(out_dir, "last")
    model = GPT(ModelConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    return model


def nanogpt_model(checkout: Path, path: Path) -> tuple[nn.Module, int]:
    """Rebuild a model from nanoGPT's checkpoint by its own class; return also its context."""
    module = import_model(checkout)
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
        model = module.GPT(module.GPTConfig(**state["model_args"]))
    prefix = "_orig_mod."  # of the names in a compiled model
    model.load_state_dict({name.removeprefix(prefix): w for name, w in state["model"].items()})
    return model, state["model_args"]["block_size"]


def main() -> None:
    for result in evaluate_all(cli.parse_config(EvaluatorConfig)):
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
