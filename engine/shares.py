"""A checkpoint in shares: safetensors files of each process that has a share of the numbers.

torch.distributed.checkpoint writes and reads them, for any number of processes. It reads flipped
bits without complaint, so engine/checkpoint.py compares the SHA-256 of each file before that.
"""

import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import files
from engine.parallel import local
from model import require

FILE_BYTES = 2**28  # about the size of a file: before it is written, the memory holds it twice
Tensors = dict[str, Tensor]  # by the names in the files, such as "model.wte.weight"


def flat(state: dict[str, Any]) -> Tensors:
    """Return the weights and the optimizers' tensors of a checkpoint, each with a name."""
    tensors = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    for i, optimizer in enumerate(state["optimizers"]):
        for name, parts in optimizer.items():
            tensors |= {f"optimizers.{i}.{name}.{j}": part for j, part in enumerate(parts)}
    return tensors


def write(folder: Path, tensors: Tensors, group: Any) -> dict[str, str]:
    """Write this process's share of the tensors; return the SHA-256 of its files, by their names.

    Every process must call this. Raises OSError in all of them if one cannot write.
    """
    from torch.distributed.checkpoint import api, hf_storage, state_dict_saver  # slow to import

    n_bytes = [local(tensor).nbytes for tensor in tensors.values()]
    numbers = [1 + end // FILE_BYTES for end in accumulate(n_bytes)]
    mapping = dict(zip(tensors, numbers, strict=True))
    writer = hf_storage.HuggingFaceStorageWriter(str(folder), mapping, save_distributed=True)
    try:
        state_dict_saver.save(tensors, storage_writer=writer, process_group=group)
    except api.CheckpointException as error:  # which is a BaseException
        raise OSError(reason_of(error)) from None
    own = list(folder.glob(f"shard-{dist.get_rank(group) + 1:05d}-*.safetensors"))
    for path in own:
        with open(path, "r+b") as file:
            files.sync(file)  # the writer does so while it still holds the last few bytes
    files.sync_folder(folder)
    return {path.name: files.sha256(path) for path in own}


def read(folder: Path, tensors: Tensors) -> None:
    """Fill tensors, or the rows of them that this process has. Raises ValueError for others."""
    is_same = sizes(folder).keys() == tensors.keys()
    require(is_same, "a run goes on with its own optimizer: optim.name has changed")
    fill(tensors, folder)


def read_weights(folder: Path) -> Tensors:
    """Return the weights, whole, by their names in the model."""
    weights = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in sizes(folder).items()
        if name.startswith("model.")
    }
    fill(weights, folder)
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def sizes(folder: Path) -> dict[str, Any]:
    """Return the size and the type of each tensor in the files of a folder, by its name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def fill(tensors: Tensors, folder: Path) -> None:
    """Read tensors of these names; each process does so by itself. Raises OSError."""
    from torch.distributed.checkpoint import api, hf_storage, state_dict_loader

    reader = hf_storage.HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of no other process
            state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)
    except api.CheckpointException as error:
        raise OSError(f"{folder} cannot be read: {reason_of(error)}") from None


def reason_of(error: Any) -> str:
    """Return the first reason in a CheckpointException, whose own text is a whole traceback."""
    rank, (reason, _) = next(iter(error.failures.items()))
    return f"process {rank}: {reason}"
