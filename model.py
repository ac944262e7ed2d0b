"""The whole GPT in one file, to be read from top to bottom. It needs nothing but torch.

Two architectures are built from the same blocks: `gpt2` is exactly GPT-2 (Radford et al.,
2019); `modern` has the parametrisation of Qwen3 (Yang et al., 2025, arXiv 2505.09388, sec. 2).

                      gpt2                    modern
    positions         learned                 rotary
    normalisation     LayerNorm               RMSNorm, also of each query and key
    MLP               GELU, 4 C wide          SwiGLU, about 8/3 C wide
    biases            yes                     no
    output head       the token embedding     its own, or the token embedding

Shapes. A tensor's suffix names its dimensions, in order: `q_BHTD` is (batch, head, position,
channel). Plain `x` is the residual stream and is always (B, T, C).

    B  batch                    H  n_head
    T  position that asks       K  n_kv_head, heads of keys and values
    S  position that is asked   D  head_dim = C / H
    C  n_embd, model width      V  vocab_size
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Turn = tuple[Tensor, Tensor]  # cos and sin of rotary positions
IGNORED = -100  # a target that does not count
LOGITS_AT_ONCE = (2**27, 2**22)  # that the loss holds: on a GPU, and in the caches of a CPU


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture; the defaults are GPT-2 124M."""

    architecture: Literal["gpt2", "modern"] = "gpt2"
    """gpt2 (LayerNorm, learned positions, GELU, biases) or modern (RMSNorm, rotary, SwiGLU)."""
    vocab_size: int = 50257
    """Number of tokens; 0 stands for the dataset's, until train.py fills it in."""
    context_length: int = 1024
    """Longest sequence that the model can attend over, in tokens."""
    n_layer: int = 12
    """Number of Transformer blocks."""
    n_head: int = 0
    """Number of attention heads; must divide n_embd; 0 makes them 64 channels wide."""
    n_kv_head: int = 0
    """Heads of keys and values, each shared by equally many queries; 0 for n_head; modern only."""
    n_embd: int = 0
    """Width of the residual stream; 0 for 64 n_layer, the proportion of GPT-2 124M."""
    dropout: float = 0.0
    """Probability of zeroing an activation in training, in [0, 1)."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head too; gpt2 always does."""
    attention: Literal["fused", "explicit"] = "fused"
    """fused (fast) or explicit (every step visible): the same numbers either way."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths; modern only."""

    def __post_init__(self) -> None:
        least, n_head = {"context_length": 1, "n_layer": 1}, max(1, self.n_head)
        least |= {"vocab_size": 0, "n_head": 0, "n_kv_head": 0, "n_embd": 0}  # 0: filled in later
        rules = {f"{k} must be at least {n}": getattr(self, k) >= n for k, n in least.items()} | {
            "architecture must be gpt2 or modern": self.architecture in ("gpt2", "modern"),
            "attention must be fused or explicit": self.attention in ("fused", "explicit"),
            "n_head must divide n_embd": self.n_embd % n_head == 0,
            "modern's n_embd / n_head must be even": self.n_embd // n_head % 2 == 0
            or not self.is_modern,
            "n_kv_head must divide n_head": self.n_head % (self.n_kv_head or n_head) == 0,
            "gpt2's n_kv_head must be n_head": self.n_kv_head in (0, self.n_head) or self.is_modern,
            "dropout must be in [0, 1)": 0 <= self.dropout < 1,
            "rope_theta must be positive": self.rope_theta > 0,
            "gpt2's tie_embeddings must be True": self.tie_embeddings or self.is_modern,
        }
        for rule, holds in rules.items():
            if not holds:
                named = [field.name for field in fields(self) if field.name in rule]
                values = ", ".join(f"{name}={getattr(self, name)}" for name in named)
                raise ValueError(f"{rule}: got {values}")

    def sized(self) -> "ModelConfig":
        """Fill in the sizes that are 0 and follow from n_layer."""
        n_embd = self.n_embd or 64 * self.n_layer
        n_head = self.n_head or max(1, n_embd // 64)
        return replace(self, n_embd=n_embd, n_head=n_head, n_kv_head=self.n_kv_head or n_head)

    @property
    def is_modern(self) -> bool:
        return self.architecture == "modern"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_inner(self) -> int:
        """Width of the MLP: SwiGLU's 3 matrices hold what GELU's 2 do (Shazeer, 2020, sec. 3)."""
        # rounded up to a multiple of 32, for speed
        return 32 * math.ceil(8 * self.n_embd / 3 / 32) if self.is_modern else 4 * self.n_embd


def product_dtype(x: Tensor) -> torch.dtype:
    """Type of the matrix products here: autocast's, or the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S), True where a query may look: the queries are the last T of the S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def minus_infinity(where: Tensor, like: Tensor) -> Tensor:
    """-∞ there and 0 elsewhere: adding it costs less than filling, whose gradient is a copy."""
    return like.new_zeros(where.shape).masked_fill_(where, -math.inf)


def attention(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ/√d) V: what each query reads (B, H, T, D), and its weights (B, H, T, S).

    Vaswani et al., 2017, eq. 1. With `causal` a position sees itself and the past; `mask`, a
    boolean that broadcasts to (B, H, T, S), hides the keys where it is False; a query must see
    one. Without either this is cross-attention: T queries of one sequence, S keys of another.
    """
    T, S, D = q_BHTD.shape[-2], k_BHSD.shape[-2], q_BHTD.shape[-1]
    # scores = QKᵀ/√d: how well each query matches each key. Without the root those of long
    # vectors grow with √d and the softmax saturates (sec. 3.2.1). Q has fewer numbers to divide.
    scores_BHTS = (q_BHTD / math.sqrt(D)) @ k_BHSD.transpose(-2, -1)
    # sᵢⱼ = -∞ where query i must not see key j, so that its weight is exactly 0
    if causal:
        scores_BHTS = scores_BHTS + minus_infinity(~causal_mask(T, S, q_BHTD.device), q_BHTD)
    if mask is not None:
        scores_BHTS = scores_BHTS + minus_infinity(~mask, q_BHTD)
    # aᵢⱼ = exp(sᵢⱼ) / Σₖ exp(sᵢₖ): each query shares out one unit of attention
    weights_BHTS = F.softmax(scores_BHTS, dim=-1)
    # yᵢ = Σⱼ aᵢⱼ vⱼ: each query takes that mixture of the values
    y_BHTD = F.dropout(weights_BHTS, dropout) @ v_BHSD
    return y_BHTD, weights_BHTS


def fused_attention(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The same output by one kernel that never stores the weights (Dao et al., 2022)."""
    T, S = q_BHTD.shape[-2], k_BHSD.shape[-2]
    # In bfloat16 on a CPU torch's kernel is slow, and its gradient five times slower than the
    # formula's, until there are so many weights that storing them is slower still
    if q_BHTD.device.type == "cpu" and q_BHTD.dtype == torch.bfloat16 and S <= 512:
        return attention(q_BHTD, k_BHSD, v_BHSD, causal=causal, mask=mask, dropout=dropout)[0]
    # torch's is_causal counts positions from the first key, ours from the last: they agree
    # when T = S. A single query, being the last position, sees every key.
    whole = causal and T == S and mask is None
    if causal and not whole and T > 1:
        past = causal_mask(T, S, q_BHTD.device)
        mask = past if mask is None else mask & past
    return F.scaled_dot_product_attention(
        q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, is_causal=whole, dropout_p=dropout
    )


def rotation(positions_T: Tensor, config: ModelConfig) -> Turn:
    """cos and sin (T, D/2) of the angle by which each pair of channels turns at each position."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions_T.device) / config.head_dim
    angles_TD = positions_T.float()[..., None] * config.rope_theta**-exponents
    return angles_TD.cos(), angles_TD.sin()


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn each pair of channels by its position: then q·k depends on their distance alone.

    Su et al., 2021 (arXiv 2104.09864, sec. 3.2). Channel i is paired with channel i + D/2, as
    in Qwen3, not with its neighbour, as in the paper: the same up to the order of channels.
    """
    a_BHTD, b_BHTD = x_BHTD.chunk(2, dim=-1)
    cos_TD, sin_TD = cos_TD.to(x_BHTD.dtype), sin_TD.to(x_BHTD.dtype)
    turned = (a_BHTD * cos_TD - b_BHTD * sin_TD, b_BHTD * cos_TD + a_BHTD * sin_TD)
    return torch.cat(turned, dim=-1)


class KVCache:
    """Keys and values of the latest `context_length` positions, in memory allocated once.

    A ring: position p lies in slot p mod size, which is context_length unless fewer will do. All
    rows end at one position; row b may begin late, at starts_B[b], and what lies before it is
    padding. A `static` cache reads all its slots at every step: a captured graph can repeat it.
    """

    def __init__(
        self,
        batch_size: int,
        config: ModelConfig,
        like: Tensor,
        starts_B: Tensor | None = None,
        size: int | None = None,
        static: bool = False,
    ) -> None:
        shape = (config.n_layer, batch_size, config.n_kv_head)
        shape += (size or config.context_length, config.head_dim)
        # A CPU's kernels read bfloat16 keys for a single query slower than float32 ones
        is_slow = like.device.type == "cpu" and like.dtype == torch.bfloat16
        ring = like.new_zeros((2, *shape), dtype=torch.float32 if is_slow else like.dtype)
        self.k_LBKSD, self.v_LBKSD = ring
        self.starts_B, self.is_static = starts_B, static
        if static and starts_B is None:
            self.starts_B = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        self.length = 0
        self.end = torch.zeros((), dtype=torch.long, device=like.device)  # length, on the device

    def place(self, T: int) -> Tensor:
        """Make room for T more positions; return them, as each row counts: (T,) or (B, T)."""
        size, device = self.k_LBKSD.shape[-2], self.end.device
        new_T = self.end + torch.arange(T, device=device)
        self.slots_T, self.length = new_T % size, self.length + T
        self.end += T
        self.used, self.mask_B1TS = size if self.is_static else min(size, self.length), None
        if self.starts_B is None:
            return new_T  # each sees all that the ring holds, up to itself
        # the position that a slot holds is the latest one that falls on it: below 0, none yet
        held_S = new_T[-1] - (new_T[-1] - torch.arange(self.used, device=device)) % size
        seen_BTS = (held_S <= new_T[:, None]) & (held_S >= self.starts_B[:, None, None])
        # padding sees itself: a softmax over nothing would not be a number
        self.mask_B1TS = (seen_BTS | (held_S == new_T[:, None]))[:, None]
        return (new_T - self.starts_B[:, None]).clamp(min=0)

    def extend(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write T positions; return the keys and values of all that the ring holds."""
        for ring_LBKSD, new_BKTD in ((self.k_LBKSD, k_BKTD), (self.v_LBKSD, v_BKTD)):
            ring_LBKSD[layer].index_copy_(2, self.slots_T, new_BKTD.type_as(ring_LBKSD))
        return self.k_LBKSD[layer, :, :, : self.used], self.v_LBKSD[layer, :, :, : self.used]


class CausalSelfAttention(nn.Module):
    """Attention in which a position sees itself and the past (Vaswani et al., 2017, sec. 3.2).

    With n_kv_head below n_head it is grouped-query attention (Ainslie et al., 2023, arXiv
    2305.13245, sec. 2.2): neighbouring heads ask in their own ways for the same keys and values.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, width, bias=not config.is_modern)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=not config.is_modern)
        if config.is_modern:  # queries and keys of one size bound the scores (Henry et al., 2020)
            self.q_norm, self.k_norm = (build_norm(config, config.head_dim) for _ in range(2))

    def queries_keys_values(self, x: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor, Tensor]:
        """What each position asks, answers to and passes on: (B, H, T, D), twice (B, K, T, D)."""
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        heads = self.c_attn(x).unflatten(-1, (-1, D)).transpose(1, 2)
        q_BHTD, k_BKTD, v_BKTD = heads.split((H, K, K), dim=1)
        if turn is not None:
            q_BHTD = rotate(self.q_norm(q_BHTD), *turn)
            k_BKTD = rotate(self.k_norm(k_BKTD), *turn)
        return q_BHTD, k_BKTD, v_BKTD

    def forward(self, x: Tensor, turn: Turn | None, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        q_BHTD, k_BKSD, v_BKSD = self.queries_keys_values(x, turn)
        mask, dtype = None, q_BHTD.dtype
        if cache is not None:
            k_BKSD, v_BKSD = cache.extend(self.layer, k_BKSD, v_BKSD)
            q_BHTD, mask = q_BHTD.type_as(k_BKSD), cache.mask_B1TS
        how: dict[str, Any] = {"causal": T > 1 and mask is None, "mask": mask}
        how["dropout"] = self.config.dropout if self.training else 0.0
        if T == 1:  # queries that share keys see the same of them: as if one head asked H/K times
            q_BHTD = q_BHTD.reshape(B, K, H // K, D)
        elif K < H:
            k_BKSD, v_BKSD = (t.repeat_interleave(H // K, dim=1) for t in (k_BKSD, v_BKSD))
        if self.config.attention == "fused":
            y_BHTD = fused_attention(q_BHTD, k_BKSD, v_BKSD, **how)
        else:
            y_BHTD, _ = attention(q_BHTD, k_BKSD, v_BKSD, **how)
        return self.c_proj(y_BHTD.reshape(B, H, T, D).transpose(1, 2).reshape(B, T, C).to(dtype))


class RMSNorm(nn.RMSNorm):
    """x / RMS(x) ⊙ w: LayerNorm without mean and bias (Zhang & Sennrich, 2019, eq. 4)."""

    def forward(self, x: Tensor) -> Tensor:
        # torch has a fused kernel only where both have one type; under autocast w is float32
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def build_norm(config: ModelConfig, width: int) -> nn.Module:
    return RMSNorm(width, eps=1e-6) if config.is_modern else nn.LayerNorm(width, eps=1e-5)


class MLP(nn.Module):
    """Two layers at each position by itself: W₂ gelu(W₁ x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """An MLP whose hidden layer is gated: W₂ (silu(W x) ⊙ W₁ x) (Shazeer, 2020, eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Block(nn.Module):
    """One Transformer block: attention mixes positions, then the MLP mixes channels."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = build_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = build_norm(config, config.n_embd)
        self.mlp = SwiGLU(config) if config.is_modern else MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, turn: Turn | None, cache: KVCache | None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), turn, cache))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class LinearCrossEntropy(torch.autograd.Function):
    """Mean of -ln softmax(x Wᵀ)ₜ, with the logits of a few positions at a time in memory.

    The gradient of a chunk is computed beside its loss, while its logits are at hand.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, head_VC: Tensor, targets_N: Tensor) -> Tensor:
        weight_VC, n_targets = head_VC.to(x_NC.dtype), (targets_N != IGNORED).sum()
        size = max(1, LOGITS_AT_ONCE[x_NC.device.type == "cpu"] // len(head_VC))
        loss, dx_NC, dhead_VC = head_VC.new_zeros(()), torch.zeros_like(x_NC), head_VC * 0
        parts = (tensor.split(size) for tensor in (x_NC, targets_N, dx_NC))
        for x_nC, targets_n, dx_nC in zip(*parts, strict=True):
            log_p_nV = (x_nC @ weight_VC.T).float().log_softmax(dim=-1)
            loss += F.nll_loss(log_p_nV, targets_n, ignore_index=IGNORED, reduction="sum")
            if any(ctx.needs_input_grad):
                # ∂(-ln softmax(z)ₜ)/∂zᵥ = softmax(z)ᵥ - [v = t]
                d_nV = log_p_nV.exp()
                d_nV[torch.arange(len(d_nV)), targets_n.clamp(min=0)] -= 1
                d_nV = d_nV.masked_fill((targets_n == IGNORED)[:, None], 0).to(x_nC.dtype)
                dx_nC += d_nV @ weight_VC
                dhead_VC += d_nV.T @ x_nC
        ctx.save_for_backward(dx_NC, dhead_VC, n_targets)
        return loss / n_targets

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        dx_NC, dhead_VC, n_targets = ctx.saved_tensors
        return dx_NC * (grads[0] / n_targets), dhead_VC * (grads[0] / n_targets), None


class GPT(nn.Module):
    """Embed each token, pass the stream through the blocks, and score every possible next token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size == 0:
            raise ValueError("vocab_size must be known before a model is built: got 0")
        self.config = config = config.sized()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.is_modern:
            self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = build_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight  # Press & Wolf, 2017
        self.init_weights()

    def init_weights(self) -> None:
        """Start near the uniform guess: a loss of about ln V.

        gpt2: N(0, 0.02), and 0.02/√(2 n_layer) in the projections that feed the residual stream
        (Radford et al., 2019, sec. 2.3). modern: block matrices 1/√fan_in (LeCun et al., 1998), and
        those projections 0, so that a block starts as the identity (Zhang et al., 2019, arXiv
        1901.09321), beside embeddings that it can tell apart: but not with a tied head, which
        would then bet on its own input.
        """
        identity = self.config.is_modern and not self.config.tie_embeddings
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:  # norms start at 1 already
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                continue
            std = 0.02
            if name.endswith("c_proj.weight"):
                std = 0.0 if identity else 0.02 / math.sqrt(2 * self.config.n_layer)
            elif self.config.is_modern and name.startswith("blocks."):
                std = parameter.shape[1] ** -0.5
            elif identity and name == "wte.weight":
                std = 0.3
            nn.init.normal_(parameter, std=std)

    def new_cache(self, batch_size: int, **settings: Any) -> KVCache:
        """An empty cache, for `forward` to fill without gradients."""
        return KVCache(batch_size, self.config, self.wte.weight, **settings)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        cache: KVCache | None = None,
        last: int = 0,
    ) -> Tensor:
        """Return the logits (B, T, V), or, given targets, the mean loss in nats per token.

        The logits are of the `last` positions, 0 for all. Targets of -100 do not count. With a
        cache the tokens continue those that it has seen; rotary positions go on past the context,
        one token at a time, and each then sees the latest context_length, itself among them.
        Raises ValueError if the sequence is longer.
        """
        T = tokens_BT.shape[1]
        length = T + (cache.length if cache else 0)
        slides = self.config.is_modern and cache is not None and T == 1
        if length > self.config.context_length and not slides:
            limit = f"context_length={self.config.context_length}"
            raise ValueError(f"a sequence of {length} tokens is longer than {limit}")
        positions_T = cache.place(T) if cache else torch.arange(T, device=tokens_BT.device)
        x = self.wte(tokens_BT)
        if not self.config.is_modern:
            x = x + self.wpe(positions_T)
        x = self.drop(x.to(product_dtype(x)))
        turn = rotation(positions_T.unsqueeze(-2), self.config) if self.config.is_modern else None
        for block in self.blocks:
            x = block(x, turn, cache)
        x = self.ln_f(x)
        if targets_BT is None:
            return self.lm_head(x[:, -last:])
        x_NC = x.to(product_dtype(x)).flatten(0, 1)
        return LinearCrossEntropy.apply(x_NC, self.lm_head.weight, targets_BT.flatten())
