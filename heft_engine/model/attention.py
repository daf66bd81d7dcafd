"""Attention over packed rows, registered with transformers under the name IMPLEMENTATION.

On a GPU all rows attend in one call (heft_engine.model.varlen_attention), unless its kernel refuses the layer. Else
each row attends alone, which keeps `is_causal` (no mask tensor, so the fast kernels stay on) and gives every row the
same bits whatever it is packed with. Windows count absolute positions inside a row. An option that is not implemented
here is an error: a function that swallows `sliding_window` or `softcap` is wrong by 0.4 to 2.0 in the logits, silently.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from heft_engine.model import varlen_attention
from heft_engine.model.backend import TorchBackend
from heft_engine.model.causal_attention import LONGEST_MATRIX, CausalAttention, causal
from heft_engine.model.layout import AttentionGroup, AttentionOptions, Layout
from heft_engine.model.prefix_attention import suffix_attention
from heft_engine.runtime.transfers import to_device

IMPLEMENTATION = "heft_packed"

#: Entries of the largest mask that is cached: that of a row of 4,096 tokens would take 16 MB.
_MOST_CACHED = 1 << 18

#: Arguments that decoder layers pass on and attention has no use for.
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
    backend: TorchBackend | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim) → (1, T, heads, head_dim).

    T are the tokens of packed rows, which `layout` describes. Raises ValueError for anything else.
    """
    unknown = [
        name
        for name in options.keys() - _IRRELEVANT
        if options[name] is not None and options[name] is not False
    ]
    if unknown or attention_mask is not None or dropout:
        raise ValueError(f"packed attention does not implement {sorted(unknown) or 'masks and dropout'}")
    if layout is None:
        raise ValueError("packed attention needs a layout")
    layer = cast(int, getattr(module, "layer_idx", -1))
    how = AttentionOptions(scaling, sliding_window, softcap)
    if layout.decoding is not None:
        return layout.decoding.attend(layer, query, key, value, how), None
    if varlen_attention.is_supported(query, how) and varlen_attention.fits(layout):
        return varlen_attention.varlen_attention(layer, query, key, value, layout, how), None
    if layout.prefix is not None:
        return suffix_attention(query, key, value, layout.prefix, layer, how), None
    out = backend.attention(layer, query, key, value, layout, how) if backend is not None else None
    return (attend_rows(layer, query, key, value, layout, how) if out is None else out), None


def attend_rows(
    layer: int, query: Tensor, key: Tensor, value: Tensor, layout: Layout, options: AttentionOptions
) -> Tensor:
    """Packed attention with torch: one call for every row, and one for every branch of a row."""
    # One split of each tensor, never a slice a row: the gradient of a slice is a tensor of zeros as long as the batch.
    lengths = [length for group in layout.groups for length in _segments(layout, group)]
    queries, keys, values = (_split(states, lengths) for states in (query, key, value))
    outs: list[Tensor] = []
    for group in layout.groups:
        first = len(outs)
        prompt_key, prompt_value = keys[first], values[first]
        if layout.kv_sink is not None:
            _write(layout, layer, group, prompt_key, prompt_value)
        prefix = layout.cached_prefixes[group.first] if layout.cached_prefixes is not None else None
        if prefix is not None:
            prefix_key, prefix_value = prefix.keys_values(layer)
            prompt_key = torch.cat([prefix_key, prompt_key], dim=2)
            prompt_value = torch.cat([prefix_value, prompt_value], dim=2)
        if group.end - group.first > 1:
            outs.append(_attend_group(queries[first], prompt_key, prompt_value, group, layout, options))
            continue
        outs.append(_attend(queries[first], prompt_key, prompt_value, layout, options))
        for branch in range(first + 1, first + len(_segments(layout, group))):
            key = torch.cat([prompt_key, keys[branch]], dim=2)
            value = torch.cat([prompt_value, values[branch]], dim=2)
            outs.append(_attend(queries[branch], key, value, layout, options))
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1)


def _segments(layout: Layout, group: AttentionGroup) -> list[int]:
    """Returns the lengths of the segments of a group: the prompt and each branch of a row with several branches.

    A row with one branch is one causal sequence; rows of one group are one segment.
    """
    rows = layout.rows[group.first : group.end]
    return list(rows[0].segments) if len(rows) == 1 else [sum(row.length for row in rows)]


