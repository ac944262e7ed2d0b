"""What a head does, as numbers that are computed from its attention weights alone.

Each score takes the weights (..., T, T) of one text, a row per query, and its tokens (T,), and
returns one number per head: from 0 to 1, but for distance and roles. A number means something only
beside that of uniform attention, which is the same score of `uniform(T)`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from data.stories import ROLES


def uniform(T: int) -> Tensor:
    """Return the weights (T, T) of a head that attends equally: 1/(i+1) to the keys of query i."""
    return torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]


def previous(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Average A[i, i-1] (Olsson et al., 2022, arXiv 2209.11895, "head activation evaluators")."""
    return weights_TT.diagonal(-1, -2, -1).mean(-1)


def current(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Average A[i, i], without row 0, which can attend to nothing else."""
    return weights_TT.diagonal(0, -2, -1)[..., 1:].mean(-1)


def first(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Average A[i, 0] below row 0, the sink (Xiao et al., 2023; Gu et al., 2024, 2410.10781)."""
    return weights_TT[..., 1:, 0].mean(-1)


def column(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Average A[i, j] below the diagonal for the key j > 0, of the first half, that has most."""
    T = len(tokens_T)
    sums_T = weights_TT.tril(-1).sum(-2)
    sums_T[..., 0] = 0  # that is `first`; and of the second half a few queries could decide
    return (sums_T / torch.arange(T - 1, -1, -1))[..., : (T + 1) // 2].amax(-1)


def induction(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Average the weight on tokens that followed an earlier copy of the query's token.

    [A] [B] ... [A] attends to [B]; queries without such a key do not count (Olsson et al., 2022).
    The paper's text scores the copy itself; its code, like this, the token after it.
    """
    copies_TT = (tokens_T[:, None] == tokens_T).tril(-1)
    return on(weights_TT, copies_TT.roll(1, dims=1).tril(-1))  # one to the right of each copy


def duplicate(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Average the weight on earlier copies of the query's token, if any (Wang et al., 2022)."""
    return on(weights_TT, (tokens_T[:, None] == tokens_T).tril(-1))


def entropy(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Average H(row i) / ln(i+1): 0 for one key, 1 for uniform attention, at every length."""
    entropies_T = torch.special.entr(weights_TT).sum(-1)[..., 1:]
    return (entropies_T / torch.arange(2, len(tokens_T) + 1).log()).mean(-1)


def distance(weights_TT: Tensor, tokens_T: Tensor) -> Tensor:
    """Average i - j, in tokens (Vig & Belinkov, 2019, arXiv 1906.04284)."""
    positions_T = torch.arange(len(tokens_T), dtype=weights_TT.dtype)
    return (weights_TT * (positions_T[:, None] - positions_T)).sum(-1).mean(-1)


def beyond_distance(weights_TT: Tensor, mask_TT: Tensor) -> Tensor:
    """Average the weight in the mask, less what keys that far back have from all queries.

    A previous-token head scores 0: it sees the subject of many a verb, but not for being one.
    """
    positions_T = torch.arange(weights_TT.shape[-1])
    means = [weights_TT.diagonal(-int(n), -2, -1).mean(-1) for n in positions_T]
    return on(weights_TT - torch.stack(means, -1)[..., positions_T[:, None] - positions_T], mask_TT)


def on(weights_TT: Tensor, mask_TT: Tensor) -> Tensor:
    """Average the weight in the mask over the rows that have any of it; nan if none has."""
    return (weights_TT * mask_TT).sum(-1)[..., mask_TT.any(-1)].mean(-1)


ALL = (previous, current, first, column, induction, duplicate, entropy, distance)
SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {score.__name__: score for score in ALL}
# Tokens alone do not tell a word's role, so its score is nan where data/roles.py is not asked
SCORES |= dict.fromkeys(ROLES, lambda weights_TT, _: weights_TT.sum((-2, -1)) * math.nan)
NAMES = {  # on the page, with what a reader may want to know of each
    "previous": ("previous token", "weight on the token before"),
    "current": ("current token", "weight on the token itself"),
    "first": ("first token", "weight on token 0, the attention sink"),
    "column": ("one token", "weight of all queries on the same token, other than token 0"),
    "induction": ("induction", "weight on what followed an earlier copy"),
    "duplicate": ("duplicate token", "weight on earlier copies"),
    "entropy": ("entropy", "0 for one key, 1 for uniform attention"),
    "distance": ("distance", "query minus key, in tokens, on average"),
    "subject": ("subject", "of verbs in stories: weight beyond that of any word so far back"),
    "object": ("object", "the same for objects that look at their verb"),
    "adjective": ("adjective", "the same for nouns that look at their adjectives"),
}
