"""One process or many: find the device, replicate the model, add up numbers, stop together."""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "float32", "bfloat16"]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of settings in glibc's malloc.h


@dataclass(frozen=True)
class World:
    """Who this process is among the processes that torchrun started."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def device_name(self) -> str:
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else self.device.type

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes, which must all call this."""
        if self.size == 1:
            return values
        values = values.to(self.device, copy=True)
        dist.all_reduce(values)
        return values

    def peak_memory(self) -> dict[str, float]:
        """Most bytes that tensors took on a GPU so far; empty elsewhere, where nobody counts."""
        if self.device.type != "cuda":
            return {}
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(self.device)}

    def precision(self, asked: Precision) -> Precision:
        """Type of the matrix products: `auto` is bfloat16 where the hardware multiplies it."""
        if asked != "auto":
            return asked
        return "bfloat16" if has_bfloat16(self.device) else "float32"

    def autocast(self, precision: Precision) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def world(device: DeviceName) -> Iterator[World]:
    """Join the process group if torchrun started us, and leave it at the end."""
    keep_freed_memory()
    kind = find_device(device)
    if "RANK" not in os.environ:
        yield World(torch.device(kind))
        return
    local = torch.device(kind)
    if kind == "cuda":
        local = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(local, dist.get_rank(), dist.get_world_size())
        dist.barrier()  # leave together: rank 0 may still be writing a checkpoint
    finally:
        gc.collect()  # gloo aborts at exit if a DDP model outlives its process group
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let Linux's malloc reuse the memory of large tensors, which it else gives back each time.

    The kernel clears what it hands out, page by page: 5 to 15 % of a training step on a CPU.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def find_device(name: DeviceName) -> str:
    """`auto` is the best that this machine has. Raises ValueError if it lacks what is asked."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(kind for kind, here in available.items() if here)
    if not available[name]:
        here = ", ".join(kind for kind in available if available[kind])
        raise ValueError(f"device {name} is not available here: take auto or one of {here}")
    return name


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, so that it is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def replicate(model: nn.Module, world: World, compiled: bool) -> nn.Module:
    """Copy `model` to every process, which then average their gradients (Li et al., 2020)."""
    if compiled:
        model.compile()  # in place, so that the names of its parameters stay
    return nn.parallel.DistributedDataParallel(model) if world.size > 1 else model


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Say whether the next forward and backward pass averages gradients over the processes."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = enabled


class Prefetch:
    """Makes a batch in a thread, and copies it to the device, while that works on the last one."""

    def __init__(self, make: Callable[[int], tuple[torch.Tensor, ...]], device: torch.device):
        self.make, self.device, self.thread = make, device, ThreadPoolExecutor(1)
        self.ready: dict[int, Future[tuple[torch.Tensor, ...]]] = {}

    def batch(self, step: int) -> tuple[torch.Tensor, ...]:
        """Return the batch of a step, on the device, and begin with that of the next one."""
        steps = (step, step + 1)
        self.ready = {s: self.ready.get(s) or self.thread.submit(self._make, s) for s in steps}
        return tuple(t.to(self.device, non_blocking=True) for t in self.ready[step].result())

    def _make(self, step: int) -> tuple[torch.Tensor, ...]:
        tensors = self.make(step)
        # only memory that cannot be paged out is copied without waiting
        return tuple(t.pin_memory() for t in tensors) if self.device.type == "cuda" else tensors


def mix_seed(*numbers: int) -> int:
    """One seed out of several numbers, far apart for neighbouring ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_dropout(seed: int, step: int, world: World) -> None:
    """Make the masks of a step the same when a resumed run comes to it again."""
    torch.manual_seed(mix_seed(seed, step, world.rank))


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; the second one kills."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells count; SIGTERM's if another process was asked."""
        return 128 + (self.signal or signal.SIGTERM)

    def on_any_rank(self, world: World) -> bool:
        """Whether any process was asked to stop; every process must ask, and gets one answer."""
        return world.sum(torch.tensor(float(self.signal is not None))).item() > 0
