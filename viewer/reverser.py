"""Cross-attention in a toy model that learns, in seconds, to write a word backwards.

Nothing tells it where to look. It finds that position t of the answer must attend to position
T-1-t of the source, so that its map becomes the anti-diagonal.
"""

import functools
import itertools
import string

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import attention
from viewer.page import Json, predictions, tensors

LETTERS = string.ascii_lowercase
WORD = "stressed"  # the example; backwards it is a word, too
WIDTH = 32
BATCH_SIZE = 64
LEARNING_RATE = 1e-2
STEPS = (0, 5, 10, 15, 20, 40, 80)  # the page shows it after each of these


class Reverser(nn.Module):
    """One head, in which T positions of an answer attend to the S letters of a source; S = T."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(len(LETTERS), WIDTH)
        self.wpe_source, self.wpe_target = (nn.Embedding(length, WIDTH) for _ in range(2))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.lm_head = nn.Linear(WIDTH, len(LETTERS))

    def queries_keys_values(self, source_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the answer's queries (B, 1, T, D), and the source's keys and values."""
        source_BSC = self.wte(source_BS) + self.wpe_source.weight
        target_BTC = self.wpe_target.weight.expand(source_BSC.shape)
        q_BTD, k_BSD, v_BSD = self.query(target_BTC), self.key(source_BSC), self.value(source_BSC)
        return q_BTD[:, None], k_BSD[:, None], v_BSD[:, None]

    def forward(self, source_BS: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the answer's letters."""
        y_BHTD, _ = attention(*self.queries_keys_values(source_BS))
        return self.lm_head(y_BHTD[:, 0])


def train(toy: Reverser, steps: int, generator: torch.Generator) -> None:
    """Show the toy random strings, and what they are backwards."""
    optimizer = torch.optim.Adam(toy.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        source_BS = torch.randint(len(LETTERS), (BATCH_SIZE, len(WORD)), generator=generator)
        loss = F.cross_entropy(toy(source_BS).mT, source_BS.flip(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def frame(toy: Reverser, step: int) -> Json:
    """Return what the page shows of the toy at a step."""
    source_BS = torch.tensor([[LETTERS.index(letter) for letter in WORD]])
    q_BHTD, k_BHSD, v_BHSD = toy.queries_keys_values(source_BS)
    y_BHTD, weights_BHTS = attention(q_BHTD, k_BHSD, v_BHSD)
    found = (tensor[0, 0] for tensor in (q_BHTD, k_BHSD, v_BHSD, weights_BHTS, y_BHTD))
    head = {"row": 0, "name": "cross-attention", "axes": 0, **tensors(*found)}
    answer = predictions(toy(source_BS)[0], source_BS[0].flip(0), LETTERS.__getitem__)
    return {"step": step, "panels": [head], **answer}


@functools.cache
def reverser_scene() -> Json:
    """Train the toy, the same way each time, and show how its attention changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        toy = Reverser(len(WORD))
    generator = torch.Generator().manual_seed(0)
    frames = [frame(toy, STEPS[0])]
    for before, step in itertools.pairwise(STEPS):
        train(toy, step - before, generator)
        frames.append(frame(toy, step))
    return {
        "name": "Cross-attention",
        "about": f"A toy model that learned in {STEPS[-1]} steps to write a word backwards: each "
        "position of the answer attends to the letters of the source. Nobody told it to which.",
        "rows": ["one head"],
        "axes": [{"queries": [*WORD[::-1]], "keys": [*WORD], "causal": False, "scale": WIDTH**0.5}],
        "notices": [],
        "frames": frames,
    }
