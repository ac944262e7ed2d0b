"""One token of each text through the whole model, in as few calls as it takes.

A step of a small model is mostly calls. On a CPU every one finds its code no longer in the
processor's cache, from which the weights have driven it out. Here is `GPT.features` for a single
new position, without modules between the operations.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT, Block, Cache, CausalSelfAttention, LayerNorm, Mask, RMSNorm
from sampling.cache import KVCache, cached_attention

Apply = Callable[[Tensor], Tensor]


class Parts(NamedTuple):
    """What a block computes, as functions that no module stands before."""

    norm_1: Apply
    queries_keys_values: Apply
    project: Apply
    norm_2: Apply
    mlp: Apply
    turn: Callable[[Tensor, Tensor, Tensor], Tensor] | None  # of queries and keys; modern only


def use_steps(model: GPT) -> None:
    """Let a model whose layers are final, in evaluation, take this way for single positions."""
    if type(model) is GPT:
        model.__class__ = SteppingGPT
        assert isinstance(model, SteppingGPT)
        model.parts = [parts_of(block) for block in model.blocks]
        model.last_norm = norm_of(model.ln_f)
        exponents_R = torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
        per_position_R = (model.config.rope_theta**-exponents_R).to(model.wte.weight.device)
        # sin(-a) = -sin(a) and cos(-a) = cos(a): so the sine has its sign
        model.angles_per_position_D = torch.cat((-per_position_R, per_position_R))


def parts_of(block: nn.Module) -> Parts:
    assert isinstance(block, Block)
    attention, mlp = block.attn, block.mlp
    fc, project = mlp.c_fc.forward, mlp.c_proj.forward
    gate = mlp.c_gate.forward if mlp.is_gated else None

    def of_mlp(x_BC: Tensor) -> Tensor:
        if gate is not None:
            return project(F.silu(gate(x_BC)).mul_(fc(x_BC)))
        return project(F.gelu(fc(x_BC), approximate="tanh"))

    return Parts(
        norm_1=norm_of(block.ln_1),
        queries_keys_values=attention.c_attn.forward,
        project=attention.c_proj.forward,
        norm_2=norm_of(block.ln_2),
        mlp=of_mlp,
        turn=turn_of(attention) if attention.config.is_modern else None,
    )


def norm_of(norm: nn.Module) -> Apply:
    if isinstance(norm, RMSNorm):
        return rms_norm_of(norm, norm.weight.detach())
    assert isinstance(norm, LayerNorm)
    weight, bias = norm.weight.detach(), norm.bias.detach()
    shape = weight.shape
    return partial(F.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=norm.eps)


def rms_norm_of(norm: RMSNorm, weight: Tensor) -> Apply:
    """Return x / RMS(x) ⊙ w over the last dimension of x; w may be that of several heads.

    On a CPU torch takes this apart into ten operations. √C / √(‖x‖² + C ε) is 1 / RMS(x), too.
    """
    C, eps = weight.shape[-1], norm.eps
    assert eps is not None
    if weight.is_cpu and weight.dtype != torch.bfloat16:
        scale, least = math.sqrt(C) * weight, weight.new_tensor(math.sqrt(C * eps))
        return lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(least) * scale
    if weight.ndim == 1:
        return partial(F.rms_norm, normalized_shape=(C,), weight=weight, eps=eps)
    return lambda x: F.rms_norm(x, (C,), eps=eps) * weight


class SteppingGPT(GPT):
    parts: list[Parts]
    last_norm: Apply
    angles_per_position_D: Tensor

    def features(
        self, tokens_BT: Tensor, cache: Cache | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Compute what `GPT.features` does, for one position in fewer calls."""
        if not isinstance(cache, KVCache) or tokens_BT.shape[1] > 1:
            return super().features(tokens_BT, cache, dtype)
        config = self.config
        positions_BT, mask = cache.place(1)
        x_BC = F.embedding(tokens_BT[:, 0], self.wte.weight)
        if not config.is_modern:
            x_BC = x_BC + F.embedding(positions_BT[:, 0], self.wpe.weight)
        angles: tuple[Tensor, ...] = ()  # cosine and sine for both halves of a head (B, 1, D)
        if config.is_modern:
            angles_B1D = positions_BT.float()[..., None] * self.angles_per_position_D
            angles = (angles_B1D.cos().to(x_BC.dtype), angles_B1D.sin().to(x_BC.dtype))
        for parts, slots in zip(self.parts, cache.layers(), strict=True):
            heads = parts.queries_keys_values(parts.norm_1(x_BC))
            heads_BND = heads.view(len(x_BC), -1, config.head_dim)
            if parts.turn is not None:
                heads_BND = parts.turn(heads_BND, *angles)
            x_BC = x_BC + parts.project(attend(heads_BND, cache, *slots, mask))
            x_BC = x_BC + parts.mlp(parts.norm_2(x_BC))
        return self.last_norm(x_BC)[:, None]


def attend(
    heads_BND: Tensor, cache: KVCache, newest: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask
) -> Tensor:
    """Store the new keys and values; return what each head reads (B, H D)."""
    B, _, D = heads_BND.shape
    H, K = cache.config.n_head, cache.config.n_kv_head
    kv_B2KD = heads_BND[:, H:].view(B, 2, K, D)
    if cache.is_static:
        newest.index_copy_(3, cache.slots_T, kv_B2KD[:, :, :, None])
    else:  # the host knows the slot, and a copy to it takes half as long
        newest.copy_(kv_B2KD)
    y_BH1D, _ = cached_attention(heads_BND[:, :H, None], k_BKSD, v_BKSD, mask)
    return y_BH1D.reshape(B, H * D)


def turn_of(attention: CausalSelfAttention) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return what normalises and rotates queries and keys together, as they lie side by side."""
    H, K, D = attention.config.n_head, attention.config.n_kv_head, attention.config.head_dim
    q_norm, k_norm = attention.q_norm, attention.k_norm
    assert isinstance(q_norm, RMSNorm)
    k_weight = k_norm.get_parameter("weight")
    scale_nD = torch.cat((q_norm.weight.expand(H, D), k_weight.expand(K, D))).detach()
    normalise = rms_norm_of(q_norm, scale_nD)

    def turn(heads_BND: Tensor, cos_B1D: Tensor, sin_B1D: Tensor) -> Tensor:
        qk_BnD = normalise(heads_BND[:, : H + K])
        turned_BnD = torch.addcmul(qk_BnD * cos_B1D, qk_BnD.roll(D // 2, -1), sin_B1D)
        return torch.cat((turned_BnD, heads_BND[:, H + K :]), dim=1)

    return turn
