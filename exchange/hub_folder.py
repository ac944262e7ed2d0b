"""A folder in the form of the Hugging Face hub: config, weights, tokenizer, model card.

config.json, generation_config.json     what transformers, vLLM and others build
model.safetensors                       weights, under the hub's names
tokenizer.json, tokenizer_config.json   text <-> token ids
README.md                               the model card
"""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import files
from data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from exchange import architecture, card, names, vocabulary
from model import ModelConfig, require

OURS = "glassgpt"  # in config.json, what only this project knows of a model:
ABOUT = ("step", "best_val_loss", "data")
UNKNOWN: dict[str, Any] = {"step": 0, "best_val_loss": None, "data": {}}  # of another project's
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files


def export(state: dict[str, Any], folder: Path, license: str) -> None:
    """Write the folder of a checkpoint. Raises FileExistsError if there is one already."""
    config, weights, tokenizer = unpadded(state)
    about = {key: state[key] for key in ABOUT}
    if about["best_val_loss"] == math.inf:  # a run that was stopped before it evaluated
        about["best_val_loss"] = None
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text)
    texts = {
        "config.json": as_json(architecture.to_json(config, tokenizer) | {OURS: about}),
        "generation_config.json": as_json(ends),
        "tokenizer.json": as_json(vocabulary.to_json(tokenizer)),
        "tokenizer_config.json": as_json(tokenizer_config(tokenizer, config.context_length)),
        "README.md": card.card(config, weights, about, license),
    }
    with files.whole_folder(folder) as partial:
        for name, text in texts.items():
            files.write_text(partial / name, text)
        try:
            save_file(names.to_hub(config, weights), partial / WEIGHTS, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written: {error}") from error
        shutil.copymode(partial / "config.json", partial / WEIGHTS)  # save_file lets no other read


def unpadded(state: dict[str, Any]) -> tuple[ModelConfig, dict[str, Tensor], Tokenizer]:
    """Return the model and the tokenizer of a checkpoint, as other projects want them."""
    tokenizer = load_tokenizer(state["tokenizer"])
    cut = without_padding(ModelConfig(**state["model_config"]), state["model"], tokenizer)
    return ModelConfig(**cut["model_config"]), cut["model"], tokenizer


def without_padding(
    config: ModelConfig, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return a checkpoint's model, whose embeddings and head end with the tokens that there are."""
    n = tokenizer.vocab_size
    require(n <= config.vocab_size, f"the tokenizer has {n} tokens, the model {config.vocab_size}")
    cut = {name: weights[name][:n] for name in ("wte.weight", "lm_head.weight")}
    return {
        "model_config": asdict(replace(config, vocab_size=n).sized()),
        "tokenizer": tokenizer.state(),
        "model": weights | cut,
    }


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json.

    It names the class, as transformers would else take that of the model, which has other rules;
    and what a text becomes, as transformers 4 would else add token types, which GPT-2 would embed.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.end_of_text is not None:
        config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    return config


def read(folder: Path) -> dict[str, Any]:
    """Return the checkpoint of a folder. Raises ValueError if this project has no such model."""
    config, tokenizer, about = read_description(folder)
    weights = names.from_hub(config, read_weights(folder))
    return without_padding(config, weights, tokenizer) | about


def read_description(folder: Path) -> tuple[ModelConfig, Tokenizer, dict[str, Any]]:
    """Return all but the weights. Raises ValueError if this project has no such model."""
    found = read_json(folder / "config.json")
    with files.readable(folder / "config.json"):
        config = architecture.from_json(found)
        about = {key: ({OURS: UNKNOWN} | found)[OURS][key] for key in ABOUT}
        card.origin(about)  # raises an error if the card could not tell it
        require(isinstance(about["step"], int), f"step must be an integer: got {about['step']}")
    return config, vocabulary.from_json(read_json(folder / "tokenizer.json")), about


def read_json(path: Path) -> dict[str, Any]:
    with files.readable(path):
        found = json.loads(path.read_text(encoding="utf-8"))
    require(isinstance(found, dict), f"{path} must hold an object: got {str(found)[:60]}")
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of one file or of many. Raises ValueError if a file is damaged."""
    shards = {WEIGHTS}
    if (folder / INDEX).exists():
        found = read_json(folder / INDEX)
        with files.readable(folder / INDEX):
            shards = set(map(files.plain_name, found["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for shard in sorted(shards):
        with files.readable(folder / shard):
            weights |= load_file(folder / shard)
    return weights
