"""Muon, the optimizer of the block matrices.

It is written out here because torch's own updates one matrix at a time, and a small model has many
small ones: here all matrices of one shape are updated together.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.parallel import local
from engine.shard import Owners

# Coefficients of the first of five iterations that bring singular values up to 1 nearest to 1
# (Amsel et al., 2025, arXiv 2505.16932, sec. 3.3; with modded-nanogpt's safety factor of 1.02)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
)


@dataclass
class Group:
    """Parameters by name, which share a peak learning rate and a weight decay."""

    parameters: dict[str, Tensor]
    learning_rate: float
    weight_decay: float

    def with_gradients(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return name, parameter and gradient of every parameter that has a gradient."""
        items = self.parameters.items()
        return [(name, p, p.grad) for name, p in items if p.grad is not None]


class Muon:
    """Momentum whose steps are made orthogonal (Jordan et al., 2024).

    A matrix then learns all directions at one speed, not only the few that dominate its gradient
    (kellerjordan.github.io/posts/muon). The three matrices in c_attn are updated separately.
    """

    def __init__(self, group: Group, momentum: float, dtype: torch.dtype, owners: Owners) -> None:
        self.group, self.momentum = group, momentum
        self.dtype, self.owners = dtype, owners
        self.state = {name: (torch.zeros_like(p),) for name, p in group.parameters.items()}

    @torch.no_grad()
    def step(self, fraction: Tensor, is_finite: Tensor) -> None:
        """Update the parameters at this fraction of their peak rate; none if not `is_finite`."""
        rate = self.group.learning_rate * fraction
        decay = torch.where(is_finite, 1 - rate * self.group.weight_decay, 1.0)
        alike: dict[tuple[int, ...], dict[str, Tensor]] = defaultdict(dict)
        for name, p, found in self.group.with_gradients():
            mean = local(self.state[name][0])
            gradient = torch.where(is_finite, local(found), mean)
            mean.lerp_(gradient, 1 - self.momentum)
            ahead = gradient.lerp(mean, self.momentum)  # where the mean is heading (Nesterov)
            local(p).mul_(decay)
            alike[(*self._rows(name), p.shape[1])][name] = ahead.to(self.dtype)
        # Of each kind some matrices, whole: in one process all of them
        mine = {
            (*rows, N): self.owners.gather(torch.stack([*ahead.values()]), len(ahead), sum(rows))
            for (*rows, N), ahead in alike.items()
        }
        self._make_orthogonal(mine, is_finite * -rate)
        for (*rows, N), ahead in alike.items():
            updates = self.owners.give_back(mine[*rows, N], len(ahead), sum(rows))
            for name, update in zip(ahead, updates, strict=True):
                local(self.group.parameters[name]).add_(update)

    def _make_orthogonal(self, mine: dict[tuple[int, ...], Tensor], rate: Tensor) -> None:
        """Replace matrices (k, M, N) of each kind by the updates that their parts need."""
        by_shape: dict[torch.Size, list[tuple[Tensor, float]]] = defaultdict(list)
        for (*rows, N), matrices_kMN in mine.items():
            for part_kmN in matrices_kMN.split(rows, dim=1):
                scale = max(1, part_kmN.shape[1] / N) ** 0.5  # so that outputs change by the rate
                wide = part_kmN.mT if scale > 1 else part_kmN  # so that Y Yᵀ is small
                by_shape[wide.shape[1:]].append((wide, scale))
        for alike in by_shape.values():
            parts = [part for part, _ in alike]
            updates = orthogonalize(torch.cat(parts)).split([*map(len, parts)])
            for (part, scale), update in zip(alike, updates, strict=True):
                torch.mul(update, rate * scale, out=part)

    def _rows(self, name: str) -> list[int]:
        """Return how many rows of a parameter belong to each of the matrices that it holds."""
        n_rows = len(self.group.parameters[name])
        if not name.endswith("c_attn.weight"):
            return [n_rows]
        c_proj = self.group.parameters[name.replace("c_attn", "c_proj")]
        n_queries = c_proj.shape[1]  # c_proj reads what the queries found
        n_keys = (n_rows - n_queries) // 2  # and as many values
        return [n_queries, n_keys, n_keys]


def orthogonalize(x_KMN: Tensor) -> Tensor:
    """Bring all singular values of each matrix near 1, and keep its singular vectors.

    A polynomial p of odd powers needs no SVD for that: p(U Σ Vᵀ) = U p(Σ) Vᵀ. Three of them bring
    values above 1 % of the norm to between 0.15 and 1.9; five would train no better.
    """
    norm_K11 = x_KMN.norm(dim=(1, 2), keepdim=True)
    y_KMN = x_KMN / (1.01 * norm_K11 + 1e-7)  # no singular value is above 1
    for a, b, c in POLAR_EXPRESS:
        gram_KMM = y_KMN @ y_KMN.mT
        # a Y + (b YYᵀ + c (YYᵀ)²) Y
        polynomial_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
        y_KMN = torch.baddbmm(y_KMN, polynomial_KMM, y_KMN, beta=a)
    return y_KMN
