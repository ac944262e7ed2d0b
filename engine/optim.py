"""Which parameter gets which optimizer, and the learning rate at each step."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from engine.cli import at_least


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for every parameter, or muon for the block matrices and adamw for the rest."""
    learning_rate: float = 6e-4
    """Peak AdamW learning rate."""
    muon_learning_rate: float = 0.02
    """Peak Muon learning rate; it does not depend on the model's width."""
    weight_decay: float = 0.1
    """Decay of the matrices under AdamW, per unit of learning rate; vectors never decay."""
    muon_weight_decay: float = 0.1
    """Decay of the block matrices under Muon, per unit of learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the mean and of the square of the gradient."""
    grad_clip: float = 1.0
    """Largest global gradient norm; inf to never clip."""
    warmup_steps: int = 100
    """Steps of linear rise from 0 to the peak."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the fall from the peak."""
    decay_fraction: float = 1.0
    """The fall takes this last part of the run, in [0, 1]; before it the rate is constant."""
    final_fraction: float = 0.1
    """The fall ends at this fraction of the peak."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive: got {getattr(self, name)}")
        at_least(0, self, "weight_decay", "muon_weight_decay", "warmup_steps")
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]: got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1): got {self.betas}")


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) steps along the nearest
    orthogonal matrix of the momentum. Embeddings and head stay with AdamW: a row of theirs
    belongs to one token, and there is no direction between tokens to equalise.
    """
    named = list(model.named_parameters())
    by_muon = [
        p for n, p in named if config.name == "muon" and p.ndim == 2 and n.startswith("blocks.")
    ]
    taken = {id(p) for p in by_muon}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in rest)
    optimizers: list[Optimizer] = [
        AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)
    ]
    if by_muon:
        decay = config.muon_weight_decay
        optimizers.append(Muon(by_muon, lr=config.muon_learning_rate, weight_decay=decay))
    for group in all_groups(optimizers):
        group["peak_lr"] = group["lr"]
    return optimizers


def schedule(step: int, max_steps: int, config: OptimConfig) -> float:
    """Fraction of the peak rate in the update that follows `step` finished ones.

    Linear warm-up, a plateau, then a fall that would reach `final_fraction` at `max_steps`.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    fall_steps = max(1.0, min(config.decay_fraction * max_steps, max_steps - config.warmup_steps))
    progress = max(0.0, 1 - (max_steps - step) / fall_steps)
    height = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_fraction + (1 - config.final_fraction) * height


def set_learning_rates(optimizers: list[Optimizer], fraction: float) -> None:
    for group in all_groups(optimizers):
        group["lr"] = group["peak_lr"] * fraction


def all_groups(optimizers: list[Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def check_finite(step: int, **numbers: float) -> None:
    """Raise ArithmeticError, before weights are touched or saved, if a number is not finite."""
    if not all(map(math.isfinite, numbers.values())):
        shown = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise ArithmeticError(
            f"after step {step} a number is not finite ({shown}), so training stopped: lower the "
            "learning rate, then go on from the last checkpoint, if there is one, with --resume"
        )
