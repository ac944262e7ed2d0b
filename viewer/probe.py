"""Judge heads by more than one short text: by texts that the model wrote, and by random copies."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data.roles import tell
from data.stories import OPENING
from data.tokenizer import Tokenizer
from model import GPT
from sampling.decode import Decoder
from viewer.record import costs, losses, record
from viewer.scores import SCORES, beyond_distance, uniform

N_TEXTS = 4  # Olsson et al., 2022, average over ten; the mean of four is steady enough
LENGTH = 64  # tokens of each text
# A head that always looks 9 back scores well at period 10 only, so there are several periods: none
# is a multiple of another, nor so short that uniform attention scores high by itself
PERIODS = (10, 16, 25)
N_ALIKE = 64  # tokens to draw copies from
ON_COPIES = ("induction", "duplicate")  # scores of what a head does with repeated tokens


@dataclass(frozen=True)
class Probes:
    """Texts for all checkpoints of a run, so that their scores can be compared."""

    written_BT: Tensor
    """Texts of the kind that the model writes, so that it was trained on: its own, or stories."""
    copies: list[Tensor]
    """For each period P texts (B, 2P): P random tokens, all different, and the same again."""
    roles: dict[str, Tensor]
    """For each role which words of the written texts are in it (B, T, T); {} if not stories."""


@dataclass(frozen=True)
class Measured:
    """What the heads of one checkpoint do on the probes; scores are (L, H), by their names."""

    written: dict[str, Tensor]
    """Scores on the written texts."""
    copied: dict[str, Tensor]
    """The lowest scores over the periods, so that only what holds at each of them counts."""
    uniform: dict[str, float]
    """Scores of uniform attention, on whichever texts the score is meant for."""
    cost_written_LH: Tensor
    """By how much the loss on the written texts rises without the head, in nats per token."""
    cost_copied_LH: Tensor
    """By how much the loss on second copies rises without the head, in nats per token."""
    copy_loss: float
    """Loss on second copies, which a model that can copy predicts, in nats per token."""
    n_periods: int

    def score(self, name: str) -> Tensor:
        return (self.copied if name in ON_COPIES else self.written)[name]


@torch.inference_mode()
def make_probes(
    model: GPT, start: int, vocab_size: int, tokenizer: Tokenizer | None = None
) -> Probes:
    """Let `model` write from the token `start` on, and shuffle tokens that could follow.

    A small model copies only what it has seen repeated, so arbitrary tokens would show nothing. The
    likeliest tokens where it is least certain are alike to it: nouns, for example.
    """
    generator = torch.Generator().manual_seed(0)
    written_BT = write(model, start, vocab_size, generator)
    logits_BTV = model(written_BT)[..., :vocab_size].float().cpu()
    uncertain = torch.special.entr(logits_BTV.softmax(-1)).sum(-1).argmax()
    alike_N = logits_BTV.flatten(0, 1)[uncertain].topk(min(N_ALIKE, vocab_size)).indices
    longest = min(len(alike_N), model.config.context_length // 2)
    copies: list[Tensor] = []
    for period in (p for p in PERIODS if p <= longest):
        orders = (torch.randperm(len(alike_N), generator=generator) for _ in range(N_TEXTS // 2))
        once_BP = torch.stack([alike_N[order_N[:period]] for order_N in orders])
        copies.append(once_BP.repeat(1, 2).to(written_BT.device))
    if not tokenizer or not all(OPENING.search(tokenizer.decode(t)) for t in written_BT.tolist()):
        return Probes(written_BT, copies, {})
    stories_BT, roles = tell(tokenizer, start, model.config.context_length)
    return Probes(stories_BT.to(written_BT.device), copies, roles)


def write(model: GPT, start: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Return texts (B, T) that the model writes from one token on, at temperature 1."""
    length = min(LENGTH, model.config.context_length)
    decoder = Decoder(model, [[start]] * N_TEXTS, max_new_tokens=length - 1)
    texts = [torch.full((N_TEXTS,), start)]
    logits_BV = decoder.read()
    while len(texts) < length:
        p_BV = logits_BV[:, :vocab_size].float().softmax(-1).cpu()
        texts.append(p_BV.multinomial(1, generator=generator)[:, 0])
        logits_BV = decoder.feed(texts[-1].to(decoder.device))
    return torch.stack(texts, dim=1).to(decoder.device)


def measure(model: GPT, probes: Probes) -> Measured:
    """Score every head on the probes, and switch each off to see what it is worth."""
    shape = (model.config.n_layer, model.config.n_head)
    copied = [mean_scores(model, tokens_BT) for tokens_BT in probes.copies]
    losses_copied = [second_copy(losses(model, t)).mean() for t in probes.copies]
    costs_copied = [second_copy(costs(model, t)).mean((2, 3)) for t in probes.copies]
    return Measured(
        written=mean_scores(model, probes.written_BT, probes.roles),
        copied={name: stack([found[name] for found in copied], shape).amin(0) for name in SCORES},
        uniform={name: baseline(name, probes) for name in SCORES},
        cost_written_LH=costs(model, probes.written_BT).mean((2, 3)).cpu(),
        cost_copied_LH=stack(costs_copied, shape).mean(0),
        copy_loss=float(stack(losses_copied, ()).mean()),
        n_periods=len(probes.copies),
    )


def mean_scores(
    model: GPT, tokens_BT: Tensor, roles: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return each score of each head (L, H), averaged over texts; nan where no text can tell."""
    weights_LBHTT = record(model, tokens_BT).weights_LBHTS.cpu()
    texts = list(zip(weights_LBHTT.unbind(1), tokens_BT.cpu(), strict=True))
    means = (torch.stack([score(*text) for text in texts]).nanmean(0) for score in SCORES.values())
    weights_LHBTT = weights_LBHTT.transpose(1, 2)
    by_role = {role: beyond_distance(weights_LHBTT, mask) for role, mask in (roles or {}).items()}
    return dict(zip(SCORES, means, strict=True)) | by_role


def baseline(name: str, probes: Probes) -> float:
    """Return the score of uniform attention; on copies the largest over the periods."""
    if name in probes.roles:
        return float(beyond_distance(uniform(probes.written_BT.shape[1]), probes.roles[name]))
    texts = [t[0] for t in probes.copies] if name in ON_COPIES else list(probes.written_BT)
    values = [float(SCORES[name](uniform(len(t)), t.cpu())) for t in texts]
    return max(values, default=math.nan)


def second_copy(losses_N: Tensor) -> Tensor:
    """Keep the losses on a second copy, but its first: [A B C A B C] -> those of the last [B C]."""
    return losses_N[..., losses_N.shape[-1] // 2 + 1 :]  # no text predicts the first


def stack(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Stack what was measured at each period; nan if the context is too short for any."""
    return torch.stack(tensors).cpu() if tensors else torch.full((1, *shape), math.nan)
