"""The keys and values of earlier positions, and the attention that reads them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.attend import fused_attention
from model import Mask, ModelConfig, causal_mask, require


class KVCache:
    """Keys and values of the latest `context_length` positions, in memory that is allocated once.

    It is a ring: position p lies in slot p mod size. All rows end at one position. A row may begin
    late, at starts_B[b], and what lies before is padding. A `static` cache always reads every slot,
    so that a CUDA graph can replay the step.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        like: Tensor,
        starts_B: Tensor | None = None,
        size: int | None = None,
        static: bool = False,
    ) -> None:
        """Allocate `size` slots (default: context_length) on the device of `like`, in its type."""
        self.config, self.is_static = config, static
        self.size = size or config.context_length
        # A CPU's kernels read bfloat16 keys for a single query slower than float32 ones
        is_slow = like.device.type == "cpu" and like.dtype == torch.bfloat16
        dtype = torch.float32 if is_slow else like.dtype
        shape = (config.n_layer, batch_size, 2, config.n_kv_head, self.size, config.head_dim)
        self.kv_LB2KSD = like.new_zeros(shape, dtype=dtype)
        self.k_LBKSD, self.v_LBKSD = self.kv_LB2KSD.unbind(2)
        self.starts_B = starts_B
        if static and starts_B is None:
            self.starts_B = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        self.length = 0  # positions so far
        # The same, for a graph to count
        self.end = torch.zeros((), dtype=torch.long, device=like.device)
        self.slots_T = self.end[None]  # where the latest positions lie
        self.n_used = 0  # slots that are read

    def place(self, T: int) -> tuple[Tensor, Mask]:
        """Make room for T more tokens; return their positions (B or 1, T) and what they may see.

        Rotary models go on past the context, one token at a time: each then sees the latest
        context_length positions. Raises ValueError if the tokens do not fit.
        """
        limit, device = self.config.context_length, self.end.device
        length = self.length + T
        slides = self.config.is_modern and T == 1
        require(slides or length <= limit, f"{length} tokens are more than context_length={limit}")
        new_T = self.end + torch.arange(T, device=device)
        self.slots_T = new_T % self.size
        self.length = length
        self.end += T
        self.n_used = self.size if self.is_static else min(self.size, length)
        if self.starts_B is not None:
            positions_BT = (new_T - self.starts_B[:, None]).clamp(min=0)
            return positions_BT, self._ragged_mask(new_T, self.starts_B)
        if T == 1:  # it sees all that the ring holds
            return new_T[None], None
        mask_TT = causal_mask(T, self.k_LBKSD.dtype, device)
        return new_T[None], F.pad(mask_TT, (length - T, 0))  # all of them see all of the past

    def _ragged_mask(self, new_T: Tensor, starts_B: Tensor) -> Tensor:
        """Return the mask (B, 1, T, S) of rows that begin at different positions."""
        # The position in a slot is the latest that falls on it; below 0 there is none yet
        slots_S = torch.arange(self.n_used, device=new_T.device)
        held_S = new_T[-1] - (new_T[-1] - slots_S) % self.size
        seen_BTS = (held_S <= new_T[:, None]) & (held_S >= starts_B[:, None, None])
        # Padding sees itself: a softmax over nothing would not be a number
        seen_BTS = seen_BTS | (held_S == new_T[:, None])
        mask_BTS = self.k_LBKSD.new_zeros(seen_BTS.shape).masked_fill(~seen_BTS, -math.inf)
        return mask_BTS[:, None]

    def add(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write T keys and values; return those of all positions that the ring holds."""
        self.k_LBKSD[layer].index_copy_(2, self.slots_T, k_BKTD.type_as(self.k_LBKSD))
        self.v_LBKSD[layer].index_copy_(2, self.slots_T, v_BKTD.type_as(self.v_LBKSD))
        n = self.n_used
        return self.k_LBKSD[layer, :, :, :n], self.v_LBKSD[layer, :, :, :n]

    def layers(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the slot of the newest position (of a static cache, all), and the keys and values.

        They are cut out of the memory of all layers at once, which takes fewer calls.
        """
        newest = slice(None) if self.is_static else (self.length - 1) % self.size
        n = self.n_used
        k_LBKSD, v_LBKSD = self.k_LBKSD[:, :, :, :n], self.v_LBKSD[:, :, :, :n]
        parts = (self.kv_LB2KSD[:, :, :, :, newest], k_LBKSD, v_LBKSD)
        return zip(*(part.unbind() for part in parts), strict=True)

    def go_back_to(self, length: int) -> None:
        """Forget what follows the first `length` positions, none of which has been overwritten."""
        self.length = length
        self.end.fill_(length)

    def copy_from(self, other: "KVCache", rows_B: Tensor) -> None:
        """Hold what rows_B of another cache hold; a static cache keeps its place in memory."""
        n = other.length
        self.k_LBKSD[..., :n, :] = other.k_LBKSD[:, rows_B]
        self.v_LBKSD[..., :n, :] = other.v_LBKSD[:, rows_B]
        self.go_back_to(n)
        starts_B = None if other.starts_B is None else other.starts_B[rows_B]
        if self.is_static and self.starts_B is not None:
            self.starts_B.copy_(torch.zeros_like(rows_B) if starts_B is None else starts_B)
        else:
            self.starts_B = starts_B


def cached_attention(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask = None, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Compute `fused_attention` in the cache's type; return it in the type of the queries."""
    B, H, T, D = q_BHTD.shape
    asked_BHTD = q_BHTD.type_as(k_BKSD)
    if T == 1:  # query heads that share keys become positions of one head: no key is copied
        K = k_BKSD.shape[1]
        y_BKGD, _ = fused_attention(asked_BHTD.reshape(B, K, H // K, D), k_BKSD, v_BKSD, mask)
        return y_BKGD.reshape(B, H, T, D).type_as(q_BHTD), None
    y_BHTD, _ = fused_attention(asked_BHTD, k_BKSD, v_BKSD, mask, dropout)
    return y_BHTD.type_as(q_BHTD), None
