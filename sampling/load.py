"""A trained model from the folder of its run."""

from pathlib import Path
from typing import NamedTuple

from data.tokenizer import Tokenizer, load_tokenizer
from engine import checkpoint
from engine.device import DeviceName, find_device
from model import GPT, ModelConfig
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
    model = GPT(ModelConfig(**state["model_config"]), cached_attention)
    model.load_state_dict(state["model"])
    splits = state["data"].values()  # none are known of a model that was imported
    return Trained(
        model=model.to(find_device(device)).eval(),
        tokenizer=load_tokenizer(state["tokenizer"]),
        starts_documents=not splits or any(split["documents"] > 1 for split in splits),
        step=state["step"],
    )
