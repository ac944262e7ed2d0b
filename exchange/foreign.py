"""Other projects' checkpoints of GPT-2: nanoGPT's ckpt.pt and llm.c's model.bin."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import files
from data.loader import Dataset
from data.tokenizer import BPETokenizer, Tokenizer, gpt2_ranks
from exchange import hub_folder, hub_models, names
from model import ModelConfig, require

GPT2_VOCAB_SIZE = 50257
LLMC_HEADER = 256  # numbers of 4 bytes
LLMC_MAGIC = 20240326
LLMC_TYPES = {3: "<f4", 5: "<u2"}  # by version; bfloat16 is the upper half of a float32
LLMC_LAYERS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def read(source: Path, data: Path | None) -> dict[str, Any]:
    """Return the checkpoint in a folder or a file, or on the hub, as ours.

    Raises ValueError if it is of an unknown kind, and OSError if there is none.
    """
    repository = None if source.exists() else hub_models.find(source.as_posix())
    has_tokenizer = source.is_dir() or repository is not None
    require(data is None or not has_tokenizer, f"{source} has its own tokenizer: leave out --data")
    if repository is not None:
        source = hub_models.fetch(repository)
    if source.is_dir():
        return hub_folder.read(source)
    if not source.is_file():
        raise FileNotFoundError(
            f"{source} is no folder or file: pass one that holds a checkpoint, or a name of the "
            f"hub, which is OWNER/NAME@REVISION or one of {', '.join(hub_models.PINNED)}"
        )
    with open(source, "rb") as file:
        is_llmc = file.read(4) == LLMC_MAGIC.to_bytes(4, "little")
    config, weights = read_llmc(source) if is_llmc else read_nanogpt(source)
    tokenizer = find_tokenizer(config.vocab_size, data)
    return hub_folder.without_padding(config, weights, tokenizer) | hub_folder.UNKNOWN


def find_tokenizer(vocab_size: int, data: Path | None) -> Tokenizer:
    """Return the tokenizer of a dataset, or GPT-2's. Raises ValueError if it does not fit."""
    if data is not None:
        return Dataset.open(data).tokenizer
    require(
        vocab_size >= GPT2_VOCAB_SIZE,
        f"the checkpoint does not tell its {vocab_size} tokens: prepare its text again by "
        "data.prepare, and pass --data=DATASET",
    )
    return BPETokenizer(gpt2_ranks(), kind="gpt2")


def read_nanogpt(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read what nanoGPT's train.py saves, without running code that may be in it."""
    try:
        files.check_zip(path)
        with warnings.catch_warnings(action="ignore"):  # the sentence below says it all
            found = torch.load(path, map_location="cpu", weights_only=True)
        sizes, theirs = found["model_args"], found["model"]
        config = ModelConfig(
            vocab_size=sizes["vocab_size"],
            context_length=sizes["block_size"],
            n_layer=sizes["n_layer"],
            n_head=sizes["n_head"],
            n_embd=sizes["n_embd"],
            dropout=sizes["dropout"],
        ).sized()
    except Exception as error:  # a made-up file can fail in any way
        raise ValueError(
            f"{path} is refused: it must be nanoGPT's ckpt.pt, with tensors and plain values only, "
            "or llm.c's model.bin; of the hub's form, pass the folder"
        ) from error
    print("nanoGPT's GELU is the exact one, ours is GPT-2's: the losses differ a little")
    with files.readable(path):
        state: dict[str, Tensor] = {}
        for name, tensor in theirs.items():
            ours = name.removeprefix("_orig_mod.").removeprefix("transformer.")
            if not ours.endswith(names.IGNORED):
                state[ours.replace("h.", "blocks.", 1) if ours.startswith("h.") else ours] = tensor
        for name, shape in names.shapes_of(config).items():
            if name.endswith(".bias") and not sizes["bias"]:  # a bias of 0 is none
                state.setdefault(name, torch.zeros(shape))
        return config, names.checked(config, state)


def read_llmc(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read llm.c's format: a header, then the tensors of all layers, one kind after another."""
    header_H = np.fromfile(path, "<i4", LLMC_HEADER)
    require(len(header_H) == LLMC_HEADER, f"{path} is too short for llm.c's header")
    _, version, T, V, L, H, C, padded_V = header_H[:8].tolist()
    require(version in LLMC_TYPES, f"llm.c's version must be 3 or 5: got {version}")
    config = ModelConfig(vocab_size=V, context_length=T, n_layer=L, n_head=H, n_embd=C).sized()
    shapes = names.shapes_of(config) | {"wte.weight": (padded_V, C)}
    order = ["wte.weight", "wpe.weight"]
    for layer in LLMC_LAYERS:
        for kind in ("weight", "bias"):
            order += [f"blocks.{i}.{layer}.{kind}" for i in range(L)]
    order += ["ln_f.weight", "ln_f.bias"]
    numbers_N = np.fromfile(path, LLMC_TYPES[version], offset=4 * LLMC_HEADER)
    expected = sum(int(np.prod(shapes[name])) for name in order)
    problem = f"{path} must hold {expected} numbers: got {len(numbers_N)}"
    require(len(numbers_N) == expected, problem)
    if version == 5:
        numbers_N = (numbers_N.astype("<u4") << 16).view("<f4")
    pieces = torch.from_numpy(numbers_N).split([int(np.prod(shapes[name])) for name in order])
    state = {name: piece.view(shapes[name]) for name, piece in zip(order, pieces, strict=True)}
    state["wte.weight"] = state["wte.weight"][:V]
    return config, names.checked(config, state)
