"""How many parameters and operations a model has, and how many a GPU can do."""

import re

from torch import nn

from model import ModelConfig

# FLOP/s of dense bfloat16 matrix products, from NVIDIA's data sheets, by the name that torch gives;
# unlisted variants have clocks of their own, so their MFU is not reported
PEAK_FLOPS = {
    r"A100\b.*": 312e12,
    r"H100 80GB HBM3": 989e12,  # SXM
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H200": 989e12,
    r"L4": 121e12,
    r"L40S": 362e12,
    r"GeForce RTX 4090": 165e12,
}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters by part, and their total; a tied head counts as 0."""
    parts = {  # the first that fits, so that attn.q_norm is a norm
        "norms": ("norm.", "ln_"),
        "embeddings": ("wte", "wpe"),
        "attention": ("attn",),
        "mlp": ("mlp",),
        "head": ("lm_head",),
    }
    counts = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        part = next(part for part, pieces in parts.items() if any(p in name for p in pieces))
        counts[part] += parameter.numel()
    return counts | {"total": sum(counts.values())}


def product_weights(config: ModelConfig) -> int:
    """Return the number of weights in matrix products: those of the blocks and of the head."""
    config = config.sized()
    C, HD, KD = config.n_embd, *(n * config.head_dim for n in (config.n_head, config.n_kv_head))
    mlp = (3 if config.is_modern else 2) * C * config.n_inner
    per_layer = C * (HD + 2 * KD) + HD * C + mlp
    return config.n_layer * per_layer + C * config.vocab_size  # a tied head multiplies, too


def flops_per_token(config: ModelConfig) -> int:
    """Return the operations of a forward and a backward pass (Chowdhery et al., 2022, app. B).

    6 per weight of a matrix product, the output head included, and 12 per channel of a query and
    position of the context, masked or not.
    """
    config = config.sized()
    channels = config.n_layer * config.n_head * config.head_dim
    return 6 * product_weights(config) + 12 * channels * config.context_length


def peak_flops(device_name: str, precision: str = "bfloat16") -> float | None:
    """Return what a GPU can do at most per second; None if no data sheet is listed for it."""
    if precision != "bfloat16":
        return None
    name = device_name.removeprefix("NVIDIA ")
    found = (peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name))
    return next(found, None)
