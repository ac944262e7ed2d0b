"""The architecture of a model as config.json, which transformers, vLLM and others build it from."""

from typing import Any

from data.tokenizer import Tokenizer
from model import ModelConfig, require

DEFAULTS: dict[str, dict[str, Any]] = {  # of transformers' classes, which leave them out
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_parameters": {},
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
}
FIXED = {  # what model.py cannot do in another way than these defaults
    "gpt2": (
        *("activation_function", "layer_norm_epsilon", "scale_attn_weights"),
        *("scale_attn_by_inverse_layer_idx", "add_cross_attention", "tie_word_embeddings"),
    ),
    "qwen3": ("hidden_act", "rms_norm_eps", "rope_scaling", "attention_bias", "use_sliding_window"),
}


def to_json(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return config.json. Some fields are there twice, because readers differ in their names."""
    end = tokenizer.end_of_text
    shared = {"vocab_size": config.vocab_size, "bos_token_id": end, "eos_token_id": end}
    shared |= {"tie_word_embeddings": config.tie_embeddings, "dtype": "float32"}
    if not config.is_modern:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": config.context_length,
            "n_ctx": config.context_length,  # for llama.cpp and mlx-lm
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.n_inner,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
            **shared,
        }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": config.context_length,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": config.rope_theta,  # for transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "use_sliding_window": False,
        **shared,
    }


def from_json(found: dict[str, Any]) -> ModelConfig:
    """Return the architecture of a config.json. Raises ValueError if it is not one of ours."""
    kind = found["model_type"]
    require(kind in DEFAULTS, f"model_type must be gpt2 or qwen3: got {kind}")
    found = DEFAULTS[kind] | found
    for key in FIXED[kind]:
        value = DEFAULTS[kind][key]
        require(found[key] == value, f"{key} must be {value}: got {found[key]}")
    if kind == "gpt2":
        return ModelConfig(
            vocab_size=found["vocab_size"],
            context_length=found["n_positions"],
            n_layer=found["n_layer"],
            n_head=found["n_head"],
            n_embd=found["n_embd"],
            n_inner=found["n_inner"] or 0,
            dropout=found["resid_pdrop"],
        ).sized()
    rope = {"rope_type": "default", "rope_theta": found["rope_theta"]} | found["rope_parameters"]
    require(rope["rope_type"] == "default", f"rope_type must be default: got {rope['rope_type']}")
    is_tied = found["tie_word_embeddings"]
    require(isinstance(is_tied, bool), f"tie_word_embeddings must be true or false: got {is_tied}")
    return ModelConfig(
        architecture="modern",
        vocab_size=found["vocab_size"],
        context_length=found["max_position_embeddings"],
        n_layer=found["num_hidden_layers"],
        n_head=found["num_attention_heads"],
        n_kv_head=found["num_key_value_heads"],
        n_embd=found["hidden_size"],
        head_dim=found["head_dim"],
        n_inner=found["intermediate_size"],
        dropout=found["attention_dropout"],
        tie_embeddings=is_tied,
        rope_theta=float(rope["rope_theta"]),
    ).sized()
