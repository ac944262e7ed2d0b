"""Judge heads by more than one short text: by texts of the model's own, and by random copies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model import GPT
from viewer.record import costs, losses, record
from viewer.scores import SCORES, uniform

N_TEXTS, LENGTH = 4, 64  # Olsson et al., 2022, average over ten; the mean of four is steady enough
# A head that always looks 9 back copies well at period 10 only, so there are several periods: none
# is a multiple of another, nor so short that uniform attention scores high by itself
PERIODS = (10, 16, 25)
N_ALIKE = 64  # tokens to draw copies from
ON_COPIES = ("induction", "duplicate")  # scores of what a head does with repeated tokens


@dataclass(frozen=True)
class Probes:
    """The same for all checkpoints of a run, so that their scores can be compared."""

    written_BT: Tensor
    """Texts that the model wrote, so of the kind that it was trained on."""
    copies: list[Tensor]
    """(B, 2P) for each period P: P random tokens, all different, said twice."""


@dataclass(frozen=True)
class Measured:
    """How the heads of one checkpoint do on the probes; every tensor is (L, H)."""

    written: dict[str, Tensor]
    copied: dict[str, Tensor]
    """The least over the periods, so that only what holds at each of them counts."""
    uniform: dict[str, float]
    """Of a head that looks at everything alike, on whichever text the score is meant for."""
    cost_written_LH: Tensor
    """By how much the loss on the written texts rises without the head, nats per token."""
    cost_copied_LH: Tensor
    """The same on the second of two copies."""
    copy_loss: float
    """Loss on the second copy, which a model that can copy predicts, in nats per token."""
    n_periods: int

    def score(self, name: str) -> Tensor:
        return (self.copied if name in ON_COPIES else self.written)[name]


@torch.inference_mode()
def make_probes(model: GPT, start: int, vocab_size: int) -> Probes:
    """Let `model` write from the token `start` on, and shuffle tokens that could stand there.

    A small model copies only what it has seen repeated, so that any tokens at all would show
    nothing. Those between which it is least certain are alike to it: nouns, for example.
    """
    generator, device = torch.Generator().manual_seed(0), model.wte.weight.device
    cache, tokens_BT = model.new_cache(N_TEXTS), torch.full((N_TEXTS, 1), start)
    for _ in range(min(LENGTH, model.config.context_length) - 1):
        logits_BV = model(tokens_BT[:, -1:].to(device), cache=cache)[:, -1, :vocab_size]
        next_B1 = logits_BV.float().softmax(-1).cpu().multinomial(1, generator=generator)
        tokens_BT = torch.cat((tokens_BT, next_B1), dim=1)
    logits_BTV = model(tokens_BT.to(device))[..., :vocab_size].float().cpu()
    uncertain = torch.special.entr(logits_BTV.softmax(-1)).sum(-1).argmax()
    alike_V = logits_BTV.flatten(0, 1)[uncertain].topk(min(N_ALIKE, vocab_size)).indices
    longest = min(len(alike_V), model.config.context_length // 2)
    copies: list[Tensor] = []
    for period in (p for p in PERIODS if p <= longest):
        orders = (torch.randperm(len(alike_V), generator=generator) for _ in range(N_TEXTS // 2))
        once_BP = torch.stack([alike_V[order_V[:period]] for order_V in orders])
        copies.append(once_BP.repeat(1, 2).to(device))
    return Probes(tokens_BT.to(device), copies)


def measure(model: GPT, probes: Probes) -> Measured:
    """Score every head on the probes, and switch each off to see what it is worth."""
    shape = (model.config.n_layer, model.config.n_head)
    copied = [mean_scores(model, tokens_BT) for tokens_BT in probes.copies]
    second = [(tokens_BT, tokens_BT.shape[1] // 2) for tokens_BT in probes.copies]  # from where
    return Measured(
        written=mean_scores(model, probes.written_BT),
        copied={name: least([scores[name] for scores in copied], shape) for name in SCORES},
        uniform={name: baseline(name, probes) for name in SCORES},
        cost_written_LH=costs(model, probes.written_BT).mean((2, 3)).cpu(),
        cost_copied_LH=mean([costs(model, t)[..., n:].mean((2, 3)) for t, n in second], shape),
        copy_loss=float(mean([losses(model, t)[:, n:].mean() for t, n in second], ())),
        n_periods=len(second),
    )


def mean_scores(model: GPT, tokens_BT: Tensor) -> dict[str, Tensor]:
    """Each score of each head (L, H), averaged over texts; nan where no text can tell."""
    weights_LBHTT, texts = record(model, tokens_BT).weights_LBHTS.cpu(), list(tokens_BT.cpu())
    return {
        name: torch.stack([score(weights_LBHTT[:, i], t) for i, t in enumerate(texts)]).nanmean(0)
        for name, score in SCORES.items()
    }


def baseline(name: str, probes: Probes) -> float:
    """The score of uniform attention; on copies the largest over the periods, to be beaten."""
    texts = [t[0] for t in probes.copies] if name in ON_COPIES else list(probes.written_BT)
    values = [float(SCORES[name](uniform(len(t)), t.cpu())) for t in texts]
    return max(values, default=float("nan"))


def least(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.stack(tensors).amin(0) if tensors else torch.full(shape, float("nan"))


def mean(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.stack(tensors).mean(0).cpu() if tensors else torch.full(shape, float("nan"))
