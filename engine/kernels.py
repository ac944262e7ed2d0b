"""The fastest way to compute a model here: which kernels a run uses.

On a CPU torch takes each norm and rotation apart into a dozen small operations, and its gradient
into two dozen, each of which passes over memory. The classes here need a third of them.
On a GPU, and where `--compile` fuses operations, the formulas of model.py are fast already.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.attend import choose_attention
from model import GPT, CausalSelfAttention, ModelConfig, RMSNorm, Rope


def build_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, compiled: bool
) -> GPT:
    """Return a new model, which is to compute on `device`, with products in `dtype`."""
    model = GPT(config, choose_attention(device, dtype, config.context_length))
    if device.type == "cpu" and not compiled:
        use_kernels(model)
    return model


def use_kernels(model: GPT) -> None:
    """Let a model compute the same as before in fewer operations."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.__class__ = FastRMSNorm
        elif isinstance(module, CausalSelfAttention) and model.config.is_modern:
            module.__class__ = FastCausalSelfAttention


class FastRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return Normalize.apply(x, self.weight.to(x.dtype), self.eps)


class FastCausalSelfAttention(CausalSelfAttention):
    """Normalises and rotates queries and keys together, as they lie side by side.

    To rotate the pair (a, b) is to multiply a + ib by exp(iθ) (Su et al., 2021, eq. 13). Torch's
    complex numbers need b right after a, so the rows of c_attn change places first. Dot products
    do not see that, as queries and keys change alike.
    """

    def queries_keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        assert rope is not None  # modern has it
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        qk_weight, v_weight = self.c_attn.weight.split(((H + K) * D, K * D))
        weight = torch.cat((pairs_together(qk_weight, D), v_weight)).to(x.dtype)
        heads_BTND = F.linear(x, weight).unflatten(-1, (-1, D))
        qk_BTnD, v_BTKD = heads_BTND.split((H + K, K), dim=2)
        q_scale_D, k_scale_D = (n.get_parameter("weight") for n in (self.q_norm, self.k_norm))
        scale_nD = torch.cat((q_scale_D.expand(H, D), k_scale_D.expand(K, D)))
        scale_nD = pairs_together(scale_nD.flatten(), D).view_as(scale_nD)
        normal_BTnD = Normalize.apply(qk_BTnD, scale_nD.to(x.dtype), self.q_norm.eps)
        wide = torch.promote_types(x.dtype, torch.float32)  # no number is complex in bfloat16
        pairs_BTnR = torch.view_as_complex(normal_BTnD.to(wide).unflatten(-1, (-1, 2)))
        turn_BT1R = torch.complex(*(part.to(wide) for part in rope)).transpose(1, 2)
        turned_BTnD = torch.view_as_real(pairs_BTnR * turn_BT1R).flatten(-2).to(x.dtype)
        q_BTHD, k_BTKD = turned_BTnD.split((H, K), dim=2)
        return q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)


def pairs_together(rows: Tensor, D: int) -> Tensor:
    """Order the rows of each head of D as 0, D/2, 1, D/2 + 1, …, which are the rotated pairs."""
    return rows.unflatten(0, (-1, 2, D // 2)).transpose(1, 2).flatten(0, 2)


class Normalize(torch.autograd.Function):
    """x / RMS(x) ⊙ w, over the last dimension of x.

    x has the gradient r (g ⊙ w - y mean(g ⊙ w ⊙ y)), with r = √C / √(‖x‖² + C ε) and y = r x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        C = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = C**0.5 / norm.hypot_(norm.new_tensor((C * eps) ** 0.5))
        y = x * r
        ctx.save_for_backward(y, r, w)
        return y * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y, r, w = ctx.saved_tensors
        product = grads[0] * y
        dw = product.flatten(0, -1 - w.ndim).sum(0)
        minus_mean = product.mul_(w).sum(dim=-1, keepdim=True).div_(-w.shape[-1])
        return (grads[0] * w).addcmul_(y, minus_mean).mul_(r), dw, None
