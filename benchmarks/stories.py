"""`bench.py stories`: what a model has learned from data.stories, and which heads do it.

A score of attention alone can mislead: a head that always looks 20 back has a fine induction score
on text that repeats after 20. So each is taken at several periods, and beside what it costs to
remove the head.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.table import Row, Tables
from data.bigram import bigram_loss
from data.loader import Dataset, eval_batches
from data.stories import GRAMMAR, PRONOUN
from data.tokenizer import Tokenizer
from engine import checkpoint
from engine.evaluate import evaluate
from engine.parallel import World
from model import GPT, ModelConfig, attention

PERIODS = (10, 25, 50)  # words before they repeat at once, as they never do in a story
REPEATS = 16  # texts for each period
BATCH = 16  # windows at a time


@dataclass(frozen=True, kw_only=True)
class StoriesBench:
    """Judge a run of config/stories.toml on stories that it has not seen."""

    out_dir: Path = Path("out/stories")
    """Folder that train.py wrote."""
    data: Path = Path("data/stories_bpe")
    """Folder that data.prepare wrote."""
    stories: int = 1000
    """Stories to ask for pronouns in, the first so many of the validation split."""


def measure(config: StoriesBench) -> Tables:
    """Measure loss, pronouns and heads."""
    dataset, model = Dataset.open(config.data), load(config.out_dir)
    stories = split_stories(dataset.tokens("val"), dataset.tokenizer)
    return {
        "loss on unseen stories": losses(model, dataset),
        "right noun for the pronoun, %": [pronouns(model, dataset, stories[: config.stories])],
        "heads": heads(model, dataset),
    }


def load(out_dir: Path) -> GPT:
    """Rebuild the model of a run, so that its attention can be watched."""
    state = checkpoint.load(out_dir, "best")
    model = GPT(replace(ModelConfig(**state["model_config"]), attention="explicit"))
    model.load_state_dict(state["model"])
    return model.eval()


def split_stories(tokens_N: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Cut a split before each end-of-text: each story begins with one, and ends before the next."""
    starts = np.flatnonzero(tokens_N == tokenizer.end_of_text)
    return [story.astype(np.int64) for story in np.split(tokens_N, starts[1:])]


# Loss


def losses(model: GPT, dataset: Dataset) -> list[Row]:
    """The loss on all unseen stories, beside the least possible and a bigram model's."""
    val_T, vocab_size = dataset.tokens("val"), dataset.vocab_size
    window = {"vocab_size": vocab_size, "context_length": model.config.context_length}
    batches = eval_batches(val_T, dataset.end_of_text, batch_size=BATCH, **window)
    entropy = dataset.entropy()
    if entropy is None:
        raise ValueError(f"{dataset.path} is not of stories: run python -m data.prepare stories")
    found = {
        "the grammar: entropy": entropy,
        "the model": evaluate(model, batches, World(torch.device("cpu"))),
        "a bigram model": bigram_loss(dataset.tokens("train"), val_T, vocab_size),
    }
    return [
        {"of": name, "nats per token": loss, "above entropy, %": 100 * (loss / entropy - 1)}
        for name, loss in found.items()
        if loss is not None
    ]


# Pronouns


@torch.no_grad()
def pronouns(model: GPT, dataset: Dataset, stories: list[np.ndarray]) -> Row:
    """How often the noun that the pronoun stands for is likelier than the other one, in %."""
    train_T, tokenizer = dataset.tokens("train").astype(np.int64), dataset.tokenizer
    pairs = np.bincount(train_T[:-1] * dataset.vocab_size + train_T[1:])
    right: dict[str, list[float]] = {"model": [], "bigram model": []}
    for story in stories:
        for prefix, (noun, other) in questions(story, tokenizer):
            logits_V = model(torch.tensor([prefix[-model.config.context_length :]]))[0, -1]
            count_V = pairs[prefix[-1] * dataset.vocab_size :]
            right["model"].append(float(logits_V[noun] > logits_V[other]))
            right["bigram model"].append((np.sign(count_V[noun] - count_V[other]) + 1) / 2)
    shares: Row = {name: 100 * float(np.mean(values)) for name, values in right.items()}
    return shares | {"pronouns": len(right["model"])}


