"""Plan a run from the sizes of its model and dataset: steps, batch size and learning rates.

The formulas hold for the `modern` architecture with Muon; config/modern.toml uses them all.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.count import count_parameters
from engine.device import choose_precision, memory_bytes
from engine.parallel import World
from model import GPT, ModelConfig, require

# Compute is best spent at 20 tokens per parameter (Hoffmann et al., 2022, sec. 3), and repeated
# text is worth almost as much as new text up to 4 epochs (Muennighoff et al., 2023, sec. 5).
TOKENS_PER_PARAMETER = 20
EPOCHS = 4
MEMORISED = 4.0  # repeats x weights per token beyond which dropout and decay pay (docs/recipe.md)
LEAST_DROPOUT = 0.1
MOST_DROPOUT = 0.5
DROPOUT_PER_BYTE = 0.008  # of a token
MOST_BYTES = 4.0  # as letters that take two bytes bear no more of it
DECAY = 0.1
# The best batch grows as tokens^(2/3), through nanochat's for GPT-2 124M (docs/recipe.md)
BATCH_TOKENS = 2**19
AT_TOKENS = 2.5e9
EXPONENT = 2 / 3
LAW = (0.487, 0.498, 0.266, 0.528, 0.402)  # a, b, c, α and β of `expected_loss`
REPEATS = 1.0  # R* of Muennighoff et al., 2023, sec. 5, in our small models (docs/recipe.md)
ERROR = 0.09  # of the expected loss, typical for a text that is not in the fit (docs/recipe.md)
EVAL_EVERY = 250  # steps
LEAST_LAYERS = 2  # a single one cannot find what followed earlier (Elhage et al., 2021)
# Tokens in one pass on a CPU: few fit its caches, but in bfloat16 calls count more. A GPU takes as
# many as fit in a part of its memory (measured: 25 to 50 bytes for each channel of each layer)
TOKENS_AT_ONCE = {"float32": 1024, "bfloat16": 4096}
BYTES_PER_CHANNEL = 100
MEMORY_SHARE = 0.4


@dataclass(frozen=True)
class Plan:
    """What a run does unless it is told otherwise."""

    max_steps: int
    batch_size: int
    """Sequences per step."""
    rate_scale: float
    """Factor of all learning rates: the square root of batch size / best batch size, as the noise
    of a gradient falls with the root of the batch size (Malladi et al., 2022)."""


@dataclass(frozen=True)
class Pilot:
    """What a small model showed of a text. Its numbers may be tensors, for a fit."""

    product_weights: Any
    n_tokens: Any
    loss: Any  # validation loss in nats per token
    hardness: Any


def complete(asked: Any, model: GPT, n_tokens: int, world: World) -> Any:
    """Fill in the sizes, rates and precision that a config leaves to the recipe.

    They follow from the model, the number of training tokens, and the machine. Raises ValueError
    if a size cannot be used.
    """
    require(asked.eval_tokens != 1, "eval_tokens must be 0 or at least 2: got 1")
    n_parameters = count_parameters(model)["total"]
    context_length = model.config.context_length
    found = plan(n_parameters, n_tokens, context_length, asked.max_steps, asked.batch_size)
    share = max(1, found.batch_size // world.size)
    precision = choose_precision(asked.precision, world.device)
    passes = math.ceil(share / rows_at_once(model.config, world.device, precision))
    return replace(
        asked,
        max_steps=found.max_steps,
        batch_size=found.batch_size,
        micro_batch_size=min(asked.micro_batch_size or math.ceil(share / passes), share),
        eval_every=asked.eval_every or EVAL_EVERY,
        precision=precision,
        model=model.config,
        optim=asked.optim.with_rates(found.rate_scale),
    )


def rows_at_once(config: ModelConfig, device: torch.device, precision: str) -> int:
    """Return how many sequences one pass takes."""
    tokens = TOKENS_AT_ONCE[precision]
    if device.type != "cpu":
        bytes_per_token = BYTES_PER_CHANNEL * config.n_embd * config.n_layer
        tokens = int(MEMORY_SHARE * memory_bytes(device)) // bytes_per_token
    return max(1, tokens // config.context_length)


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
    batch_size = batch_size or planned_batch(budget, context_length)
    max_steps = max_steps or max(1, round(budget / (batch_size * context_length)))
    return Plan(max_steps, batch_size, math.sqrt(batch_size * context_length / best))


def sizes(asked: ModelConfig, most_layers: int) -> list[ModelConfig]:
    """Return the models to choose from: of each depth the usual width, and 64 channels more."""
    layers = [asked.n_layer] if asked.n_layer else range(LEAST_LAYERS, most_layers + 1)
    usual = [replace(asked, n_layer=n) for n in layers]
    if asked.n_embd or asked.n_head:
        return usual
    return [replace(m, n_embd=C) for m in usual for C in (0, m.sized().n_embd + 64)]


def planned_batch(n_tokens: float, context_length: int) -> int:
    """Return the sequences per step, a power of two, of a run over so many tokens."""
    return max(1, 2 ** round(math.log2(best_batch(n_tokens) / context_length)))


def expected_loss(
    pilot: Pilot, n_weights: Any, n_tokens: Any, n_unique: Any, law: Any = LAW
) -> torch.Tensor:
    """Return the validation loss to expect of a run, in nats per token.

    L = L₀ (1 - s (1 - r / r₀)), where L₀ is the loss of a pilot, and s = a + b ln(L₀ / h) the share
    of it that training can take away from a text of hardness h. r = c N^-α + D^-β (Hoffmann et al.,
    2022, eq. 2), with N million weights in products and D million tokens, and r₀ is the pilot's.
    Repeated tokens count less (Muennighoff et al., 2023, eq. 5).
    """
    a, b, c, alpha, beta = law
    epochs = torch.as_tensor(n_tokens / n_unique)
    forgone = torch.exp((1 - epochs).clamp(max=0) / REPEATS)
    worth = n_unique * (epochs.clamp(max=1) + REPEATS * (1 - forgone))

    def reducible(n_weights: Any, n_tokens: Any) -> Any:
        return c * (n_weights / 1e6) ** -alpha + (n_tokens / 1e6) ** -beta

    share = (a + b * torch.as_tensor(pilot.loss / pilot.hardness).log()).clamp(0.0, 0.95)
    r0 = reducible(pilot.product_weights, pilot.n_tokens)
    return pilot.loss * (1 - share * (1 - reducible(n_weights, worth) / r0))


def regularisation(
    n_weights: int, n_tokens: int, n_unique: int, bytes_per_token: float
) -> tuple[float, float]:
    """Return dropout and Muon's decay: they pay where many weights see few tokens many times."""
    memorised = (n_tokens / n_unique - 1) * n_weights / n_unique
    if memorised <= MEMORISED:
        return 0.0, 0.0
    dropout = DROPOUT_PER_BYTE * min(bytes_per_token, MOST_BYTES) * math.sqrt(memorised)
    return round(min(max(dropout, LEAST_DROPOUT), MOST_DROPOUT), 2), DECAY


def best_batch(n_tokens: float) -> float:
    """Return the tokens per step at which a run over so many tokens ends at the lowest loss."""
    return BATCH_TOKENS * (n_tokens / AT_TOKENS) ** EXPONENT
