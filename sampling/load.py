"""A trained model from the folder of its run."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

import files
from data.tokenizer import Tokenizer, load_tokenizer
from engine import checkpoint
from engine.count import product_weights
from engine.device import DeviceName, find_device
from model import GPT, ModelConfig, require
from sampling.cache import cached_attention


class Trained(NamedTuple):
    """A model in eval mode, with its tokenizer and step."""

    model: GPT
    tokenizer: Tokenizer
    starts_documents: bool
    """Whether each text of its dataset starts with end-of-text."""
    step: int
    """Updates that the model has had."""


def load_model(out_dir: Path, name: str = "best", device: DeviceName = "auto") -> Trained:
    """Rebuild the model of a checkpoint on a device. Raises OSError or ValueError if damaged."""
    state = checkpoint.load(out_dir, name)
    with files.readable(f"the {name} checkpoint in {out_dir}"):
        config = ModelConfig(**state["model_config"]).sized()
        tokenizer = load_tokenizer(state["tokenizer"])
        is_large_enough = tokenizer.vocab_size <= config.vocab_size
        require(is_large_enough, f"its tokenizer has more tokens than {config}")
        check_size(config, state["model"])
    model = GPT(config, cached_attention)
    with files.readable(f"the {name} checkpoint in {out_dir}"):
        model.load_state_dict(state["model"])
        splits = state["data"].values()  # none are known of a model that was imported
        starts_documents = not splits or any(split["documents"] > 1 for split in splits)
        step = int(state["step"])
    return Trained(model.to(find_device(device)).eval(), tokenizer, starts_documents, step)


def check_size(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Raise ValueError, before memory is taken, if a model has more weights than there are."""
    n_there = sum(weight.numel() for weight in weights.values() if weight.is_contiguous())
    n_positions = 0 if config.is_modern else config.context_length
    n_needed = product_weights(config) + n_positions * config.n_embd
    is_there = n_needed <= n_there and config.n_layer < len(weights)
    require(is_there, f"{n_there:,} weights are not those of {config}")
