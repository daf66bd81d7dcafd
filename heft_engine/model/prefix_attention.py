"""Attention of a few last tokens of many rows against keys and values that are kept: all rows in one padded batch.

Row by row, each of these little products costs more in its call than in its arithmetic. No gradient is computed for
what is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heft_engine.model.layout import AttentionOptions, PaddedPrefix


def suffix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: PaddedPrefix,
    layer: int,
    options: AttentionOptions,
) -> Tensor:
    """Attention of flat suffixes: query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim).

    Returns (1, T, heads, head_dim).
    """
    scaling, window, softcap = options
    _, heads, _, width = query.shape
    kv_heads, device = key.shape[1], query.device
    rows, length, groups = len(prefix.rows), prefix.longest, heads // kv_heads
    q, k, v = (
        (each[0] if prefix.is_even else each[0][:, prefix.padded_index.view(-1).to(device)])
        .reshape(-1, rows, length, width)
        .transpose(0, 1)
        for each in (query, key, value)
    )
    # Query heads of a group stand as so many more queries of their one key/value head.
    q = (q * (scaling if scaling is not None else width**-0.5)).reshape(
        rows, kv_heads, groups * length, width
    )
    kept_k, kept_v = prefix.keys_values[layer - prefix.first_layer].to(device)
    before = kept_k.shape[2]
    scores = torch.cat([q @ kept_k.transpose(2, 3), q @ k.transpose(2, 3)], dim=3).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(rows, heads, length, before + length) + prefix.bias(window, device)
    weights = torch.softmax(scores, dim=-1).to(query.dtype).view(rows, kv_heads, groups * length, -1)
    out = weights[..., :before] @ kept_v + weights[..., before:] @ v
    flat = out.view(rows, heads, length, width).transpose(1, 2).reshape(rows * length, heads, width)
    picked: Tensor = flat if prefix.is_even else flat[prefix.flat_index.to(device)]
    return picked[None]
