"""What a head does, as numbers between 0 and 1 (and one distance), of its weights alone.

Each function takes the weights (..., T, T) of one text, a row per query, and its tokens (T,), and
returns one number per head. A number means something only beside that of uniform attention,
which is what the same function says of `uniform(T)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]


def uniform(T: int) -> Tensor:
    """A head that looks at everything alike: 1/(i+1) for each of the i+1 keys of query i."""
    return torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]


def previous(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Mean of A[i, i-1] (Olsson et al., 2022, arXiv 2209.11895, "head activation evaluators")."""
    return weights_TT.diagonal(-1, -2, -1).mean(-1)


def current(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Mean of A[i, i]; without row 0, which has nothing else to look at."""
    return weights_TT.diagonal(0, -2, -1)[..., 1:].mean(-1)


def first(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Mean of A[i, 0] below row 0: the sink (Xiao et al., 2023; Gu et al., 2024, 2410.10781)."""
    return weights_TT[..., 1:, 0].mean(-1)


def induction(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Mean weight on tokens that followed an earlier copy of the query's token.

    [A] [B] ... [A] looks at [B], over the queries that have such a key (Olsson et al., 2022).
    The paper's words say the copy itself; its code, like all code, takes the one after it.
    """
    copies_TT = (tokens_T[:, None] == tokens_T).tril(-1)
    return on(weights_TT, copies_TT.roll(1, dims=1).tril(-1))  # one to the right of each copy


def duplicate(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Mean weight on earlier copies of the query's token, where any are (Wang et al., 2022)."""
    return on(weights_TT, (tokens_T[:, None] == tokens_T).tril(-1))


def entropy(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Mean of H(row i) / ln(i+1): 0 for one token, 1 for uniform, at every length alike."""
    entropies_T = torch.special.entr(weights_TT).sum(-1)[..., 1:]
    return (entropies_T / torch.arange(2, len(tokens_T) + 1).log()).mean(-1)


def distance(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Mean of i - j, in tokens (Vig & Belinkov, 2019, arXiv 1906.04284)."""
    positions_T = torch.arange(len(tokens_T), dtype=weights_TT.dtype)
    return (weights_TT * (positions_T[:, None] - positions_T)).sum(-1).mean(-1)


def on(weights_TT: Tensor, mask_TT: Tensor) -> Tensor:
    """Mean over rows of the weight in the mask, of the rows that have any; nan if none has."""
    return (weights_TT * mask_TT).sum(-1)[..., mask_TT.any(-1)].mean(-1)


NAMES = {  # and what a reader may want to know of each
    "previous": ("previous token", "weight on the token before"),
    "current": ("current token", "weight on the token itself"),
    "first": ("first token", "weight on token 0, a sink for heads at rest"),
    "induction": ("induction", "weight on what followed an earlier copy"),
    "duplicate": ("duplicate token", "weight on earlier copies"),
    "entropy": ("entropy", "0 for one token, 1 for uniform attention"),
    "distance": ("distance", "mean of query minus key, in tokens"),
}
SCORES: dict[str, Score] = {
    "previous": previous,
    "current": current,
    "first": first,
    "induction": induction,
    "duplicate": duplicate,
    "entropy": entropy,
    "distance": distance,
}
