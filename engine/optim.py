"""Which parameter gets which optimizer, what an update is, and the learning rate at each step.

Torch's own optimizer classes import its compiler: a second at the start of every run.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from engine.cli import at_least
from engine.muon import Group, Muon

# Best of the runs in docs/recipe.md at the batch that engine/recipe.py plans
RATES = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "embedding_learning_rate": 0.03}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule. A rate of 0 is the recipe's, which depends on the batch size."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for every parameter, or muon for the block matrices and adamw for the rest."""
    learning_rate: float = 0.0
    """Peak AdamW learning rate; beside muon only the output head's."""
    muon_learning_rate: float = 0.0
    """Peak Muon learning rate; it does not depend on the model's width."""
    embedding_learning_rate: float = 0.0
    """Peak AdamW learning rate of embeddings and norms beside muon."""
    weight_decay: float = 0.1
    """Decay of the matrices under AdamW, per unit of learning rate; vectors never decay."""
    muon_weight_decay: float = 0.1
    """Decay of the block matrices under Muon, per unit of learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the mean and of the square of the gradient."""
    muon_momentum: float = 0.9
    """Muon's decay rate of the mean of the gradient."""
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
        if not self.grad_clip > 0:
            raise ValueError(f"grad_clip must be positive: got {self.grad_clip}")
        at_least(0, self, *RATES, "weight_decay", "muon_weight_decay", "warmup_steps")
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]: got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.muon_momentum)):
            got = f"{self.betas}, muon_momentum={self.muon_momentum}"
            raise ValueError(f"betas and muon_momentum must be in [0, 1): got betas={got}")

    def with_rates(self, scale: float) -> "OptimConfig":
        """Fill in the learning rates that are 0: the recipe's, times `scale`."""
        return replace(self, **{n: scale * r for n, r in RATES.items() if not getattr(self, n)})


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, alg. 2), a kernel per group."""

    def __init__(self, groups: list[Group], betas: tuple[float, float]) -> None:
        self.groups, self.betas = [group for group in groups if group.parameters], betas
        self.state = {  # the mean and mean square of the gradient, and the number of updates
            name: (torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device))
            for group in self.groups
            for name, p in group.parameters.items()
        }

    @torch.no_grad()
    def step(self, fraction: float) -> None:
        """Update the parameters at this fraction of their peak learning rates."""
        for group in self.groups:
            parameters = list(group.parameters.values())
            state = (self.state[name] for name in group.parameters)
            means, squares, counts = (list(part) for part in zip(*state, strict=True))
            adamw(
                parameters,
                group.gradients(),
                means,
                squares,
                max_exp_avg_sqs=[],
                state_steps=counts,
                fused=parameters[0].device.type in ("cpu", "cuda"),
                amsgrad=False,
                maximize=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=group.learning_rate * fraction,
                weight_decay=group.weight_decay,
                eps=1e-10,
            )


Optimizer = AdamW | Muon


def build_optimizers(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> list[Optimizer]:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    Embeddings and head stay with AdamW: a row of theirs belongs to one token, and there is no
    direction between tokens to equalise. `dtype` is that of Muon's matrix products.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    vectors = {name: p for name, p in named.items() if p.ndim < 2}
    blocks = {n: p for n, p in named.items() if p.ndim == 2 and n.startswith("blocks.")}
    rest = {n: p for n, p in named.items() if n not in vectors | blocks}
    if config.name == "adamw":
        groups = [
            Group(blocks | rest, config.learning_rate, config.weight_decay),
            Group(vectors, config.learning_rate, 0.0),
        ]
        return [AdamW(groups, config.betas)]
    head = {name: p for name, p in rest.items() if name.startswith("lm_head")}
    embeddings = {name: p for name, p in rest.items() if name not in head}
    groups = [
        Group(head, config.learning_rate, config.weight_decay),
        Group(embeddings, config.embedding_learning_rate, config.weight_decay),
        Group(vectors, config.embedding_learning_rate, 0.0),
    ]
    muon = Group(blocks, config.muon_learning_rate, config.muon_weight_decay)
    return [AdamW(groups, config.betas), Muon(muon, config.muon_momentum, dtype)]


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
