"""Write checkpoints while the training goes on: in a thread, from a copy on the host."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from engine import checkpoint, shares
from engine.parallel import World, is_shared


class Saver:
    """Writes one checkpoint at a time."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def save(self, out_dir: Path, state: dict[str, Any], names: list[str], world: World) -> None:
        """Copy `state`, and begin to write it under these names, once `close` has been called.

        Every process must call this; the main process writes what is not shared.
        """
        are_shared = any(map(is_shared, state["model"].values()))
        if world.is_main or are_shared:
            copy = host_copy(state, None if are_shared else {})
            save = partial(write_shares, world) if are_shared else checkpoint.save
            self.pending = self.thread.submit(save, out_dir, copy, names)

    def close(self) -> None:
        """Wait until what was begun is written. Raises OSError if it could not be."""
        pending = self.pending
        self.pending = None
        if pending is not None:
            pending.result()


def host_copy(value: Any, done: dict[Any, Tensor] | None) -> Any:
    """Copy all tensors in a state to the host.

    Tensors that share memory, as tied ones do, have one copy in `done`. With None each has its own,
    as files of shares need it.
    """
    if isinstance(value, dict):
        return {key: host_copy(part, done) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host_copy(part, done) for part in value)
    if not isinstance(value, Tensor):
        return value
    if done is None:
        return value.detach().to("cpu", copy=True)
    key = (value.data_ptr(), value.shape)
    if key not in done:
        done[key] = value.detach().to("cpu", copy=True)
    return done[key]


def write_shares(world: World, out_dir: Path, state: dict[str, Any], names: list[str]) -> None:
    """Write this process's share; when all are written, the main process puts them on record."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # a thread begins with the first GPU
    token = world.gather(uuid4().hex[:8])[0]
    folder = out_dir / f"step_{state['step']:08d}_{token}.shares"
    try:
        tensors = shares.flat(state)
        each = together(lambda: shares.write(folder, tensors, world.host_group), world)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(checkpoint.not_written(state["step"], out_dir, error)) from error
    hashes = {name: sha256 for own in each for name, sha256 in own.items()}
    its_shares = {"folder": folder.name, "sha256": hashes}
    small = {key: value for key, value in state.items() if key not in ("model", "optimizers")}

    def put_on_record() -> None:
        if world.is_main:
            checkpoint.save(out_dir, small, names, its_shares)

    together(put_on_record, world)


def together(task: Callable[[], Any], world: World) -> list[Any]:
    """Do this in every process; return what each got. Raises OSError in all if one fails."""
    result = None
    problem = ""
    try:
        result = task()
    except BaseException as error:  # a panic in safetensors, too: the others must not wait
        problem = str(error) or repr(error)
    results, problems = zip(*world.gather((result, problem)), strict=True)
    if any(problems):
        raise OSError(max(problems))
    return list(results)
