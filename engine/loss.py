"""The loss: of a batch with its gradient, and of many batches without."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.parallel import StopRequest, World
from model import GPT

# The most logits in memory at once, unless they are of fewer positions than LEAST_ROWS; on a CPU
# they fit its caches
LOGITS_ON_CPU, LOGITS_ON_GPU = 2**22, 2**27
LEAST_ROWS = 256  # of fewer positions a product reads the head's weights too often


class LossModel(nn.Module):
    """Tokens and targets -> mean loss in nats per target. Targets of -100 do not count.

    This is what train.py compiles (on a CPU: the blocks in it) and replicates.
    """

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        """`dtype` is that of all products; the weights stay as they are."""
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x = self.model.features(tokens_BT, dtype=self.dtype)
        x_NC, targets_N = x.flatten(0, 1), targets_BT.flatten()
        if torch.is_grad_enabled():
            return LinearCrossEntropy.apply(x_NC, self.model.lm_head.weight, targets_N)
        return summed_loss(self.model, x_NC, targets_N) / (targets_N >= 0).sum()


def summed_loss(model: GPT, x_NC: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of -ln p of the targets, without a gradient and with few logits in memory at once."""
    size = rows_at_once(x_NC, model.config.vocab_size)
    total = x_NC.new_zeros((), dtype=torch.float32)
    for x_nC, targets_n in zip(x_NC.split(size), targets_N.split(size), strict=True):
        logits_nV = model.lm_head(x_nC).float()
        total += F.cross_entropy(logits_nV, targets_n, reduction="sum")
    return total


def rows_at_once(x_NC: Tensor, vocab_size: int) -> int:
    most = LOGITS_ON_CPU if x_NC.device.type == "cpu" else LOGITS_ON_GPU
    return max(LEAST_ROWS, most // vocab_size)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean of -ln softmax(x Wᵀ)ₜ, with the logits of a few positions in memory at once.

    The gradient of each chunk is computed beside its loss, while its logits are at hand.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, head_VC: Tensor, targets_N: Tensor) -> Tensor:
        size, weight_VC = rows_at_once(x_NC, len(head_VC)), head_VC.to(x_NC.dtype)
        loss = head_VC.new_zeros(())
        dx_NC, dhead_VC = torch.zeros_like(x_NC), torch.zeros_like(head_VC)
        chunks = zip(x_NC.split(size), targets_N.split(size), dx_NC.split(size), strict=True)
        for x_nC, targets_n, dx_nC in chunks:
            targets_n1 = targets_n.clamp(min=0)[:, None]
            counts_n1 = (targets_n >= 0).float()[:, None]
            logits_nV = (x_nC @ weight_VC.T).float()
            logits_nV -= logits_nV.amax(dim=1, keepdim=True)  # so that exp cannot overflow
            logit_n1 = logits_nV.gather(1, targets_n1)
            exp_nV = logits_nV.exp_()
            total_n1 = exp_nV.sum(dim=1, keepdim=True)
            loss += ((total_n1.log() - logit_n1) * counts_n1).sum()
            # ∂(-ln softmax(z)ₜ)/∂zᵥ = softmax(z)ᵥ - [v = t], and 0 where the target does not count
            d_nV = exp_nV.mul_(counts_n1 / total_n1)
            d_nV = d_nV.scatter_add_(1, targets_n1, -counts_n1).to(x_nC.dtype)
            dx_nC += d_nV @ weight_VC
            dhead_VC += d_nV.T @ x_nC
        n_targets = (targets_N >= 0).sum()
        ctx.save_for_backward(dx_NC, dhead_VC, n_targets)
        return loss / n_targets

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        dx_NC, dhead_VC, n_targets = ctx.saved_tensors
        scale = grads[0] / n_targets
        return dx_NC * scale, dhead_VC * scale, None


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
    for tokens_BT, targets_BT in batches:
        if stop is not None and stop.signal is not None:
            break
        losses.append(model(tokens_BT.to(world.device), targets_BT.to(world.device)))
        counts.append(int((targets_BT >= 0).sum()))
    model.train(was_training)
    # On the host, as Apple's GPUs have no float64, and at the end, so that other GPUs need not wait
    means = torch.stack(losses).tolist() if losses else []
    total = sum(mean * count for mean, count in zip(means, counts, strict=True))
    sums = torch.tensor((total, sum(counts)), dtype=torch.float64)
    total, count = world.sum(sums).tolist()
    return None if stop is not None and stop.agree(world) else total / count
