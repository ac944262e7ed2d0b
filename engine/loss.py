"""The loss: of a batch with its gradient, and of many batches without."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.device import memory_bytes
from engine.parallel import StopRequest, World
from model import GPT, require

# The most logits in memory at once, unless they are of fewer positions than LEAST_ROWS: on a CPU
# they fit its caches, and on a GPU they and their gradient take up to a sixteenth of its memory
LOGITS_ON_CPU = 2**22
BYTES_PER_LOGIT = 8 * 16
STOP_EVERY = 8  # batches of an evaluation, the processes ask each other whether to stop
LEAST_ROWS = 256  # of fewer positions a product reads the head's weights too often
COMPILERS = {"darwin": "clang++", "win32": "cl"}  # that torch takes for a CPU, else g++

# Rows of x, the head's weights and the rows' targets -> summed loss, and gradients of x and weights
LossOfChunk = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class LossModel(nn.Module):
    """Tokens and targets -> mean loss in nats per target. Targets of -100 do not count.

    This is what train.py compiles and replicates.
    """

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        """`dtype` is that of all products; the weights stay as they are."""
        super().__init__()
        self.model, self.dtype = model, dtype
        self.of_chunk: LossOfChunk = loss_and_gradients

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x = self.model.features(tokens_BT, dtype=self.dtype)
        x_NC, targets_N = x.flatten(0, 1), targets_BT.flatten()
        if torch.is_grad_enabled():
            head_VC = self.model.lm_head.weight
            return LinearCrossEntropy.apply(x_NC, head_VC, targets_N, self.of_chunk)
        return summed_loss(self.model, x_NC, targets_N) / (targets_N >= 0).sum()

    def compile_parts(self, device: torch.device) -> None:
        """Compile the blocks, all of which are compiled once, and the loss, in place.

        To compile the whole takes longer (on a CPU half as long again) for steps that are no
        faster. There the loss stays as it is, as its chunks lie in the caches. Raises ValueError if
        it has no C++ compiler, or the header that compiled code is called through is missing.
        """
        for block in self.model.blocks:
            block.compile()
        if device.type != "cpu":
            self.of_chunk = torch.compile(loss_and_gradients)
            return
        compiler = os.environ.get("CXX", COMPILERS.get(sys.platform, "g++"))
        way_out = f"install {compiler}, name another in CXX, or leave out compile"
        require(shutil.which(compiler) is not None, f"compile needs a C++ compiler: {way_out}")
        header = Path(sysconfig.get_path("include"), "Python.h")
        way_out = "install Python's development files (python3-dev), or leave out compile"
        require(sys.platform != "linux" or header.exists(), f"compile needs {header}: {way_out}")


def summed_loss(model: GPT, x_NC: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of -ln p of the targets, without a gradient and with few logits in memory at once."""
    size = rows_at_once(x_NC, model.config.vocab_size)
    total = x_NC.new_zeros((), dtype=torch.float32)
    for x_nC, targets_n in zip(x_NC.split(size), targets_N.split(size), strict=True):
        logits_nV = model.lm_head(x_nC).float()
        total += F.cross_entropy(logits_nV, targets_n, reduction="sum")
    return total


def rows_at_once(x_NC: Tensor, vocab_size: int) -> int:
    """Return how many rows of x make a chunk; chunks are equal where halving x allows it."""
    is_cpu = x_NC.device.type == "cpu"
    logits = LOGITS_ON_CPU if is_cpu else memory_bytes(x_NC.device) // BYTES_PER_LOGIT
    most = max(LEAST_ROWS, logits // vocab_size)
    rows = len(x_NC)
    while rows > most and rows % 2 == 0:
        rows //= 2
    return min(rows, most)


def loss_and_gradients(
    x_nC: Tensor, weight_VC: Tensor, targets_n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss of n positions, and its gradients by x and by the weights."""
    targets_n1 = targets_n.clamp(min=0)[:, None]
    counts_n1 = (targets_n >= 0).float()[:, None]
    logits_nV = (x_nC @ weight_VC.T).float()
    logits_nV -= logits_nV.amax(dim=1, keepdim=True)  # so that exp cannot overflow
    logit_n1 = logits_nV.gather(1, targets_n1)
    exp_nV = logits_nV.exp_()
    total_n1 = exp_nV.sum(dim=1, keepdim=True)
    loss = ((total_n1.log() - logit_n1) * counts_n1).sum()
    # ∂(-ln softmax(z)ₜ)/∂zᵥ = softmax(z)ᵥ - [v = t], and 0 where the target does not count
    d_nV = exp_nV.mul_(counts_n1 / total_n1).to(x_nC.dtype)
    d_target_n1 = (logit_n1.exp() / total_n1 - 1) * counts_n1
    d_nV.scatter_(1, targets_n1, d_target_n1.to(x_nC.dtype))
    return loss, d_nV @ weight_VC, d_nV.T @ x_nC


class LinearCrossEntropy(torch.autograd.Function):
    """Mean of -ln softmax(x Wᵀ)ₜ, with the logits of a few positions in memory at once.

    The gradient of each chunk is computed beside its loss, while its logits are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        head_VC: Tensor,
        targets_N: Tensor,
        of_chunk: LossOfChunk = loss_and_gradients,
    ) -> Tensor:
        size, weight_VC = rows_at_once(x_NC, len(head_VC)), head_VC.to(x_NC.dtype)
        loss = head_VC.new_zeros(())
        dx_NC, dhead_VC = torch.empty_like(x_NC), torch.zeros_like(head_VC)
        chunks = zip(x_NC.split(size), targets_N.split(size), dx_NC.split(size), strict=True)
        for x_nC, targets_n, dx_nC in chunks:
            chunk_loss, dx, dweight_VC = of_chunk(x_nC, weight_VC, targets_n)
            loss += chunk_loss
            dx_nC.copy_(dx)
            dhead_VC += dweight_VC
        n_targets = (targets_N >= 0).sum()
        ctx.save_for_backward(dx_NC, dhead_VC, n_targets)
        return loss / n_targets

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_NC, dhead_VC, n_targets = ctx.saved_tensors
        scale = grads[0] / n_targets
        return dx_NC * scale, dhead_VC * scale, None, None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
    stop: StopRequest | None = None,
) -> float | None:
    """Return the mean loss in nats per target over the batches of all processes, in eval mode.

    `model` gives the mean loss of a batch; targets of -100 do not count. Returns None if some
    process was asked to stop meanwhile.
    """
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []
    counts: list[int] = []
    for i, (tokens_BT, targets_BT) in enumerate(batches):
        is_asked = world.size == 1 or i % STOP_EVERY == 0
        if stop is not None and is_asked and stop.agree(world):
            break  # all together, as a sharded model is computed by all
        losses.append(model(tokens_BT.to(world.device), targets_BT.to(world.device)))
        counts.append(int((targets_BT >= 0).sum()))
    model.train(was_training)
    # On the host, as Apple's GPUs have no float64, and at the end, so that other GPUs need not wait
    means = torch.stack(losses).tolist() if losses else []
    total = sum(mean * count for mean, count in zip(means, counts, strict=True) if count)
    sums = torch.tensor((total, sum(counts)), dtype=torch.float64)
    total, count = world.sum(sums).tolist()
    return None if stop is not None and stop.agree(world) else total / count
