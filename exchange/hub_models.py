"""Models of the Hugging Face hub by their names, each at a commit, whose files never change."""

import re
from pathlib import Path

from data.corpora import DOWNLOADS
from data.hub import Repository
from exchange import hub_folder
from model import require

PINNED = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "c1899de289a04d12100db370d81485cdf75e47ca"),
}
NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)@(\w[\w.-]*)")
WANTED = re.compile(r"(config|tokenizer|model\.safetensors\.index)\.json|model[\w-]*\.safetensors")


def find(source: str) -> Repository | None:
    """Return the repository that gpt2 or OWNER/NAME@REVISION names; None if it is no such name."""
    if source in PINNED:
        return Repository(*PINNED[source], "models")
    found = NAME.fullmatch(source)
    return Repository(found[1], found[2], "models") if found else None


def fetch(repository: Repository) -> Path:
    """Download a model, unless it is here; return its folder. Raises OSError if that fails.

    Raises ValueError before the weights are downloaded if this project has no such model.
    """
    repository = repository.at_commit()
    folder = DOWNLOADS / repository.name / repository.revision
    print(f"{repository.name} of the hub, at {repository.revision}, goes to {folder}", flush=True)
    wanted = [file for file in repository.files(folder) if WANTED.fullmatch(file.name)]
    weights = [file for file in wanted if file.name.endswith(".safetensors")]
    require(len(weights) > 0, f"{repository.name} has no weights in model.safetensors")
    repository.fetch([file for file in wanted if file not in weights], folder)
    hub_folder.read_description(folder)
    repository.fetch(weights, folder)
    return folder
