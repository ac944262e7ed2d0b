"""The loss of a model over a fixed set of batches: never over random ones."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engine.parallel import Precision, StopRequest, World


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
    precision: Precision = "float32",
    stop: StopRequest | None = None,
) -> float | None:
    """Mean loss in nats per target over this and all other processes' batches, in eval mode.

    Targets of -100 do not count. Returns None if some process was asked to stop meanwhile.
    """
    was_training = model.training
    model.eval()
    total_and_count = torch.zeros(2, dtype=torch.float64)
    for tokens_BT, targets_BT in batches:
        if stop is not None and stop.signal is not None:
            break
        with world.autocast(precision):
            loss = model(tokens_BT.to(world.device), targets_BT.to(world.device))
        count = (targets_BT >= 0).sum()
        total_and_count += torch.stack([loss.double().cpu() * count, count])
    model.train(was_training)
    total, count = world.sum(total_and_count).tolist()
    return None if stop is not None and stop.on_any_rank(world) else total / count
