"""Other people's generation beside ours: greedy, on the same weights, in turn."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import nanogpt
from benchmarks.runs import seconds_of
from benchmarks.table import Row
from model import GPT
from sampling.decode import Decoder

Generate = Callable[[Tensor, int], Tensor]  # a prompt (1, T), how many tokens to add -> (1, n)
ROUNDS = 3
CHECKED = 8  # tokens on which all sides must agree
TOKENS = {"nanogpt": 4, "transformers": 12, "ours": 24}  # that are timed in a turn, of seconds


def race(
    model: GPT, ours: dict[Any, GPT], peers: tuple[str, ...], prompts: list[list[int]]
) -> list[Row]:
    """Return a row per side and prompt: its tokens/s, also as a multiple of each peer's.

    `ours` has the model in each precision. Raises ValueError unless all sides choose the same
    tokens in float32.
    """
    if model.config.is_modern:
        raise ValueError("peers need a model of GPT-2's architecture, such as --models 124M")
    theirs = {peer.partition("=")[0]: generate_of(peer, model) for peer in peers}
    own = {f"ours, {kind}": our_generate(converted) for kind, converted in ours.items()}
    rows: list[Row] = []
    for prompt in prompts:
        prompt_1T = torch.tensor([prompt], device=model.wte.weight.device)
        for name, generate in theirs.items():
            agree(name, generate(prompt_1T, CHECKED), own["ours, float32"](prompt_1T, CHECKED))
        speeds = take_turns(theirs | own, prompt_1T)
        for side, speed in speeds.items():
            row: Row = {"prompt": len(prompt), "side": side, "tokens/s": speed}
            rows.append(row | {f"times {name}": speed / speeds[name] for name in theirs})
    return rows


def take_turns(sides: dict[str, Generate], prompt_1T: Tensor) -> dict[str, float]:
    """Return the tokens/s of each side after the first token, from a few rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, generate in sides.items():
            n = TOKENS[name.partition(",")[0]]
            first = seconds_of(lambda g=generate: g(prompt_1T, 1).tolist())
            whole = seconds_of(lambda g=generate, n=n: g(prompt_1T, 1 + n).tolist())
            seconds[name].append((whole - first) / n)
    return {name: 1 / statistics.median(values) for name, values in seconds.items()}


def agree(name: str, theirs_1T: Tensor, ours_1T: Tensor) -> None:
    """Raise ValueError unless the same tokens were chosen."""
    if not torch.equal(theirs_1T, ours_1T):
        got, own = theirs_1T[0].tolist(), ours_1T[0].tolist()
        raise ValueError(f"{name} must choose the tokens that ours does: got {got}, ours are {own}")


def our_generate(model: GPT) -> Generate:
    def generate(prompt_1T: Tensor, n: int) -> Tensor:
        decoder = Decoder(model, prompt_1T.tolist(), n)
        tokens = [decoder.read().argmax(-1)]
        while len(tokens) < n:
            tokens.append(decoder.feed(tokens[-1]).argmax(-1))
        return torch.stack(tokens, dim=1)

    return generate


def generate_of(peer: str, ours: GPT) -> Generate:
    """Return the method of a peer, `nanogpt=CHECKOUT` or `transformers`, with our weights."""
    config, state = ours.config, ours.state_dict()
    head_VC = state.pop("lm_head.weight")
    named = {f"transformer.{name.replace('blocks.', 'h.')}": w for name, w in state.items()}
    weights = named | {"lm_head.weight": head_VC}  # as OpenAI named them
    sizes: dict[str, Any] = {"n_layer": config.n_layer, "n_head": config.n_head}
    sizes |= {"n_embd": config.n_embd, "vocab_size": config.vocab_size}
    if peer == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        theirs: Any = GPT2LMHeadModel(GPT2Config(n_positions=config.context_length, **sizes))
        linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # kept as (in, out)
        weights = {name: w.T if name.endswith(linear) else w for name, w in weights.items()}
        theirs.generation_config.eos_token_id = None
        how = {"do_sample": False, "pad_token_id": 0}
    else:
        sizes |= {"block_size": config.context_length, "dropout": 0.0, "bias": True}
        theirs = nanogpt.build(Path(peer.removeprefix("nanogpt=")), **sizes)
        how = {"top_k": 1}  # its way to be greedy
    theirs.load_state_dict(weights)
    theirs = theirs.to(ours.wte.weight.device).eval()
    return lambda prompt_1T, n: theirs.generate(prompt_1T, max_new_tokens=n, **how)[:, -n:]
