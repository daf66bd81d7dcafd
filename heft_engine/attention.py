"""Attention over packed rows, one row at a time, registered with transformers under the name IMPLEMENTATION.

Row by row keeps `is_causal` (no mask tensor, so the fast kernels stay on) and gives every row the same bits whatever
it is packed with. Windows count absolute positions inside a row. An option that is not implemented here is an error:
a function that swallows `sliding_window` or `softcap` is wrong by 0.4 to 2.0 in the logits, silently.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from heft_engine.packing import Layout, PackedRow

IMPLEMENTATION = "heft_packed"

#: What decoder layers pass along and attention has no use for.
_IRRELEVANT = frozenset({"position_ids", "use_cache", "past_key_values", "layer_past", "cache_position"})


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query (B, heads, Q, head_dim), key and value (B, kv_heads, K, head_dim) → (B, Q, heads, head_dim).

    With a layout: B = 1 and Q = K = T tokens of packed rows. Without one: Q = 1, the newest token of rows of equal
    length against all of its K cached tokens (decoding). Raises ValueError for anything else.
    """
    unknown = [
        name
        for name in options.keys() - _IRRELEVANT
        if options[name] is not None and options[name] is not False
    ]
    if unknown or attention_mask is not None or dropout:
        raise ValueError(f"packed attention does not implement {sorted(unknown) or 'masks and dropout'}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if layout is None:
        if query.shape[2] != 1:
            raise ValueError("without a layout, packed attention takes one new token a row")
        end = key.shape[2]
        start = max(0, end - sliding_window) if sliding_window else 0
        out = _attend(query, key[:, :, start:], value[:, :, start:], scaling, None, softcap)
        return out.transpose(1, 2), None
    outs: list[Tensor] = []
    for row in layout.rows:
        outs += _row(row, query, key, value, scaling, sliding_window, softcap)
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1), None


def _row(
    row: PackedRow,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    start, stem = row.start, row.start + row.prompt
    if len(row.branches) == 1:
        stem += row.branches[0]
    q, k, v = (part[:, :, start:stem] for part in (query, key, value))
    outs = [_attend(q, k, v, scaling, window, softcap)]
    if len(row.branches) > 1:
        at = stem
        for length in row.branches:
            own = slice(at, at + length)
            outs.append(
                _attend(
                    query[:, :, own],
                    torch.cat([k, key[:, :, own]], dim=2),
                    torch.cat([v, value[:, :, own]], dim=2),
                    scaling,
                    window,
                    softcap,
                )
            )
            at += length
    return outs


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of the last Q of K tokens: query i stands at position K − Q + i."""
    queries, keys = q.shape[2], k.shape[2]
    windowed = window is not None and keys > window
    mask: Tensor | None = None
    if windowed or (queries not in (1, keys)) or (softcap is not None and queries > 1):
        position = torch.arange(keys - queries, keys, device=q.device)[:, None]
        past = torch.arange(keys, device=q.device)[None, :]
        mask = past <= position
        if windowed:
            mask &= past > position - window  # type: ignore[operator]
    if softcap is None:
        causal = mask is None and queries > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    scores = torch.tanh((q @ k.transpose(-1, -2)) * scale / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout says what a mask would."""


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
