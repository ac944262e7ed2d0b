"""The device of this process: which one, what it is good at, and how to keep it busy."""

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of what `auto` becomes
LITTLE_MEMORY = 2**33  # bytes
M_TRIM_THRESHOLD = -1  # names of settings in glibc's malloc.h
M_MMAP_MAX = -4


def find_device(name: DeviceName) -> str:
    """Return the best device here for `auto`. Raises ValueError if the named one is not here."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here = [*(kind for kind, is_here in found.items() if is_here), "cpu"]
    if name not in ("auto", *here):
        names = ", ".join(here)
        raise ValueError(f"device {name} is not available here: take auto or one of {names}")
    return here[0] if name == "auto" else name


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware, so faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False
    found = torch.cpu.get_capabilities()
    has_units = any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return has_units and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # which may be told not to


def choose_precision(asked: Precision, device: torch.device) -> Precision:
    """Return the type of the matrix products; `auto` is bfloat16 where the hardware has it."""
    if asked != "auto":
        return asked
    return "bfloat16" if has_bfloat16(device) else "float32"


def memory_bytes(device: torch.device) -> int:
    """Return the memory of a device, or LITTLE_MEMORY if it does not tell.

    Of a CPU that is the share of each process on this machine.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type == "cpu" and hasattr(os, "sysconf"):
        n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // n_processes
    return LITTLE_MEMORY


def keep_freed_memory(keep: bool = True) -> None:
    """Let Linux's malloc reuse the memory of large tensors instead of giving it back each time.

    The kernel clears the pages that it hands out: 5 to 15 % of a training step on a CPU. But where
    blocks are gathered and freed in turn, three times the memory is then held.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0 if keep else 2**16)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**17)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor in memory that is never paged out, which a GPU copies without waiting."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device, or the tensor itself; nobody waits for a copy to CUDA."""
    # An Apple GPU would read the host's memory later, when it may be freed (pytorch #189690)
    return pinned(tensor, device).to(device, non_blocking=device.type == "cuda")


class HostCopy:
    """A copy of a tensor on its way to the host, which a GPU makes while it goes on computing.

    `tensor.tolist()` instead would wait for all that the GPU has been given to do since.
    """

    def __init__(self, tensor: Tensor) -> None:
        is_cuda = tensor.device.type == "cuda"
        self.copy = tensor.to("cpu", non_blocking=is_cuda)
        self.arrival = torch.cuda.current_stream().record_event() if is_cuda else None

    def read(self) -> Tensor:
        """Return the copy, once it has arrived."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.copy


class Prefetch:
    """Makes the next batch in a thread while the device works on this one."""

    def __init__(self, make: Callable[[int], tuple[Tensor, ...]], device: torch.device) -> None:
        self.make, self.device, self.thread = make, device, ThreadPoolExecutor(1)
        self.ready: dict[int, Future[tuple[Tensor, ...]]] = {}

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return the batch of a step on the device, and begin to make that of the next one."""
        steps = (step, step + 1)
        self.ready = {s: self.ready.get(s) or self.thread.submit(self._make, s) for s in steps}
        return tuple(sent(tensor, self.device) for tensor in self.ready[step].result())

    def _make(self, step: int) -> tuple[Tensor, ...]:
        return tuple(pinned(tensor, self.device) for tensor in self.make(step))
