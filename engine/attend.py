"""The fused kernel of attention, and where a run uses it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model import Attend, Mask, attention

SHORT_CONTEXT = 512  # positions up to which `attention` is faster in bfloat16 on a CPU


def fused_attention(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask = None, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Compute `attention` in one kernel that never stores the weights (Dao et al., 2022).

    A mask (T, T) must be `causal_mask`: the kernel has it built in, and skips what it hides.
    """
    is_causal = mask is not None and mask.ndim == 2 and mask.shape[0] == mask.shape[1]
    y_BHTD = F.scaled_dot_product_attention(
        q_BHTD,
        k_BKSD,
        v_BKSD,
        attn_mask=None if is_causal else mask,
        is_causal=is_causal,
        dropout_p=dropout,
        enable_gqa=q_BHTD.shape[1] != k_BKSD.shape[1],
    )
    return y_BHTD, None


def choose_attention(device: torch.device, dtype: torch.dtype, context_length: int) -> Attend:
    """Return the faster one: `attention` for short contexts in bfloat16 on a CPU, else the kernel.

    There the gradient of torch's fused kernel takes five times as long as that of `attention`. In
    long contexts `attention` is slower still, as it stores all weights (docs/recipe.md).
    """
    is_cpu_bfloat16 = device.type == "cpu" and dtype == torch.bfloat16
    return attention if is_cpu_bfloat16 and context_length <= SHORT_CONTEXT else fused_attention