def _split(states: Tensor, lengths: list[int]) -> list[Tensor]:
    """(1, heads, T, head_dim) → one tensor a segment.

    On a CPU each is a copy, in whose memory everything lies as if the segment were alone: a library's sums may depend
    on that.
    """
    parts = torch.split(states, lengths, 2)
    if states.device.type != "cpu" or torch.is_grad_enabled():
        return list(parts)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _write(layout: Layout, layer: int, group: AttentionGroup, keys: Tensor, values: Tensor) -> None:
    """Gives each row's keys and values to the layout's KVSink."""
    assert layout.kv_sink is not None
    if group.end - group.first == 1:
        layout.kv_sink.write(layer, group.first, keys, values)
        return
    lengths = [row.length for row in layout.rows[group.first : group.end]]
    by_row = zip(torch.split(keys, lengths, 2), torch.split(values, lengths, 2), strict=True)
    for index, (row_keys, row_values) in enumerate(by_row, group.first):
        layout.kv_sink.write(layer, index, row_keys, row_values)


def _attend_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: AttentionGroup,
    layout: Layout,
    options: AttentionOptions,
) -> Tensor:
    """Attention of several rows to their common prefix and, each, to its own tokens."""
    lengths = tuple(row.length for row in layout.rows[group.first : group.end])
    mask = _cached_mask(layout, lengths, key.shape[2], options.window, query.device)
    return _masked(query, key, value, options, mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, options: AttentionOptions) -> Tensor:
    """Causal attention of the last Q of K tokens: query i stands at position K − Q + i."""
    queries, keys, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    scaling, window, softcap = options
    if queries == 1:
        # One token sees all that is left of it. The query heads of a group stand as so many queries of one head,
        # so that keys and values need not be repeated.
        seen = slice(max(0, keys - window) if window else 0, keys)
        grouped = q.reshape(q.shape[0], k.shape[1], groups, q.shape[3])
        return _kernel(grouped, k[:, :, seen], v[:, :, seen], options, None).reshape(q.shape)
    if queries == keys and (window is None or keys <= window) and softcap is None:
        scale = scaling if scaling is not None else q.shape[3] ** -0.5
        if q.device.type == "cpu" and keys <= LONGEST_MATRIX and torch.is_grad_enabled():
            return cast(Tensor, CausalAttention.apply(q, k, v, scale))  # type: ignore[no-untyped-call]
        return causal(q, k, v, scale)
    return _masked(q, k, v, options, _cached_mask(layout, (queries,), keys, window, q.device))


def _masked(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, mask: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and (options.softcap is not None or q.device.type != "cpu" or torch.is_grad_enabled()):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return _kernel(q, k, v, options, mask)


def _cached_mask(
    layout: Layout, lengths: tuple[int, ...], keys: int, window: int | None, device: torch.device
) -> Tensor:
    """`_mask`, computed once a batch unless it is large."""
    if sum(lengths) * keys > _MOST_CACHED:
        return _mask(lengths, keys, window, device)
    at = (lengths, keys, window, device)
    if at not in layout.memo:
        layout.memo[at] = _mask(lengths, keys, window, device)
    return cast(Tensor, layout.memo[at])


def _mask(lengths: tuple[int, ...], keys: int, window: int | None, device: torch.device) -> Tensor:
    """Returns (sum of lengths, keys): True where a token of rows of these lengths sees one of the keys.

    The keys end with the rows' own. A token sees all keys left of the rows and its own row's up to itself, within the
    window; none of another row's.
    """
    left = keys - sum(lengths)
    offsets = torch.cat([torch.arange(length, device=device) for length in lengths])
    position = torch.cat([torch.arange(left, device=device), left + offsets])
    queries = position[left:, None]
    mask = position <= queries
    if len(lengths) > 1:
        row = to_device(torch.repeat_interleave(torch.tensor(lengths)), device)
        mask[:, left:] &= row == row[:, None]
    if window is not None:
        mask &= position > queries - window
    return mask


def _kernel(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, mask: Tensor | None) -> Tensor:
    scaling, _, softcap = options
    if softcap is None:
        shared = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=shared)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    scores = torch.tanh((q @ k.transpose(-1, -2)) * scale / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout says what a mask would."""


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
