"""How well a model predicts a text, each token from as much before it as fits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.tokenizer import Tokenizer
from model import GPT

TOKENS_PER_PASS = 2**13


@dataclass(frozen=True)
class Score:
    """Sums over the tokens that were predicted."""

    nats: float
    n_tokens: int
    n_bytes: int

    def __str__(self) -> str:
        loss = self.nats / self.n_tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf  # beyond, no float holds it
        bits = self.nats / math.log(2) / self.n_bytes
        return (
            f"{self.n_tokens:,} tokens, {self.n_bytes:,} bytes: loss {loss:.4f} nats per token, "
            f"perplexity {perplexity:.4g}, {bits:.4f} bits per byte"
        )


def score(model: GPT, tokenizer: Tokenizer, tokens: list[int], stride: int = 1) -> Score:
    """Score all tokens but the first, which has nothing before it.

    Windows as long as the context move by `stride` tokens, and each predicts those that the one
    before did not: with 1 a token sees all that fits, with more, up to the context, it is sooner
    done.
    """
    if len(tokens) < 2:
        raise ValueError(f"a text must have at least 2 tokens to be scored: got {len(tokens)}")
    tokens_N = torch.tensor(tokens)
    nats = sum(float(part.sum()) for part in losses(model, tokens_N, stride))
    n_bytes = sum(len(tokenizer.token_bytes(token)) for token in tokens[1:])
    return Score(nats, len(tokens) - 1, n_bytes)


@torch.inference_mode()
def losses(model: GPT, tokens_N: Tensor, stride: int) -> Iterator[Tensor]:
    """Yield -ln p of each token but the first, in nats and in order, some at a time."""
    size, last = model.config.context_length, len(tokens_N) - 1
    first = min(size, last)
    yield window_losses(model, tokens_N[None, : first + 1], first)
    stride = min(stride, size)
    ends = range(first + stride, last + 1, stride)
    at_once = max(1, TOKENS_PER_PASS // size)
    for i in range(0, len(ends), at_once):
        windows = [tokens_N[end - size : end + 1] for end in ends[i : i + at_once]]
        yield window_losses(model, torch.stack(windows), stride)
    done = ends[-1] if ends else first
    if done < last:
        yield window_losses(model, tokens_N[None, -size - 1 :], last - done)


def window_losses(model: GPT, windows_BT: Tensor, n: int) -> Tensor:
    """Losses of the last n tokens of each window, one window after another."""
    windows_BT = windows_BT.to(model.wte.weight.device)
    logits_BTV = model(windows_BT[:, :-1], last=n)
    return F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), windows_BT[:, -n:].flatten(), reduction="none"
    ).double()
