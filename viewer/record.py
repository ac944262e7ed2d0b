"""Run a model and keep what its attention computed, which fused kernels never return."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from model import GPT, CausalSelfAttention, attention


@dataclass(frozen=True)
class Record:
    """One pass through a model, with L layers; S = T, as each position also answers."""

    q_LBHTD: Tensor  # ready for attention: normed and turned where the model does so
    k_LBHTD: Tensor
    v_LBHTD: Tensor
    weights_LBHTS: Tensor
    heads_LBHTD: Tensor  # what each head read, before c_proj mixes the heads
    logits_BTV: Tensor


@torch.inference_mode()
def record(model: GPT, tokens_BT: Tensor) -> Record:
    """Run `model` and keep all heads. Its own forward pass is used, so its logits are unchanged."""
    kept: list[tuple[Tensor, ...]] = []
    heads: list[Tensor] = []

    def keep(attn: CausalSelfAttention, inputs: tuple) -> None:
        q_BHTD, *shared = attn.queries_keys_values(*inputs[:2])
        # Heads may share keys and values (Ainslie et al., 2023): here each has them to itself
        k_BHTD, v_BHTD = (t.repeat_interleave(q_BHTD.shape[1] // t.shape[1], 1) for t in shared)
        kept.append((q_BHTD, k_BHTD, v_BHTD, attention(q_BHTD, k_BHTD, v_BHTD, causal=True)[1]))

    def keep_heads(c_proj: nn.Module, inputs: tuple[Tensor]) -> None:
        heads.append(by_head(inputs[0], model.config.n_head).transpose(1, 2))

    with ExitStack() as hooks:
        for layer in range(model.config.n_layer):
            attn = model.get_submodule(f"blocks.{layer}.attn")
            hooks.enter_context(attn.register_forward_pre_hook(keep))
            hooks.enter_context(attn.get_submodule("c_proj").register_forward_pre_hook(keep_heads))
        logits_BTV = model(tokens_BT)
    q, k, v, weights = (torch.stack(layers) for layers in zip(*kept, strict=True))
    return Record(q, k, v, weights, torch.stack(heads), logits_BTV)


def by_head(y_BTC: Tensor, n_head: int) -> Tensor:
    """(B, T, C) -> (B, T, H, D): the input of c_proj is one head's output after another."""
    return y_BTC.unflatten(-1, (n_head, -1))


def switch_off(model: GPT, layer: int, head: int) -> RemovableHandle:
    """Let a head pass on zeros: `with switch_off(model, 0, 3): ...` (Olsson et al., 2022)."""

    def zero(c_proj: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        heads_BTHD = by_head(inputs[0].clone(), model.config.n_head)
        heads_BTHD[:, :, head] = 0
        return (heads_BTHD.flatten(2),)

    c_proj = model.get_submodule(f"blocks.{layer}.attn.c_proj")
    return c_proj.register_forward_pre_hook(zero)


def token_losses(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """-ln p of each token's successor, in nats (B, T - 1)."""
    return F.cross_entropy(logits_BTV[:, :-1].mT.float(), tokens_BT[:, 1:], reduction="none")


@torch.inference_mode()
def losses(model: GPT, tokens_BT: Tensor) -> Tensor:
    """The loss of each token but the first (B, T - 1)."""
    return token_losses(model(tokens_BT), tokens_BT)


def costs(model: GPT, tokens_BT: Tensor) -> Tensor:
    """By how much each loss rises when one head is switched off (L, H, B, T - 1): a pass a head."""
    before_Bt, n_head = losses(model, tokens_BT), model.config.n_head
    costs_LHBt = before_Bt.new_empty((model.config.n_layer, n_head, *before_Bt.shape))
    for layer in range(model.config.n_layer):
        for head in range(n_head):
            with switch_off(model, layer, head):
                costs_LHBt[layer, head] = losses(model, tokens_BT) - before_Bt
    return costs_LHBt
