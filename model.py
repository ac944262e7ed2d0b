"""The whole GPT in one file, to be read from top to bottom. It needs nothing but torch.

Two architectures are built from the same blocks. `gpt2` is exactly GPT-2 (Radford et al., 2019).
`modern` is parametrised like Qwen3 (Yang et al., 2025, arXiv 2505.09388, sec. 2).

                      gpt2                    modern
    positions         learned                 rotary
    normalisation     LayerNorm               RMSNorm, also of each query and key
    MLP               GELU, 4 C wide          SwiGLU, about 8/3 C wide
    biases            yes                     no
    output head       the token embedding     its own, or the token embedding

Shapes: a tensor's suffix names its dimensions, in order. `q_BHTD` is (batch, head, position,
channel). Plain `x` is the residual stream, or its norm, and is always (B, T, C).

    B  batch                    H  n_head
    T  position that asks       K  n_kv_head, heads of keys and values
    S  position that is asked   D  head_dim
    C  n_embd, model width      R  D / 2, pairs of channels that rotate
    V  vocab_size               N  H + 2 K, heads of all three kinds
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture; the defaults are GPT-2 124M."""

    architecture: Literal["gpt2", "modern"] = "gpt2"
    """gpt2 (LayerNorm, learned positions, GELU, biases) or modern (RMSNorm, rotary, SwiGLU)."""
    vocab_size: int = 50257
    """Vocabulary size; 0 takes the dataset's."""
    context_length: int = 1024
    """Longest sequence that the model can attend over, in tokens."""
    n_layer: int = 12
    """Number of Transformer blocks; 0 lets train.py's minutes choose it."""
    n_head: int = 0
    """Number of attention heads; 0 takes n_embd / head_dim, with heads of 64 channels."""
    n_kv_head: int = 0
    """Number of key and value heads, each shared by equally many query heads; 0 takes n_head."""
    n_embd: int = 0
    """Width of the residual stream; 0 takes 64 n_layer, the proportion of GPT-2 124M."""
    head_dim: int = 0
    """Channels of each head; 0 takes n_embd / n_head, which gpt2 always has."""
    n_inner: int = 0
    """Width of the MLP; 0 takes 4 n_embd, or in modern 8/3 n_embd, rounded up (Shazeer, 2020)."""
    dropout: float = 0.0
    """Probability in [0, 1) of zeroing an activation, or modern's token or value, in training."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head too; gpt2 always does."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths; modern only."""

    def __post_init__(self) -> None:
        is_known = self.architecture in ("gpt2", "modern")
        require(is_known, f"architecture must be gpt2 or modern: got {self.architecture}")
        V, L, T = self.vocab_size, self.n_layer, self.context_length
        require(min(V, L) >= 0, f"vocab_size and n_layer must be at least 0: got {V}, {L}")
        require(T >= 1, f"context_length must be at least 1: got {T}")
        H, K, C = self.n_head, self.n_kv_head, self.n_embd
        D = self.head_dim or C // max(1, H)
        got = f"got n_head={H}, n_kv_head={K}, n_embd={C}, head_dim={self.head_dim}"
        every = f"{got}, n_inner={self.n_inner}"
        require(min(H, K, C, D, self.n_inner) >= 0, f"sizes must be at least 0: {every}")
        require(self.head_dim > 0 or C % max(1, H) == 0, f"n_head must divide n_embd: {got}")
        require(H % max(1, K) == 0, f"n_kv_head must divide n_head: {got}")
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1): got {self.dropout}")
        require(self.rope_theta > 0, f"rope_theta must be positive: got {self.rope_theta}")
        if self.is_modern:
            require(D % 2 == 0, f"modern's n_embd / n_head, or head_dim, must be even: {got}")
        else:
            require(self.tie_embeddings, "gpt2's tie_embeddings must be True: got False")
            require(K in (0, H), f"gpt2's n_kv_head must be n_head: {got}")
            require(0 in (H, C) or H * D == C, f"gpt2's n_head * head_dim must be n_embd: {got}")

    def sized(self) -> "ModelConfig":
        """Fill in the sizes that are 0: they follow from n_layer."""
        C = self.n_embd or 64 * self.n_layer
        H = self.n_head or max(1, C // (self.head_dim or 64))
        sized = replace(self, n_embd=C, n_head=H, n_kv_head=self.n_kv_head or H)
        inner = self.n_inner or (32 * math.ceil(8 * C / 3 / 32) if self.is_modern else 4 * C)
        return replace(sized, head_dim=self.head_dim or C // H, n_inner=inner)

    @property
    def is_modern(self) -> bool:
        return self.architecture == "modern"


Rope = tuple[Tensor, Tensor] | None  # cos_B1TR and sin_B1TR; None for learned positions
Mask = Tensor | None  # added to the scores, (T, S) or (B, 1, T, S); None hides no key
# `attention`, or a faster kernel that takes the same and returns None instead of the weights
Attend = Callable[[Tensor, Tensor, Tensor, Mask, float], tuple[Tensor, Tensor | None]]


def causal_mask(T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return M (T, T): −∞ where a query would see a later key, else 0."""
    return torch.full((T, T), -math.inf, dtype=dtype, device=device).triu(1)


def attention(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ/√d + M) V: what each query reads (B, H, T, D), and its weights (B, H, T, S).

    Vaswani et al., 2017, eq. 1. Without M each of T queries sees all S keys.
    """
    k_BHSD, v_BHSD = (repeat_heads(shared, q_BHTD.shape[1]) for shared in (k_BKSD, v_BKSD))
    # QKᵀ/√d: how well each query matches each key. Without the root, the scores of long vectors
    # would grow with √d and saturate the softmax (sec. 3.2.1).
    scores_BHTS = (q_BHTD / math.sqrt(q_BHTD.shape[-1])) @ k_BHSD.mT
    # M = −∞ where query i must not see key j, so that its weight is exactly 0
    if mask is not None:
        scores_BHTS = scores_BHTS + mask
    # aᵢⱼ = exp(sᵢⱼ) / Σₖ exp(sᵢₖ): the weights of each query sum to 1
    weights_BHTS = F.softmax(scores_BHTS, dim=-1)
    # yᵢ = Σⱼ aᵢⱼ vⱼ: each query takes its own mixture of the values
    y_BHTD = F.dropout(weights_BHTS, dropout) @ v_BHSD
    return y_BHTD, weights_BHTS


def repeat_heads(x_BKSD: Tensor, H: int) -> Tensor:
    """Give each of H query heads its own copy of the key or value head that it shares."""
    K = x_BKSD.shape[1]
    return x_BKSD if K == H else x_BKSD.repeat_interleave(H // K, dim=1)


def rope_of(positions_BT: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angle by which a position turns each pair of channels."""
    exponents_R = torch.arange(0, config.head_dim, 2, device=positions_BT.device) / config.head_dim
    angles_B1TR = positions_BT.float()[:, None, :, None] * config.rope_theta**-exponents_R
    return angles_B1TR.cos().to(dtype), angles_B1TR.sin().to(dtype)


def rotate(x_BHTD: Tensor, cos_B1TR: Tensor, sin_B1TR: Tensor) -> Tensor:
    """Turn each pair of channels by its angle: then q·k sees positions only as a distance.

    Su et al., 2021 (arXiv 2104.09864, sec. 3.2). Channel i is paired with channel i + D/2, as in
    Qwen3, not with its neighbour as in the paper. The two differ by the order of channels only.
    """
    a_BHTR, b_BHTR = x_BHTD.chunk(2, dim=-1)
    turned_a_BHTR = a_BHTR * cos_B1TR - b_BHTR * sin_B1TR
    turned_b_BHTR = b_BHTR * cos_B1TR + a_BHTR * sin_B1TR
    return torch.cat((turned_a_BHTR, turned_b_BHTR), dim=-1)


class Linear(nn.Linear):
    """y = W x + b, computed in the type of x: weights stay float32, products may be bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / standard deviation ⊙ w + b, in the type of x (Ba et al., 2016, eq. 4)."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / RMS(x) ⊙ w, in the type of x: no mean, no bias (Zhang & Sennrich, 2019, eq. 4)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def build_norm(config: ModelConfig, width: int) -> nn.Module:
    return RMSNorm(width, eps=1e-6) if config.is_modern else LayerNorm(width, eps=1e-5)


class Cache(Protocol):
    """The keys and values of earlier positions, so that only new tokens are computed.

    `place` makes room for T more tokens, and returns their positions (B, T) and their mask. `add`
    stores T new keys and values of a layer, and returns all of that layer's, each (B, K, S, D).
    """

    def place(self, T: int) -> tuple[Tensor, Mask]: ...
    def add(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]: ...


class CausalSelfAttention(nn.Module):
    """Attention in which a position sees itself and the past (Vaswani et al., 2017, sec. 3.2).

    With grouped queries H / K neighbouring query heads share one key and one value head (Ainslie
    et al., 2023, arXiv 2305.13245, sec. 2.2).
    """

    def __init__(self, config: ModelConfig, layer: int, attend: Attend) -> None:
        super().__init__()
        self.config, self.layer, self.attend = config, layer, attend
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        self.c_attn = Linear(config.n_embd, (H + 2 * K) * D, bias=not config.is_modern)
        self.c_proj = Linear(H * D, config.n_embd, bias=not config.is_modern)
        if config.is_modern:  # normalising q and k limits the scores (Henry et al., 2020)
            self.q_norm = build_norm(config, config.head_dim)
            self.k_norm = build_norm(config, config.head_dim)

    def queries_keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Project x to queries, keys and values; rotary models normalise and rotate q and k."""
        H, K = self.config.n_head, self.config.n_kv_head
        heads_BNTD = self.c_attn(x).unflatten(-1, (H + 2 * K, -1)).transpose(1, 2)  # N = H + 2 K
        q_BHTD, k_BKTD, v_BKTD = heads_BNTD.split((H, K, K), dim=1)
        if rope is not None:
            q_BHTD = rotate(self.q_norm(q_BHTD), *rope)
            k_BKTD = rotate(self.k_norm(k_BKTD), *rope)
        return q_BHTD, k_BKTD, v_BKTD

    def forward(self, x: Tensor, rope: Rope, mask: Mask, cache: Cache | None) -> Tensor:
        q_BHTD, k_BKTD, v_BKTD = self.queries_keys_values(x, rope)
        k_BKSD, v_BKSD = cache.add(self.layer, k_BKTD, v_BKTD) if cache else (k_BKTD, v_BKTD)
        dropout = self.config.dropout if self.training else 0.0
        if self.config.is_modern and dropout > 0:  # whole values (Zehui et al., 2019), not weights
            v_BKSD = v_BKSD * F.dropout(torch.ones_like(v_BKSD[..., :1]), dropout)
            dropout = 0.0
        y_BHTD, _ = self.attend(q_BHTD, k_BKSD, v_BKSD, mask, dropout)
        return self.c_proj(y_BHTD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """W₂ gelu(W₁ x) at each position, or SwiGLU, W₂ (silu(W x) ⊙ W₁ x) (Shazeer, 2020, eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_gated = config.is_modern
        if self.is_gated:
            self.c_gate = Linear(config.n_embd, config.n_inner, bias=False)
        self.c_fc = Linear(config.n_embd, config.n_inner, bias=not config.is_modern)
        self.c_proj = Linear(config.n_inner, config.n_embd, bias=not config.is_modern)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_gated:
            return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One Transformer block: attention mixes positions, then the MLP mixes channels."""

    def __init__(self, config: ModelConfig, layer: int, attend: Attend) -> None:
        super().__init__()
        self.ln_1 = build_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer, attend)
        self.ln_2 = build_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(0.0 if config.is_modern else config.dropout)

    def forward(self, x: Tensor, rope: Rope, mask: Mask, cache: Cache | None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), rope, mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Embed each token, pass the stream through the blocks, and score every possible next token."""

    def __init__(self, config: ModelConfig, attend: Attend = attention) -> None:
        super().__init__()
        require(config.vocab_size > 0, "vocab_size must be known to build a model: got 0")
        require(config.n_layer > 0, "n_layer must be given, or minutes that choose it: got 0")
        self.config = config = config.sized()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.is_modern:
            self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.drop = nn.Dropout1d(config.dropout) if config.is_modern else nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i, attend) for i in range(config.n_layer))
        self.ln_f = build_norm(config, config.n_embd)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight  # Press & Wolf, 2017
        self.init_weights()

    def init_weights(self, named: Iterable[tuple[str, Tensor]] | None = None) -> None:
        """Draw matrices (default: all) from normal distributions: the loss starts near ln V."""
        config = self.config
        std: dict[str, float] = dict.fromkeys(("wte", "wpe", "c_attn", "c_fc", "lm_head"), 0.02)
        std["c_proj"] = 0.02 / math.sqrt(2 * config.n_layer)  # Radford et al., 2019, sec. 2.3
        if config.is_modern:
            std["c_attn"] = std["c_gate"] = std["c_fc"] = config.n_embd**-0.5  # LeCun et al., 1998
        if config.is_modern and not config.tie_embeddings:
            # Each block starts as the identity (Zhang et al., 2019); a tied head would echo tokens
            std |= {"c_proj": 0.0, "wte": 0.3}  # the 0.3 was tuned (docs/recipe.md)
        for name, parameter in named or self.named_parameters():
            if parameter.ndim == 2:  # "blocks.0.attn.c_proj.weight": its layer is c_proj
                nn.init.normal_(parameter, std=std[name.split(".")[-2]])
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(
        self, tokens_BT: Tensor, cache: Cache | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the stream after all blocks (B, T, C), from which the head scores next tokens.

        With a cache, the tokens follow those that it holds. `dtype` is that of the stream and of
        all products (default: of the weights). Raises ValueError if the sequence is too long.
        """
        dtype = dtype or self.wte.weight.dtype
        if cache is None:
            T, limit = tokens_BT.shape[1], self.config.context_length
            require(limit >= T, f"{T} tokens are more than context_length={limit}")
            positions_BT = torch.arange(T, device=tokens_BT.device)[None]
            mask = causal_mask(T, dtype, tokens_BT.device)
        else:
            positions_BT, mask = cache.place(tokens_BT.shape[1])
        x = self.wte(tokens_BT)
        if not self.config.is_modern:
            x = x + self.wpe(positions_BT)
        x = self.drop(x.to(dtype))
        rope = rope_of(positions_BT, self.config, dtype) if self.config.is_modern else None
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        return self.ln_f(x)

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits (B, T, V) of the token after each position."""
        return self.lm_head(self.features(tokens_BT, cache))
