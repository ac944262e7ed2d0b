"""What single heads of attention do: scores of their weights, and the loss without them.

A score alone can mislead: a head that always looks 20 back has a fine induction score on text that
repeats after 20. So induction is scored at several periods, and each head beside its ablation.
"""

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.table import Row, Tables
from data.loader import Dataset
from data.stories import GRAMMAR
from data.tokenizer import Tokenizer
from model import GPT
from viewer.record import record, switch_off

PERIODS = (10, 40, 60)  # words before they repeat; in stories 1 list in 1,000 has 40, none 60
REPEATS = 16  # texts for each score
NAMED = 0.4  # a head with a mean score above it is named after its kind
Head = tuple[int, int]  # layer and head


def heads(model: GPT, dataset: Dataset) -> Tables:
    """The scores of the best head of each kind, and what it costs to remove all of the kind."""
    T, copies = model.config.context_length, repeated_words(dataset.tokenizer)
    stories_BT = torch.from_numpy(dataset.tokens("val", REPEATS * T).astype(np.int64)).view(-1, T)
    previous = {"unseen stories": previous_scores(weights_of(model, stories_BT))}
    induction = {
        f"period {period}": induction_scores(weights_of(model, copies[period]), period)
        for period in PERIODS
    }
    rows: list[Row] = []
    groups: dict[str, list[Head]] = {}
    for kind, scores in (("previous token", previous), ("induction", induction)):
        mean_LH = torch.stack(list(scores.values())).mean(0)
        best = divmod(int(mean_LH.argmax()), model.config.n_head)
        groups[kind] = [(layer, head) for layer, head in (mean_LH > NAMED).nonzero().tolist()]
        named = " ".join(map(name, groups[kind]))
        rows += [
            {"kind": kind, "text": text, "best": name(best), "score": scores_LH[best].item()}
            | {f"mean above {NAMED}": named}
            for text, scores_LH in scores.items()
        ]
    ablations = [ablate(model, copies[period], period, groups) for period in PERIODS]
    return {"heads": rows, "loss on words that repeat": ablations}


def name(head: Head) -> str:
    """(1, 0) -> L1H0."""
    return f"L{head[0]}H{head[1]}"


def ablate(model: GPT, tokens_BT: Tensor, period: int, groups: dict[str, list[Head]]) -> Row:
    """The loss on the second copy: as it is, without each group, without any other head."""
    row: Row = {"period": period, "nats per token": copy_loss(model, tokens_BT, period)}
    for kind, group in groups.items():
        with without(model, group):
            row[f"without {kind} heads"] = copy_loss(model, tokens_BT, period)
    others: list[float] = []
    for head in itertools.product(range(model.config.n_layer), range(model.config.n_head)):
        if head not in itertools.chain(*groups.values()):
            with without(model, [head]):
                others.append(copy_loss(model, tokens_BT, period))
    return row | {"without any other, at most": max(others)}


def repeated_words(tokenizer: Tokenizer) -> dict[int, Tensor]:
    """For each period texts (B, 1 + 2 period): end of text, different words, the same again."""
    words = [tokenizer.encode(f" {word}")[0] for word in GRAMMAR["thing"]]
    rng, copies = np.random.default_rng(0), dict[int, Tensor]()
    for period in PERIODS:
        once = np.stack([rng.permutation(words)[:period] for _ in range(REPEATS)])
        start = np.full((REPEATS, 1), tokenizer.end_of_text)
        copies[period] = torch.from_numpy(np.concatenate([start, once, once], axis=1))
    return copies


def weights_of(model: GPT, tokens_BT: Tensor) -> Tensor:
    """The attention weights of all heads: (L, B, H, T, S)."""
    return record(model, tokens_BT).weights_LBHTS


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
def without(model: GPT, heads: list[Head]) -> Iterator[None]:
    """Set the output of some heads to 0 meanwhile."""
    with contextlib.ExitStack() as hooks:
        for layer, head in heads:
            hooks.enter_context(switch_off(model, layer, head))
        yield
