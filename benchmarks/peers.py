"""Other people's generation beside ours: greedy, on the same weights, in turn."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import llamacpp, nanogpt
from benchmarks.runs import seconds_of
from benchmarks.table import Row
from model import GPT
from sampling.decode import Decoder
from sampling.precision import SamplePrecision

# A prompt (1, T), how many tokens to add -> these (1, n), and the seconds of each but the first
Generate = Callable[[Tensor, int], tuple[Tensor, float]]
ROUNDS = 3
CHECKED = 8  # tokens on which all sides must agree in float32
TOKENS = {"nanogpt": 4, "transformers": 12}  # that are timed in a turn, of seconds
MOST_TOKENS = 24
FLOAT32 = ("nanogpt", "transformers", "llamacpp f32")
AGAINST: dict[SamplePrecision, tuple[str, ...]] = {  # whom each of our precisions meets
    "float32": FLOAT32,
    "float16": ("llamacpp f16", "llamacpp bf16"),
    "bfloat16": ("llamacpp f16", "llamacpp bf16"),
    "int8": ("llamacpp q8_0",),
}


def race(
    model: GPT, ours: dict[SamplePrecision, GPT], peers: tuple[str, ...], prompts: list[list[int]]
) -> list[Row]:
    """Return a row for each prompt, precision and side that it meets, with the tokens/s of both.

    `ours` has the model in each precision. Raises ValueError unless all sides choose the same
    tokens in float32.
    """
    if model.config.is_modern:
        raise ValueError("peers need a model of GPT-2's architecture, such as --models 124M")
    own: dict[str, Generate] = {kind: our_generate(converted) for kind, converted in ours.items()}
    rows: list[Row] = []
    with ExitStack() as servers:
        theirs = sides_of(peers, model, servers)
        for prompt in prompts:
            prompt_1T = torch.tensor([prompt], device=model.wte.weight.device)
            for name in theirs.keys() & set(FLOAT32):
                written = (side(prompt_1T, CHECKED)[0] for side in (theirs[name], own["float32"]))
                agree(name, *written)
            speeds = take_turns(theirs | own, prompt_1T)
            meetings = [(kind, side) for kind in ours for side in AGAINST[kind] if side in theirs]
            for kind, side in meetings:
                row: Row = {"prompt": len(prompt), "precision": kind, "tokens/s": speeds[kind]}
                row |= {"side": side, "its tokens/s": speeds[side]}
                rows.append(row | {"times": speeds[kind] / speeds[side]})
    return rows


def sides_of(peers: tuple[str, ...], model: GPT, servers: ExitStack) -> dict[str, Generate]:
    """Return how each side writes; llama.cpp is one for each type of weights."""
    sides: dict[str, Generate] = {}
    for peer in peers:
        if peer == "llamacpp":
            for kind in ("f32", "f16", "bf16", "q8_0"):
                server = servers.enter_context(llamacpp.serve(model, kind))
                sides[f"llamacpp {kind}"] = server.generate
        else:
            sides[peer.partition("=")[0]] = their_generate(peer, model)
    return sides


def take_turns(sides: dict[str, Generate], prompt_1T: Tensor) -> dict[str, float]:
    """Return the tokens/s of each side after the first token, from a few rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, generate in sides.items():
            seconds[name].append(generate(prompt_1T, 1 + TOKENS.get(name, MOST_TOKENS))[1])
    return {name: 1 / statistics.median(values) for name, values in seconds.items()}


def agree(name: str, theirs_1T: Tensor, ours_1T: Tensor) -> None:
    """Raise ValueError unless the same tokens were chosen."""
    if not torch.equal(theirs_1T, ours_1T):
        got, own = theirs_1T[0].tolist(), ours_1T[0].tolist()
        raise ValueError(f"{name} must choose the tokens that ours does: got {got}, ours are {own}")


def our_generate(model: GPT) -> Generate:
    def generate(prompt_1T: Tensor, n: int) -> tuple[Tensor, float]:
        decoder = Decoder(model, prompt_1T.tolist(), n)
        tokens = [decoder.read().argmax(-1)]
        tokens[0].item()  # which waits for a GPU
        started_at = time.perf_counter()
        while len(tokens) < n:
            tokens.append(decoder.feed(tokens[-1]).argmax(-1))
        tokens[-1].item()
        return torch.stack(tokens, dim=1), (time.perf_counter() - started_at) / max(1, n - 1)

    return generate


def their_generate(peer: str, ours: GPT) -> Generate:
    """Time a peer, whose method tells nothing of the first token, as a difference."""
    method = generate_of(peer, ours)

    def generate(prompt_1T: Tensor, n: int) -> tuple[Tensor, float]:
        first = seconds_of(lambda: method(prompt_1T, 1).tolist())
        started_at = time.perf_counter()
        tokens_1T = method(prompt_1T, n)
        whole = time.perf_counter() - started_at
        return tokens_1T, (whole - first) / max(1, n - 1)

    return generate


def generate_of(peer: str, ours: GPT) -> Callable[[Tensor, int], Tensor]:
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
