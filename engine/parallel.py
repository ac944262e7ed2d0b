"""One process or many: copy the model to each, add up numbers over all, stop all together."""

import gc
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.device import DeviceName, find_device, keep_freed_memory

TIMEOUT = timedelta(minutes=10)  # after which a process no longer waits for another
LOST = ("gloo", "pair closure")  # gloo's messages about a lost process contain one of these


@dataclass
class World:
    """Who this process is among the processes that torchrun started."""

    device: torch.device
    rank: int = 0
    size: int = 1
    host_group: Any = None  # of the same processes, for what they say beside the training
    step: int = 0  # finished updates, for the message about a process that does not answer

    @property
    def device_name(self) -> str:
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_cuda else self.device.type

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes, each of which must call this."""
        if self.size == 1:
            return values
        values = values.to(self.device, copy=True)
        dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return what each process passes, on the host; all must call this, from one thread."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.host_group)
        return values

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: DeviceName) -> Iterator[World]:
    """Join the process group if torchrun started this process, and leave it at the end."""
    keep_freed_memory()
    local = torch.device(find_device(device))
    if "RANK" not in os.environ:
        yield World(local)
        return
    if local.type == "cuda":
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=local)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    joined = World(local, dist.get_rank(), dist.get_world_size(), group)
    try:
        yield joined
        dist.barrier()  # rank 0 may still be sampling
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the replica
        is_lost = isinstance(error, dist.DistError) or any(words in str(error) for words in LOST)
        if not (isinstance(error, RuntimeError) and is_lost):
            raise
        raise OSError(
            f"process {joined.rank} gave up waiting for another process after step {joined.step}: "
            f"that one has ended, or said nothing for {TIMEOUT.total_seconds():.0f} s; see what it "
            f"printed, and go on with --auto_resume ({' '.join(str(error).split())[:120]})"
        ) from error
    finally:
        gc.collect()  # a replica that outlives its process group aborts at exit, or waits for ever
        dist.destroy_process_group()


def is_shared(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor; torch's class of that name is slow to import."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """Return this process's rows of a tensor."""
    return tensor.to_local() if is_shared(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """Return all rows of a tensor; every process must call this."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def mix_seed(*numbers: int) -> int:
    """Return one seed for several numbers, which differs widely between neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_dropout(seed: int, step: int, world: World) -> None:
    """Give each step its own dropout masks, so that a resumed run draws the same ones again."""
    torch_or_cpu = torch.default_generator if world.device.type == "cpu" else torch  # 0.7 ms less
    torch_or_cpu.manual_seed(mix_seed(seed, step, world.rank))


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a request to stop. A second Ctrl-C kills.

    A second SIGTERM does not: a scheduler and torchrun may each send one, and the run is then busy
    saving. Whoever cannot wait sends SIGKILL.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.is_agreed = False  # every process knows of it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in shells; SIGTERM's if another process was signalled."""
        return 128 + (self.signal or signal.SIGTERM)

    def agree(self, world: World) -> bool:
        """Return whether any process was asked to stop: all must call this, and get one answer."""
        asked = world.sum(torch.tensor(float(self.signal is not None)))
        self.is_agreed = self.is_agreed or asked.item() > 0
        return self.is_agreed
