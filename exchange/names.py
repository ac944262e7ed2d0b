"""Weights under the names of the Hugging Face hub: gpt2 is GPT2LMHeadModel, modern is Qwen3.

GPT-2's tensors have the names of OpenAI's own file, without `transformer.`: all readers know these.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model import GPT, ModelConfig, require

QWEN3 = {  # our layer -> its name in Qwen3; c_attn is three layers there
    "wte": ("model.embed_tokens",),
    "ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_gate": ("mlp.gate_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
MOST_LAYERS = 1000  # so that a damaged file does not build layers for hours
IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # constants in old files
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 keeps these as (in, out)


def hub_names(name: str, config: ModelConfig) -> list[str]:
    """blocks.0.ln_1.weight -> [h.0.ln_1.weight] or [model.layers.0.input_layernorm.weight]."""
    if not config.is_modern:
        return [name.replace("blocks.", "h.")]
    layer, _, kind = name.rpartition(".")
    before = ""
    if layer.startswith("blocks."):
        _, number, layer = layer.split(".", maxsplit=2)
        before = f"model.layers.{number}."
    return [f"{before}{theirs}.{kind}" for theirs in QWEN3[layer]]


def to_hub(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a GPT under the hub's names; a tied head is left out."""
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        theirs = tensor.T if is_transposed(name, config) else tensor
        names = hub_names(name, config)
        parts = queries_keys_values(theirs, config) if len(names) > 1 else (theirs,)
        weights |= zip(names, parts, strict=True)
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def queries_keys_values(c_attn: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """Cut the rows of c_attn's weight into those of queries, keys and values."""
    kv = config.n_kv_head * config.head_dim
    return c_attn.split([config.n_head * config.head_dim, kv, kv])


def from_hub(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a GPT in float32. Raises ValueError if the tensors are not its own."""
    left = {
        name.removeprefix("transformer."): tensor
        for name, tensor in weights.items()
        if not name.endswith(IGNORED)
    }
    state: dict[str, Tensor] = {}
    for name in shapes_of(config):
        found = [left.pop(theirs) for theirs in hub_names(name, config) if theirs in left]
        if found:
            tensor = torch.cat(found)
            state[name] = tensor.T if is_transposed(name, config) else tensor
    return checked(config, state | left)


def checked(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in float32. Raises ValueError unless they are those of such a model."""
    weights = dict(state)
    expected = shapes_of(config)
    if config.tie_embeddings and "wte.weight" in weights:
        head = weights.setdefault("lm_head.weight", weights["wte.weight"])
        is_same = torch.equal(head, weights["wte.weight"])
        require(is_same, "the config ties the head to the embedding, but the two differ")
    missing = [name for name in expected if name not in weights]
    require(not missing, f"the weights lack {', '.join(missing[:5])}")
    others = sorted(weights.keys() - expected.keys())
    require(not others, f"the weights hold what a GPT lacks: {', '.join(others[:5])}")
    for name, shape in expected.items():
        found = tuple(weights[name].shape)
        require(found == shape, f"{name} must have the shape {shape}: got {found}")
        nbytes = weights[name].untyped_storage().nbytes()
        require(weights[name].nbytes <= nbytes, f"{name} has fewer numbers than its shape {shape}")
    return {name: weights[name].float().contiguous() for name in expected}


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a GPT, by its name. Raises ValueError if there is none."""
    require(config.n_layer <= MOST_LAYERS, f"n_layer must be at most {MOST_LAYERS:,}: got {config}")
    try:
        with torch.device("meta"):
            return {name: tuple(weight.shape) for name, weight in GPT(config).state_dict().items()}
    except (RuntimeError, TypeError) as error:  # more numbers than can be counted, or no numbers
        raise ValueError(f"no model has the sizes of {config}") from error


def is_transposed(name: str, config: ModelConfig) -> bool:
    return not config.is_modern and name.endswith(TRANSPOSED)
