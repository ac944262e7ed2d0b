"""Other people's generation, by their own methods, with the weights of a model of ours."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.nanogpt import import_model
from model import GPT

Tick = Callable[[], None]  # called after each token
Generate = Callable[[Tensor, int, Tick], Tensor]  # a prompt (1, T), and how many tokens to add
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size")  # as both call them, too


def nanogpt_generate(checkout: Path, ours: GPT) -> Generate:
    """Its own method, a token at a time: it keeps nothing from one to the next."""
    module, config = import_model(checkout), ours.config
    sizes: dict[str, Any] = {name: getattr(config, name) for name in SIZES}
    sizes |= {"block_size": config.context_length, "dropout": 0.0, "bias": True}
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
        model: Any = module.GPT(module.GPTConfig(**sizes))
    model.load_state_dict(named_as_theirs(ours))
    model = model.to(ours.wte.weight.device).eval()

    def generate(prompt_1T: Tensor, n: int, tick: Tick) -> Tensor:
        ids_1T = prompt_1T
        for _ in range(n):
            ids_1T = model.generate(ids_1T, 1, top_k=1)  # its way to be greedy
            tick()
        return ids_1T[:, -n:]

    return generate


def transformers_generate(ours: GPT) -> Generate:
    """Its own method, with the cache that it has by default."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise ValueError(f"transformers is not here: pip install transformers ({error})") from error
    config = ours.config
    sizes: dict[str, Any] = {name: getattr(config, name) for name in SIZES}
    model: Any = GPT2LMHeadModel(GPT2Config(n_positions=config.context_length, **sizes))
    weights = named_as_theirs(ours)
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    # its linear layers keep their weights as (in, out), as OpenAI's did
    model.load_state_dict({k: w.T if k.endswith(linear) else w for k, w in weights.items()})
    model = model.to(ours.wte.weight.device).eval()
    model.generation_config.eos_token_id = None

    def generate(prompt_1T: Tensor, n: int, tick: Tick) -> Tensor:
        def never(ids_1T: Tensor, scores_1V: Tensor, **_: Any) -> Tensor:
            tick()
            return ids_1T.new_zeros(len(ids_1T), dtype=torch.bool)

        settings = {"max_new_tokens": n, "do_sample": False, "stopping_criteria": [never]}
        mask_1T = torch.ones_like(prompt_1T)
        ids_1T = model.generate(prompt_1T, attention_mask=mask_1T, pad_token_id=0, **settings)
        return ids_1T[:, -n:]

    return generate


def named_as_theirs(ours: GPT) -> dict[str, Tensor]:
    """`blocks.0.ln_1.weight` -> `transformer.h.0.ln_1.weight`, as OpenAI named them."""
    weights = {
        f"transformer.{name.replace('blocks.', 'h.')}": weight
        for name, weight in ours.state_dict().items()
        if not name.startswith("lm_head.")
    }
    return weights | {"lm_head.weight": ours.lm_head.weight.detach()}
