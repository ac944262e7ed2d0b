"""What bounds generation: the bytes that a token reads, and how fast this machine reads them."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from model import GPT, KVCache, ModelConfig

READ_BYTES = 512 * 2**20  # far more than any cache holds
READS, AT_ONCE = 5, {"cpu": 1, "cuda": 8}  # a GPU reads them faster than it is asked to
MATRIX_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a number in a linear layer
OTHER_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}  # in biases, norms and scales


def weight_bytes(config: ModelConfig, precision: str) -> int:
    """All weights but the embeddings, of which a token reads a row; as the head they count."""
    with torch.device("meta"):
        modules = list(GPT(config).modules())
    total = 0
    for module in modules:
        own = [weight.numel() for weight in module.parameters(recurse=False)]
        if isinstance(module, nn.Linear):
            total += own.pop(0) * MATRIX_BYTES[precision]
            own += [module.out_features] if precision == "int8" else []  # a scale for each row
        if not isinstance(module, nn.Embedding):
            total += sum(own) * OTHER_BYTES[precision]
    return total


def cache_bytes(cache: KVCache, context: int) -> int:
    """Keys and values of so many positions of all texts, in the type that the cache holds."""
    n_slots = cache.k_LBKSD.shape[-2]
    return 2 * cache.k_LBKSD.nbytes // n_slots * context


class Memory:
    """The memory of a device, to be measured again and again between other measurements."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.at_once = device, AT_ONCE[device.type]
        self.numbers_N = torch.ones(READ_BYTES // 4, device=device)

    def bandwidth(self) -> float:
        """Bytes per second that a sum over a large tensor reads: the median of a few."""
        taken = [seconds(self.read, self.device) for _ in range(READS)]
        return self.at_once * READ_BYTES / statistics.median(taken)

    def read(self) -> None:
        for _ in range(self.at_once):
            self.numbers_N.sum()


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, to the end of all that it left to a GPU."""
    wait(device)
    started_at = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - started_at


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
