"""Run a model and keep what its attention computed, which fused kernels never return."""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from model import GPT, CausalSelfAttention, ModelConfig, attention, repeat_heads

MOST_LAYERS = MOST_HEADS = 12  # a page with so many of 256 tokens opens in a few seconds
SLOW = 5  # seconds, after which a bar is drawn


@dataclass(frozen=True)
class Record:
    """One forward pass through L layers, with S = T. Heads that share keys have a copy each."""

    q_LBHTD: Tensor  # as attention takes them: a modern model has normalised and rotated them
    k_LBHSD: Tensor
    v_LBHSD: Tensor
    weights_LBHTS: Tensor
    y_LBHTD: Tensor  # the output of each head, before c_proj mixes the heads
    logits_BTV: Tensor


@torch.inference_mode()
def record(model: GPT, tokens_BT: Tensor) -> Record:
    """Run the model's own forward pass, which stays as it is, and keep what its heads compute."""
    kept: list[tuple[Tensor, ...]] = []
    outputs: list[Tensor] = []

    def keep(attn: CausalSelfAttention, inputs: tuple) -> None:
        x, rope, mask, _ = inputs
        q_BHTD, k_BKSD, v_BKSD = attn.queries_keys_values(x, rope)
        weights_BHTS = attention(q_BHTD, k_BKSD, v_BKSD, mask)[1]
        k_BHSD, v_BHSD = (repeat_heads(shared, q_BHTD.shape[1]) for shared in (k_BKSD, v_BKSD))
        kept.append((q_BHTD, k_BHSD, v_BHSD, weights_BHTS))

    def keep_output(c_proj: nn.Module, inputs: tuple[Tensor]) -> None:
        outputs.append(by_head(inputs[0], model.config.n_head).transpose(1, 2))

    with ExitStack() as hooks:
        for layer in range(model.config.n_layer):
            attn = model.get_submodule(f"blocks.{layer}.attn")
            hooks.enter_context(attn.register_forward_pre_hook(keep))
            c_proj = attn.get_submodule("c_proj")
            hooks.enter_context(c_proj.register_forward_pre_hook(keep_output))
        logits_BTV = model(tokens_BT)
    stacked = (torch.stack(layers) for layers in (*zip(*kept, strict=True), outputs))
    q_LBHTD, k_LBHSD, v_LBHSD, weights_LBHTS, y_LBHTD = stacked
    return Record(q_LBHTD, k_LBHSD, v_LBHSD, weights_LBHTS, y_LBHTD, logits_BTV)


def by_head(y_BTC: Tensor, n_head: int) -> Tensor:
    """(B, T, C) -> (B, T, H, D): split the input of c_proj into the outputs of the heads."""
    return y_BTC.unflatten(-1, (n_head, -1))


def switch_off(model: GPT, layer: int, head: int) -> RemovableHandle:
    """Set a head's output to 0 in `with switch_off(model, 0, 3): ...` (Olsson et al., 2022)."""

    def zero(c_proj: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        y_BTHD = by_head(inputs[0].clone(), model.config.n_head)
        y_BTHD[:, :, head] = 0
        return (y_BTHD.flatten(2),)

    c_proj = model.get_submodule(f"blocks.{layer}.attn.c_proj")
    return c_proj.register_forward_pre_hook(zero)


@torch.inference_mode()
def losses(model: GPT, tokens_BT: Tensor) -> Tensor:
    """Return the loss of each token but the first (B, N), N = T - 1, in nats."""
    logits_BVN = model(tokens_BT)[:, :-1].mT
    return F.cross_entropy(logits_BVN.float(), tokens_BT[:, 1:], reduction="none")


def costs(model: GPT, tokens_BT: Tensor) -> Tensor:
    """Return by how much each loss rises without each head (L, H, B, N), one head at a time.

    It is nan for a head that a page does not show: this takes long in a large model.
    """
    before_BN = losses(model, tokens_BT)
    shape = (model.config.n_layer, model.config.n_head, *before_BN.shape)
    costs_LHBN = before_BN.new_full(shape, math.nan)
    heads = tqdm(shown_heads(model.config), "heads", leave=False, delay=SLOW, disable=None)
    for layer, head in heads:
        with switch_off(model, layer, head):
            costs_LHBN[layer, head] = losses(model, tokens_BT) - before_BN
    return costs_LHBN


def shown_heads(config: ModelConfig) -> list[tuple[int, int]]:
    """Return the layer and head of each map on a page."""
    layers = range(min(config.n_layer, MOST_LAYERS))
    return [(layer, head) for layer in layers for head in range(min(config.n_head, MOST_HEADS))]