def questions(
    story: np.ndarray, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Yield the tokens before each noun that a pronoun stood for, that noun's, and the other's."""
    text = tokenizer.decode(story[1:])
    for match in re.finditer(PRONOUN, text):
        first, second, noun = match.groups()
        other = first if noun == second else second
        prefix = tokenizer.encode(text[: match.start(3) - 1])
        yield (
            [int(story[0]), *prefix],
            (tokenizer.encode(f" {noun}")[0], tokenizer.encode(f" {other}")[0]),
        )


# Heads


def heads(model: GPT, dataset: Dataset) -> list[Row]:
    """The best head of each kind: its scores, and the loss of a copy with and without it."""
    tokenizer, T = dataset.tokenizer, model.config.context_length
    natural_BT = torch.from_numpy(dataset.tokens("val", REPEATS * T).astype(np.int64)).view(-1, T)
    copies = {period: repeated_words(tokenizer, period) for period in PERIODS}
    previous_LH = previous_scores(weights_of(model, natural_BT))
    induction = {n: induction_scores(weights_of(model, copies[n]), n) for n in PERIODS}
    worst_LH = torch.stack(list(induction.values())).amin(0)
    rows: list[Row] = []
    for kind, scores_LH in (("previous token", previous_LH), ("induction", worst_LH)):
        layer, head = divmod(int(scores_LH.argmax()), scores_LH.shape[1])
        for period in PERIODS:
            score = previous_LH if kind == "previous token" else induction[period]
            row: Row = {"kind": kind, "head": f"L{layer}H{head}", "period": period}
            row |= {"score": score[layer, head].item()}
            row |= {"copy loss": copy_loss(model, copies[period], period)}
            with without(model, layer, head):
                row["without the head"] = copy_loss(model, copies[period], period)
            rows.append(row)
    return rows


def repeated_words(tokenizer: Tokenizer, period: int) -> Tensor:
    """Texts (B, 1 + 2 period): end of text, different random words, and the same again."""
    words = [tokenizer.encode(f" {word}")[0] for word in GRAMMAR["thing"]]
    rng = np.random.default_rng(period)
    once = np.stack([rng.permutation(words)[:period] for _ in range(REPEATS)])
    start = np.full((REPEATS, 1), tokenizer.end_of_text)
    return torch.from_numpy(np.concatenate([start, once, once], axis=1))


@torch.no_grad()
def weights_of(model: GPT, tokens_BT: Tensor) -> Tensor:
    """The attention weights of all heads: (L, B, H, T, S)."""
    layers: list[Tensor] = []

    def watched(*qkv: Tensor, **how: bool) -> tuple[Tensor, Tensor]:
        y_BHTD, weights_BHTS = attention(*qkv, **how)
        layers.append(weights_BHTS)
        return y_BHTD, weights_BHTS

    with mock.patch("model.attention", watched):
        model(tokens_BT)
    return torch.stack(layers)


def previous_scores(weights_LBHTS: Tensor) -> Tensor:
    """Mean weight on the token before, for each head (L, H) (Olsson et al., 2022)."""
    return weights_LBHTS.diagonal(-1, -2, -1).mean((1, -1))


def induction_scores(weights_LBHTS: Tensor, period: int) -> Tensor:
    """Mean weight, in a second copy, on the token after the same one in the first (L, H)."""
    stripe_LBHN = weights_LBHTS.diagonal(1 - period, -2, -1)
    return stripe_LBHN[..., 2:].mean((1, -1))  # the first two lie in the first copy


@torch.no_grad()
def copy_loss(model: GPT, tokens_BT: Tensor, period: int) -> float:
    """Mean loss in nats on the second copy but its first word, which nothing foretells."""
    logits_BTV = model(tokens_BT)[:, period + 1 : -1]
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, period + 2 :].flatten()).item()


@contextlib.contextmanager
def without(model: GPT, layer: int, head: int) -> Iterator[None]:
    """Set a head's output to 0 meanwhile."""
    D = model.config.head_dim

    def remove(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        y_BTC = inputs[0].clone()
        y_BTC[..., head * D : (head + 1) * D] = 0
        return y_BTC

    handle = model.get_submodule(f"blocks.{layer}.attn.c_proj").register_forward_pre_hook(remove)
    try:
        yield
    finally:
        handle.remove()
