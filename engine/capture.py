"""Start all the kernels of a step at once: a CUDA graph.

Python takes 5 to 10 microseconds to start a kernel, and a step of a small model has thousands that
take less than that to run. A graph of them is recorded once, and starts as a whole ever after
(docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # in which libraries set themselves up, and torch.compile compiles


class Captured:
    """A function of tensors that does the same work in the same memory at every call.

    `function` takes an object and tensors whose shapes never change, and takes no number to the
    host. The first calls are as without a graph. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Tensor], enabled: bool) -> None:
        self.function, self.is_enabled = function, enabled
        self.settling_calls = WARM_UP_CALLS + 1 if enabled else 1
        self.n_calls = 0

    def __call__(self, owner: Any, *inputs: Tensor) -> Tensor:
        self.n_calls += 1
        if not self.is_enabled:
            return self.function(owner, *inputs)
        if self.n_calls <= WARM_UP_CALLS:
            return self._warm_up(owner, *inputs)
        if self.n_calls == WARM_UP_CALLS + 1:
            self._record(owner, *inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output

    def _warm_up(self, owner: Any, *inputs: Tensor) -> Tensor:
        """Call the function on a stream of its own, as recording will."""
        here = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            output = self.function(owner, *inputs)
        here.wait_stream(aside)
        return output

    def _record(self, owner: Any, *inputs: Tensor) -> None:
        """Record what the function starts; nothing runs meanwhile."""
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # Only this thread's calls matter: another one makes the next batch meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.output = self.function(owner, *self.inputs)
