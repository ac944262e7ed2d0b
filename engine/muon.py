"""Muon, the optimizer of the block matrices: written out because torch's takes them one by one."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

# Coefficients of the first iterations that bring singular values between 0 and 1 nearest to 1
# (Amsel et al., 2025, arXiv 2505.16932, sec. 3.3, with their safety factor of 1.01)
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

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]


class Muon:
    """Momentum, but each matrix steps along the nearest orthogonal one (Jordan et al., 2024).

    kellerjordan.github.io/posts/muon: all directions of a matrix then learn at one speed, not
    only the few that its gradient is full of. Q, K and V are three matrices that lie in one.
    Matrices of one shape are updated together: a small model has many, and each is small.
    """

    def __init__(self, group: Group, momentum: float, dtype: torch.dtype) -> None:
        self.group, self.momentum, self.dtype = group, momentum, dtype
        self.state = {name: (torch.zeros_like(p),) for name, p in group.parameters.items()}

    @torch.no_grad()
    def step(self, fraction: float) -> None:
        """Update the parameters at this fraction of their peak learning rate."""
        rate = self.group.learning_rate * fraction
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        named = self.group.parameters.items()
        for (name, p), gradient in zip(named, self.group.gradients(), strict=True):
            (mean,) = self.state[name]
            mean.lerp_(gradient, 1 - self.momentum)
            ahead = gradient.lerp(mean, self.momentum)  # where the mean is heading (Nesterov)
            p.mul_(1 - rate * self.group.weight_decay)
            rows = parts(name, p)
            for pair in zip(p.split(rows), ahead.split(rows), strict=True):
                by_shape[pair[0].shape].append(pair)
        for shape, pairs in by_shape.items():
            updates = orthogonalize(torch.stack([direction for _, direction in pairs]), self.dtype)
            scale = max(1, shape[0] / shape[1]) ** 0.5  # so that outputs change by about the rate
            for (matrix, _), update in zip(pairs, updates, strict=True):
                matrix.add_(update, alpha=-rate * scale)


def parts(name: str, matrix: Tensor) -> list[int]:
    """Rows of the matrices in one: c_attn has C for the queries, the rest for keys and values."""
    n_rows, C = matrix.shape
    return [C, *[(n_rows - C) // 2] * 2] if name.endswith("c_attn.weight") else [n_rows]


def orthogonalize(matrices_KMN: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring all singular values of each matrix near 1, and keep its singular vectors.

    A polynomial of odd powers does so without finding them: p(U Σ Vᵀ) = U p(Σ) Vᵀ. Three leave
    those above 1 % of the matrix's norm between 0.15 and 1.9; five would train no better.
    """
    is_tall = matrices_KMN.shape[1] > matrices_KMN.shape[2]
    x = (matrices_KMN.mT if is_tall else matrices_KMN).to(dtype)
    x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above 1
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        # a X + (b XXᵀ + c (XXᵀ)²) X
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices_KMN.dtype)
