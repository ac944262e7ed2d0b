"""From the logits of the next token to the token: cut the distribution, and draw from it.

Nothing here reads a value back from the device, so a GPU never waits for the host.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cli import at_least
from model import require

LEAST_TEMPERATURE = 1e-37  # about the smallest normal float32: below it, 0 / temperature is nan


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How to choose each token."""

    temperature: float = 0.8
    """Divide the logits by this: below 1 favours likely tokens, 0 takes the likeliest."""
    top_k: int = 0
    """Choose among the k likeliest tokens only; 0 keeps all."""
    top_p: float = 1.0
    """Choose among the fewest tokens that together have this probability; 1 keeps all."""
    min_p: float = 0.0
    """Choose among tokens at least this fraction as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Penalize tokens that the text already has, by this factor of their logits; 1 is off."""

    def __post_init__(self) -> None:
        at_least(0, self, "temperature", "top_k")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1]: got {self.top_p}")
        require(0 <= self.min_p <= 1, f"min_p must be in [0, 1]: got {self.min_p}")
        penalty = self.repetition_penalty  # beyond these bounds, logits could leave float32
        require(1e-3 <= penalty <= 1e3, f"repetition_penalty must be 0.001 to 1000: got {penalty}")


class Drawn(NamedTuple):
    """The next token of each row and, where asked for, log-probabilities (ln p).

    These are the model's own: before penalty, temperature and cuts.
    """

    tokens_B: Tensor
    log_p_B: Tensor | None = None
    top_log_p_BK: Tensor | None = None  # of the K likeliest tokens
    top_tokens_BK: Tensor | None = None


def penalized(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make the tokens already in a text less likely.

    Keskar et al., 2019 (arXiv 1909.05858, sec. 4.1) divide; a negative logit must be multiplied.
    """
    lower_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, lower_BV, logits_BV)


def distribution(logits_BV: Tensor, choice: Choice) -> Tensor:
    """Return the probabilities (B, V): temperature, then top-k, top-p and min-p in turn.

    Each cuts what the one before has left: top-p (Holtzman et al., 2019, arXiv 1904.09751) counts
    the probability within the k likeliest. Equal logits at the edge of k all stay.
    """
    below_BV = logits_BV.float() - logits_BV.max(dim=-1, keepdim=True).values
    logits_BV = below_BV / max(choice.temperature, LEAST_TEMPERATURE)
    if 0 < choice.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(choice.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    probabilities_BV = F.softmax(logits_BV, dim=-1)
    if choice.top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # what the likelier tokens have already
        kept_BV = sorted_BV * (before_BV < choice.top_p)
        probabilities_BV = torch.empty_like(kept_BV).scatter_(-1, order_BV, kept_BV)
    if choice.min_p > 0:  # Nguyen et al., 2024 (arXiv 2407.01082)
        least_B1 = choice.min_p * probabilities_BV.max(dim=-1, keepdim=True).values
        probabilities_BV = probabilities_BV * (probabilities_BV >= least_B1)
    return probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the token (B,) at which the sum of the probabilities passes a number from [0, 1).

    So each row depends on its own number alone, whatever else is in the batch.
    """
    so_far_BV = probabilities_BV.to(uniform_B.dtype).cumsum(-1)
    passed_B1 = uniform_B[:, None] * so_far_BV[:, -1:]
    tokens_B = torch.searchsorted(so_far_BV, passed_B1, right=True)[:, 0]
    return tokens_B.clamp(max=probabilities_BV.shape[-1] - 1)


def choose(
    logits_BV: Tensor, seen_BV: Tensor, uniform_B: Tensor, choice: Choice, top: int | None = None
) -> Drawn:
    """Choose the next token of each row.

    `seen_BV` says which tokens its text has, and `uniform_B` is its random number. `top` asks for
    log-probabilities, and for those of so many of the likeliest tokens.
    """
    wanted_BV = logits_BV
    if choice.repetition_penalty != 1:
        wanted_BV = penalized(logits_BV.float(), seen_BV, choice.repetition_penalty)
    if choice.temperature == 0:
        tokens_B = wanted_BV.argmax(dim=-1)
    else:
        tokens_B = draw(distribution(wanted_BV, choice), uniform_B)
    if top is None:
        return Drawn(tokens_B)
    log_p_BV = logits_BV.float().log_softmax(dim=-1)
    drawn_B = log_p_BV.gather(-1, tokens_B[:, None])[:, 0]
    return Drawn(tokens_B, drawn_B, *log_p_BV.topk(min(top, logits_BV.shape[-1])))
