"""Cross-attention in a toy that learns, in seconds, to write a word backwards.

Nothing tells it where to look. It finds that position t of the answer must ask position T-1-t of
the source, so that its map becomes the anti-diagonal.
"""

import functools
import itertools
import math
import string

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import attention
from viewer.payload import TEMPERATURES, Json, predictions, tensors

LETTERS, WORD = string.ascii_lowercase, "stressed"
WIDTH, BATCH, LEARNING_RATE = 32, 64, 1e-2
STEPS = (0, 5, 10, 15, 20, 40, 80)  # where to look at it


class Reverser(nn.Module):
    """T positions of an answer ask the S letters of a source, by one head."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(len(LETTERS), WIDTH)
        self.wpe_source, self.wpe_target = (nn.Embedding(length, WIDTH) for _ in range(2))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.lm_head = nn.Linear(WIDTH, len(LETTERS))

    def queries_keys_values(self, source_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The answer's queries, and the source's keys and values (B, 1, T, D)."""
        source_BSC = self.wte(source_BS) + self.wpe_source.weight
        target_BTC = self.wpe_target.weight.expand(source_BSC.shape)
        q_BTD, k_BSD = self.query(target_BTC), self.key(source_BSC)
        return q_BTD[:, None], k_BSD[:, None], self.value(source_BSC)[:, None]

    def forward(self, source_BS: Tensor) -> Tensor:
        """Logits (B, T, V) of the answer's letters."""
        y_BHTD, _ = attention(*self.queries_keys_values(source_BS), causal=False)
        return self.lm_head(y_BHTD[:, 0])


def train(toy: Reverser, steps: int, generator: torch.Generator) -> None:
    """Show it random strings and what they are backwards."""
    optimizer = torch.optim.Adam(toy.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        source_BS = torch.randint(len(LETTERS), (BATCH, len(WORD)), generator=generator)
        loss = F.cross_entropy(toy(source_BS).mT, source_BS.flip(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def frame(toy: Reverser, step: int) -> Json:
    source_BS = torch.tensor([[LETTERS.index(letter) for letter in WORD]])
    q_BHTD, k_BHSD, v_BHSD = toy.queries_keys_values(source_BS)
    y_BHTD, weights_BHTS = attention(q_BHTD, k_BHSD, v_BHSD, causal=False)
    found = (tensor[0, 0] for tensor in (q_BHTD, k_BHSD, v_BHSD, weights_BHTS, y_BHTD))
    panel = {"row": 0, "name": "cross-attention", "axes": 0} | tensors(*found, causal=False)
    logits_TV, truth_T = toy(source_BS)[0], source_BS[0].flip(0)
    return {"step": step, "panels": [panel], **predictions(logits_TV, truth_T, LETTERS.__getitem__)}


@functools.cache
def reverser_scene() -> Json:
    """Train the toy, the same each time, and show it on a word that is one backwards too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        toy = Reverser(len(WORD))
    generator, frames = torch.Generator().manual_seed(0), [frame(toy, STEPS[0])]
    for before, step in itertools.pairwise(STEPS):
        train(toy, step - before, generator)
        frames.append(frame(toy, step))
    axes = {"queries": list(WORD[::-1]), "keys": list(WORD)}
    return {
        "name": "Cross-attention",
        "about": f"A toy that learned in {STEPS[-1]} steps to write a word backwards: positions of "
        "the answer ask the letters of the source. Nobody told it where to look.",
        "rows": ["one head"],
        "axes": [axes | {"causal": False, "scale": math.sqrt(WIDTH)}],
        "temperatures": TEMPERATURES,
        "notices": [],
        "frames": frames,
    }
