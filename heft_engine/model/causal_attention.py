"""Causal attention of one row, with a gradient that is quick on a CPU.

torch's flash attention is quick forward and slow backward there: 7.2 ms of 9 heads, 160 tokens and 64 dimensions in
bfloat16 on one core, of which the products below need 2. So while it trains, a row's attention weights are computed as
one matrix a head, query heads of a group stacked on their one key/value head, and kept for the gradient; scoring uses
torch's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

#: Above this many tokens the kept weights take more memory than everything else in a layer; torch's own gradient then.
LONGEST_MATRIX = 512
#: Rows are padded to multiples of this many tokens: the library makes new machine code for every new shape of a
#: product, which takes longer than twenty such products.
STEP = 32


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (1, heads, T, d), k and v (1, kv_heads, T, d) → (1, heads, T, d)."""
    groups, is_causal = q.shape[1] // k.shape[1], q.shape[2] > 1
    if q.device.type == "cpu" and not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=groups > 1
        )
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)


class CausalAttention(torch.autograd.Function):
    """`causal` to rounding, with the gradient of softmax attention written out.

    With P = softmax(s·QKᵀ) and O = PV: dV = PᵀdO, dP = dO·Vᵀ, dS = P ⊙ (dP − rowsum(dO ⊙ O)), dQ = s·dS·K,
    dK = s·dSᵀQ (FlashAttention, arXiv 2205.14135, appendix B.2).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        _, heads, tokens, width = q.shape
        kv_heads = k.shape[1]
        # A padded query has no gradient and a padded key stands right of every query, so neither changes a sum.
        size = -(-tokens // STEP) * STEP
        padding = (0, 0, 0, size - tokens)
        queries = F.pad(q * scale, padding).reshape(kv_heads, -1, width)
        keys, values = F.pad(k, padding)[0], F.pad(v, padding)[0]
        scores = torch.bmm(queries, keys.transpose(1, 2)).view(heads, size, size)
        weights = torch.softmax(scores.add_(_causal_bias(size, q.dtype, q.device)), dim=-1)
        weights = weights.view(kv_heads, -1, size)
        stacked = torch.bmm(weights, values)
        ctx.save_for_backward(queries, keys, values, weights, stacked)
        ctx.scale = scale
        return stacked.view(1, heads, size, width)[:, :, :tokens]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, weights, out = ctx.saved_tensors
        _, heads, tokens, width = gradients[0].shape
        size = keys.shape[1]
        incoming = F.pad(gradients[0], (0, 0, 0, size - tokens)).reshape(out.shape)
        change = torch.bmm(incoming, values.transpose(1, 2))
        change.sub_((incoming * out).sum(-1, keepdim=True)).mul_(weights)
        return (
            (torch.bmm(change, keys).view(1, heads, size, width)[:, :, :tokens]).mul_(ctx.scale),
            torch.bmm(change.transpose(1, 2), queries)[None, :, :tokens],
            torch.bmm(weights.transpose(1, 2), incoming)[None, :, :tokens],
            None,
        )


@lru_cache(maxsize=LONGEST_MATRIX // STEP)
def _causal_bias(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size): −∞ right of the diagonal, 0 elsewhere. Added, it costs a third of what a mask filled in costs."""
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu_(1)
