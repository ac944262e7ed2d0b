"""Which parameter gets which optimizer, what an update is, and the learning rate at each step.

Torch's functions are used without its optimizer classes, which import the compiler and so delay
every run by a second.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cli import at_least
from engine.muon import Group, Muon
from engine.parallel import local, whole
from engine.shard import Owners
from model import require

# The best of the runs in docs/recipe.md, for the batch size that engine/recipe.py plans
RATES = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "embedding_learning_rate": 0.03}
# As in nanochat and modded-nanogpt: gradients of rare tokens' embeddings are far below Adam's 1e-8
EPSILON = 1e-10


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule. A rate of 0 takes the recipe's, which depends on the batch size."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for every parameter, or muon for the block matrices and adamw for the rest."""
    learning_rate: float = 0.0
    """Peak AdamW learning rate; with muon, that of an untied output head only."""
    muon_learning_rate: float = 0.0
    """Peak Muon learning rate; the same for models of any width."""
    embedding_learning_rate: float = 0.0
    """Peak AdamW learning rate of embeddings and norms, with muon."""
    weight_decay: float = 0.1
    """Weight decay of AdamW's matrices, times the learning rate; vectors never decay."""
    muon_weight_decay: float = 0.1
    """Weight decay of Muon's matrices, times the learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates for the running means of the gradient and of its square."""
    muon_momentum: float = 0.9
    """Muon's decay rate for the running mean of the gradient."""
    grad_clip: float = 1.0
    """Gradients are scaled down to this norm, over all parameters; inf never clips."""
    warmup_steps: int = 100
    """Number of steps in which the rate rises linearly to its peak."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the curve by which the rate falls from its peak."""
    decay_fraction: float = 1.0
    """The rate falls during this last fraction of the run; before it the rate is constant."""
    final_fraction: float = 0.1
    """The rate ends at this fraction of its peak."""

    def __post_init__(self) -> None:
        require(self.grad_clip > 0, f"grad_clip must be positive: got {self.grad_clip}")
        at_least(0, self, *RATES, "weight_decay", "muon_weight_decay", "warmup_steps")
        for name in ("decay_fraction", "final_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} must be in [0, 1]: got {value}")
        for name, value in (("betas", self.betas), ("muon_momentum", (self.muon_momentum,))):
            are_rates = all(0 <= beta < 1 for beta in value)
            require(are_rates, f"{name} must be in [0, 1): got {getattr(self, name)}")

    def with_rates(self, scale: float) -> "OptimConfig":
        """Fill in the learning rates that are 0 with the recipe's, times `scale`."""
        missing = {name: scale * rate for name, rate in RATES.items() if not getattr(self, name)}
        return replace(self, **missing)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, alg. 2), a kernel per group."""

    def __init__(self, groups: list[Group], betas: tuple[float, float]) -> None:
        self.groups, self.betas = [group for group in groups if group.parameters], betas
        self.state = {  # running means of the gradient and of its square, and number of updates
            name: (torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=where))
            for group in self.groups
            for name, p in group.parameters.items()
            for where in ["cpu" if p.device.type == "mps" else p.device]  # Apple's reads it there
        }

    @torch.no_grad()
    def step(self, fraction: Tensor, is_finite: Tensor) -> None:
        """Update the parameters at this fraction of their peak rates; none if not `is_finite`."""
        is_fused = is_finite.device.type in ("cpu", "cuda")
        if not is_fused and not is_finite:  # a fused kernel checks it on the device
            return
        for group in self.groups:
            found = group.with_gradients()
            rate = group.learning_rate * fraction
            state = [self.state[name] for name, _, _ in found]
            adamw(
                [local(parameter) for _, parameter, _ in found],
                [local(gradient) for _, _, gradient in found],
                [local(mean) for mean, _, _ in state],
                [local(square) for _, square, _ in state],
                max_exp_avg_sqs=[],
                state_steps=[count for _, _, count in state],
                fused=is_fused,
                found_inf=(~is_finite).float() if is_fused else None,
                amsgrad=False,
                maximize=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=rate if is_fused else rate.item(),
                weight_decay=group.weight_decay,
                eps=EPSILON,
            )


Optimizer = AdamW | Muon


def build_optimizers(
    model: nn.Module,
    config: OptimConfig,
    dtype: torch.dtype = torch.float32,
    owners: Owners | None = None,
) -> list[Optimizer]:
    """Return AdamW for all parameters, or Muon for the block matrices and AdamW for the rest.

    Embeddings and head stay with AdamW, as Jordan et al. advise: each of their rows belongs to one
    token. `dtype` is that of Muon's matrix products, and `owners` share them among processes.
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
    return [
        AdamW(groups, config.betas),
        Muon(muon, config.muon_momentum, dtype, owners or Owners()),
    ]


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale all gradients so that their norm is at most `most`; return the norm before that."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if most < math.inf:
        nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
    return whole(norm)


def schedule(step: int, max_steps: int, config: OptimConfig) -> float:
    """Return the fraction of the peak rate in the update that follows `step` finished ones.

    Linear warm-up, a plateau, then a fall that would reach `final_fraction` at `max_steps`.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    fall_steps = max(1.0, min(config.decay_fraction * max_steps, max_steps - config.warmup_steps))
    progress = max(0.0, 1 - (max_steps - step) / fall_steps)
    height = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_fraction + (1 - config.final_fraction) * height
