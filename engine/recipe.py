"""One dial: the sizes of model and dataset say how long to train, on how much, and how fast.

The formulas hold for the `modern` architecture with Muon; config/modern.toml uses them all.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

# Compute is spent best at 20 tokens per parameter (Hoffmann et al., 2022, sec. 3), and up to
# 4 epochs repeated text is worth almost as much as new text (Muennighoff et al., 2023, sec. 5).
TOKENS_PER_PARAMETER = 20
EPOCHS = 4
# The best batch grows as tokens^(2/3): nanochat's 2^19 tokens a step for GPT-2 124M trained on
# 2.5 billion, and the best of our own runs on 0.14 and 1.6 million, 768 and 4,096 (docs/recipe.md)
BATCH_TOKENS, AT_TOKENS, EXPONENT = 2**19, 2.5e9, 2 / 3


@dataclass(frozen=True)
class Plan:
    """What a run does if it is not told otherwise."""

    max_steps: int
    batch_size: int
    """Sequences a step."""
    rate_scale: float
    """Multiplies all learning rates: the root of how far the batch is from the best one, as the
    noise of a gradient falls with the root of the batch (Malladi et al., 2022)."""


def complete(config: Any, model: nn.Module, n_tokens: int) -> Any:
    """Fill in what a TrainConfig leaves open, for this model and a dataset of so many tokens."""
    asked = {"max_steps": config.max_steps, "batch_size": config.batch_size}
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    found = plan(n_parameters, n_tokens, config.model.context_length, **asked)
    optim = config.optim.with_rates(found.rate_scale)
    steps = {"max_steps": found.max_steps, "batch_size": found.batch_size}
    return replace(config, model=model.config, optim=optim, **steps)


def plan(
    n_parameters: int, n_tokens: int, context_length: int, max_steps: int = 0, batch_size: int = 0
) -> Plan:
    """Plan a run of a model with so many parameters on a dataset with so many tokens.

    Steps and sequences a step that are given, not 0, stay; the other follows from them.
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
    """Tokens a step at which a run over so many tokens ends at the lowest loss."""
    return BATCH_TOKENS * (n_tokens / AT_TOKENS) ** EXPONENT
