"""Plan a run from the sizes of its model and dataset: steps, batch size and learning rates.

The formulas hold for the `modern` architecture with Muon; config/modern.toml uses them all.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from engine.device import choose_precision
from engine.parallel import World
from engine.report import count_parameters
from model import GPT

# Compute is best spent at 20 tokens per parameter (Hoffmann et al., 2022, sec. 3), and repeated
# text is worth almost as much as new text up to 4 epochs (Muennighoff et al., 2023, sec. 5).
TOKENS_PER_PARAMETER = 20
EPOCHS = 4
# The best batch grows as tokens^(2/3). This fits nanochat's 2^19 tokens a step for 2.5 billion
# (GPT-2 124M), and our best runs: 768 for 0.14 million, 4,096 for 1.6 million (docs/recipe.md)
BATCH_TOKENS = 2**19
AT_TOKENS = 2.5e9
EXPONENT = 2 / 3


@dataclass(frozen=True)
class Plan:
    """What a run does unless it is told otherwise."""

    max_steps: int
    batch_size: int
    """Sequences per step."""
    rate_scale: float
    """Factor of all learning rates: the square root of batch size / best batch size, as the noise
    of a gradient falls with the root of the batch size (Malladi et al., 2022)."""


def complete(asked: Any, model: GPT, n_tokens: int, world: World) -> Any:
    """Fill in the sizes, rates and precision that a config leaves to the recipe.

    They follow from the model, the number of training tokens, and the machine.
    """
    n_parameters = count_parameters(model)["total"]
    context_length = model.config.context_length
    found = plan(n_parameters, n_tokens, context_length, asked.max_steps, asked.batch_size)
    share = max(1, found.batch_size // world.size)
    return replace(
        asked,
        max_steps=found.max_steps,
        batch_size=found.batch_size,
        micro_batch_size=min(asked.micro_batch_size or share, share),
        precision=choose_precision(asked.precision, world.device),
        model=model.config,
        optim=asked.optim.with_rates(found.rate_scale),
    )


def plan(
    n_parameters: int, n_tokens: int, context_length: int, max_steps: int = 0, batch_size: int = 0
) -> Plan:
    """Plan a run from its number of parameters and of training tokens.

    A `max_steps` or `batch_size` other than 0 is kept, and the other value follows from it.
    """
    budget = min(TOKENS_PER_PARAMETER * n_parameters, EPOCHS * n_tokens)
    if max_steps and batch_size:
        budget = max_steps * batch_size * context_length
    elif max_steps:  # b = best(steps b), solved for b
        budget = max_steps * BATCH_TOKENS**3 * (max_steps / AT_TOKENS) ** 2
    best = best_batch(budget)
    batch_size = batch_size or max(1, 2 ** round(math.log2(best / context_length)))
    max_steps = max_steps or max(1, round(budget / (batch_size * context_length)))
    return Plan(max_steps, batch_size, math.sqrt(batch_size * context_length / best))


def best_batch(n_tokens: float) -> float:
    """Return the tokens per step at which a run over so many tokens ends at the lowest loss."""
    return BATCH_TOKENS * (n_tokens / AT_TOKENS) ** EXPONENT
