"""How well a model predicts a text, each token from as much before it as fits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.loader import Dataset, Windows, eval_batches
from data.tokenizer import Tokenizer
from engine.loss import evaluate, summed_loss
from engine.parallel import World
from model import GPT, require
from sampling.load import Trained

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


def score_text(trained: Trained, text: str, stride: int) -> Score:
    """Score a text, after end-of-text if the texts that trained the model began so."""
    tokenizer = trained.tokenizer
    tokens = tokenizer.encode(text)
    if trained.starts_documents and tokenizer.end_of_text is not None:
        tokens.insert(0, tokenizer.end_of_text)
    return score(trained.model, tokenizer, tokens, stride)


@torch.inference_mode()
def score(model: GPT, tokenizer: Tokenizer, tokens: list[int], stride: int = 1) -> Score:
    """Score all tokens but the first, which has nothing before it.

    A window of context_length tokens moves by `stride`, and predicts the tokens that are new in it.
    With a stride of 1 each token sees all that fits; a larger one, up to the context, is faster.
    """
    require(len(tokens) > 1, f"a text must have 2 tokens to be scored: got {len(tokens)}")
    nats = 0.0
    tokens_N = torch.tensor(tokens, device=model.wte.weight.device)
    for windows_BS, n in sliding_windows(tokens_N, model.config.context_length, stride):
        x = model.features(windows_BS[:, :-1])
        nats += summed_loss(model, x[:, -n:].flatten(0, 1), windows_BS[:, -n:].flatten()).item()
    n_bytes = sum(len(tokenizer.token_bytes(token)) for token in tokens[1:])
    return Score(nats, len(tokens) - 1, n_bytes)


def sliding_windows(tokens_N: Tensor, T: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Yield windows (B, S), S = T + 1, and how many last tokens of each are to be predicted."""
    last = len(tokens_N) - 1
    first = min(T, last)
    yield tokens_N[None, : first + 1], first
    step = min(stride, T)
    ends = range(first + step, last + 1, step)
    at_once = max(1, TOKENS_PER_PASS // T)
    for i in range(0, len(ends), at_once):
        yield torch.stack([tokens_N[end - T : end + 1] for end in ends[i : i + at_once]]), step
    done = ends[-1] if ends else first
    if done < last:
        yield tokens_N[None, -T - 1 :], last - done


def split_loss(model: nn.Module, context_length: int, dataset: Dataset, first: int = 0) -> float:
    """Return the mean loss over a validation split, or over its `first` tokens."""
    windows, at_once = Windows(dataset.vocab_size, context_length), max(1, 2**12 // context_length)
    tokens_N = dataset.tokens("val", first)
    batches = eval_batches(tokens_N, windows, at_once, dataset.end_of_text)
    loss = evaluate(model, batches, World(next(model.parameters()).device))
    assert loss is not None
    return loss
