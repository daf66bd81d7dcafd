"""Attention over packed rows, one row at a time, registered with transformers under the name IMPLEMENTATION.

Row by row keeps `is_causal` (no mask tensor, so the fast kernels stay on) and gives every row the same bits whatever
it is packed with. Windows count absolute positions inside a row. An option that is not implemented here is an error:
a function that swallows `sliding_window` or `softcap` is wrong by 0.4 to 2.0 in the logits, silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from heft_engine.cpu import operators
from heft_engine.cpu.amx import AmxOps, Segments
from heft_engine.model.causal_attention import LONGEST_MATRIX, CausalAttention, causal
from heft_engine.model.packing import TILE, KVSink, Layout, PackedRow, PrefixKV, Run, Tiles
from heft_engine.model.prefix_attention import suffix_attention

IMPLEMENTATION = "heft_packed"

#: Entries of a mask that is kept: a row of 4,096 tokens would take 16 MB.
_MOST_KEPT = 1 << 18

#: Under which a layout keeps its `Segments`.
_SEGMENTS = "segments"

#: Query, key and value of one segment after another.
Parts = Iterator[tuple[Tensor, Tensor, Tensor]]

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

    B = 1 and Q = K = T tokens of packed rows, which `layout` describes. Raises ValueError for anything else.
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
    if layout.decoding is not None:
        layer = cast(int, module.layer_idx)
        return layout.decoding.attend(layer, query, key, value, scaling, sliding_window, softcap), None
    if layout.prefix is not None:
        layer = cast(int, module.layer_idx)
        return suffix_attention(
            query, key, value, layout.prefix, layer, scaling, sliding_window, softcap
        ), None
    layer = cast(int, getattr(module, "layer_idx", -1))
    if (amx_ops := amx_for(layout, query, key, value, softcap)) is not None:
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        return amx_attention(amx_ops, layer, q, k, v, layout, scaling, sliding_window)[None], None
    if (tiles := tiles_of(layout, query)) is not None:
        q, k, v = (_filled(each, tiles) for each in (query, key, value))
        return tiled_attention(layer, q, k, v, layout, tiles, scaling, sliding_window, softcap)[None], None
    # One split a tensor, never a slice a row: the gradient of a slice is a tensor of zeros as long as the batch.
    lengths = [length for run in layout.runs for length in _segments(layout.rows[run.first : run.end])]
    parts: Parts = zip(*(_split(each, lengths) for each in (query, key, value)), strict=True)
    outs = [
        out
        for run in layout.runs
        for out in _run(run, layer, layout, parts, scaling, sliding_window, softcap)
    ]
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1), None


def _split(states: Tensor, lengths: list[int]) -> list[Tensor]:
    """(1, heads, T, head_dim) → one tensor a segment. On a CPU each is a copy, in whose memory everything lies as if
    the segment were alone: a library's sums may depend on that."""
    parts = torch.split(states, lengths, 2)
    if states.device.type != "cpu" or torch.is_grad_enabled():
        return list(parts)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def amx_for(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, softcap: float | None
) -> AmxOps | None:
    """The AMX operators, if they support the rows of a pass: (…, head_dim) each."""
    if (
        layout.decoding is not None
        or layout.prefix is not None
        or torch.is_grad_enabled()
        or softcap is not None
    ):
        return None
    amx_ops = operators.amx_ops()
    alike = query.shape[-1] == key.shape[-1] == value.shape[-1]
    takes = amx_ops is not None and alike and all(map(amx_ops.supports_heads, (query, key, value)))
    return amx_ops if takes else None


def amx_attention(
    amx_ops: AmxOps,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """query (T, heads, head_dim), key and value (T, kv_heads, head_dim) → (T, heads, head_dim)."""
    if layout.kv_sink is not None:
        for index, row in enumerate(layout.rows):
            own = slice(row.start, row.start + (row.length if len(row.branches) < 2 else row.prompt_length))
            left = (each[own].transpose(0, 1)[None] for each in (key, value))
            layout.kv_sink.write(layer, index, *left)
    if _SEGMENTS not in layout.memo:
        layout.memo[_SEGMENTS] = _segments_of(layout)
    segments, kept = cast(tuple[Segments, list[PrefixKV]], layout.memo[_SEGMENTS])
    sources = [(key, value)]
    for one in kept:
        keys, values = one.keys_values(layer)
        sources.append((keys[0].transpose(0, 1), values[0].transpose(0, 1)))
    return amx_ops.attention(query, sources, segments, scaling, window)


def _segments_of(layout: Layout) -> tuple[Segments, list[PrefixKV]]:
    """What each row's tokens attend to: those of the pass are source 0, what is kept of prefixes the sources after."""
    places: dict[PrefixKV, int] = {}
    segments = []
    for index, row in enumerate(layout.rows):
        kept = layout.cached_prefixes[index] if layout.cached_prefixes is not None else None
        left = [] if kept is None else [(places.setdefault(kept, 1 + len(places)), 0, kept.length)]
        if len(row.branches) < 2:
            segments.append((row.start, row.length, [*left, (0, row.start, row.length)]))
            continue
        prompt = (0, row.start, row.prompt_length)
        segments.append((row.start, row.prompt_length, [*left, prompt]))
        start = row.start + row.prompt_length
        for length in row.branches:
            segments.append((start, length, [*left, prompt, (0, start, length)]))
            start += length
    return Segments(segments), list(places)


def takes_tiles(states: Tensor) -> bool:
    """Whether attention is quicker with rows that are filled up: in bfloat16 on a CPU, without a gradient."""
    is_bf16_cpu = states.device.type == "cpu" and states.dtype == torch.bfloat16
    return is_bf16_cpu and not torch.is_grad_enabled()


def tiles_of(layout: Layout, states: Tensor) -> Tiles | None:
    """How attention takes the rows of a pass at once, if it can."""
    return layout.tiles if takes_tiles(states) else None


def _filled(states: Tensor, tiles: Tiles) -> Tensor:
    """(1, heads, T, head_dim) → (n, heads, head_dim), zero at the gaps."""
    rows = states[0].transpose(0, 1)
    return rows.new_zeros(len(rows) + len(tiles.gaps), *rows.shape[1:]).index_copy_(0, tiles.places, rows)


def tiled_attention(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    tiles: Tiles,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """query (n, heads, head_dim), key and value (n, kv_heads, head_dim), as `tiles` has them → (T, heads, head_dim).

    What fills a row up stands right of its tokens, where none of them looks, and is zero: what others computed there
    could be no number.
    """
    if layout.kv_sink is not None:
        for row, (start, packed) in enumerate(zip(tiles.starts, layout.rows, strict=True)):
            own = slice(start, start + packed.length)
            left = (each[own].transpose(0, 1)[None] for each in (key, value))
            layout.kv_sink.write(layer, row, *left)
    outs = []
    for start, rows, tokens in tiles.groups:
        group = slice(start, start + rows * tokens)
        q, k, v = (
            each[group].view(rows, tokens, *each.shape[1:]).transpose(1, 2) for each in (query, key, value)
        )
        out = _attend(q, k, v, layout, scaling, sliding_window, softcap)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).index_select(0, tiles.places)


def _segments(rows: tuple[PackedRow, ...]) -> list[int]:
    """A row with one branch is one causal sequence; several branches stand apart from their prompt. Rows of one run
    are taken together."""
    if len(rows) > 1 or len(rows[0].branches) < 2:
        return [sum(row.length for row in rows)]
    return [rows[0].prompt_length, *rows[0].branches]


def _run(
    run: Run,
    layer: int,
    layout: Layout,
    parts: Parts,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Iterator[Tensor]:
    rows = layout.rows[run.first : run.end]
    query, prompt_key, prompt_value = next(parts)
    if layout.kv_sink is not None:
        _show(layout.kv_sink, layer, run, rows, prompt_key, prompt_value)
    if layout.cached_prefixes is not None and (kept := layout.cached_prefixes[run.first]) is not None:
        left_key, left_value = kept.keys_values(layer)
        prompt_key = torch.cat([left_key, prompt_key], dim=2)
        prompt_value = torch.cat([left_value, prompt_value], dim=2)
    if len(rows) > 1:
        lengths = tuple(row.length for row in rows)
        keys = prompt_key.shape[2]
        mask = _mask(layout, lengths, keys, window, query.device)
        yield _masked(query, prompt_key, prompt_value, scaling, softcap, mask)
        return
    yield _attend(query, prompt_key, prompt_value, layout, scaling, window, softcap)
    for _ in rows[0].branches if len(rows[0].branches) > 1 else ():
        query, key, value = next(parts)
        key, value = torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)
        yield _attend(query, key, value, layout, scaling, window, softcap)


def _show(
    kv_sink: KVSink, layer: int, run: Run, rows: tuple[PackedRow, ...], keys: Tensor, values: Tensor
) -> None:
    """Every row's own keys and values, apart."""
    if len(rows) == 1:
        kv_sink.write(layer, run.first, keys, values)
        return
    lengths = [row.length for row in rows]
    own = zip(torch.split(keys, lengths, 2), torch.split(values, lengths, 2), strict=True)
    for index, (row_keys, row_values) in enumerate(own, run.first):
        kv_sink.write(layer, index, row_keys, row_values)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of the last Q of K tokens: query i stands at position K − Q + i."""
    queries, keys, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if queries == keys and queries % TILE and takes_tiles(q):
        # As in `tiled_attention`: a row's bits must not depend on whether all rows of its pass could go there.
        q, k, v = (F.pad(each, (0, 0, 0, -queries % TILE)) for each in (q, k, v))
        return _attend(q, k, v, layout, scaling, window, softcap)[:, :, :queries]
    if queries == 1:
        # One token sees all that is left of it. The query heads of a group stand as so many queries of one head,
        # so that keys and values need not be repeated.
        seen = slice(max(0, keys - window) if window else 0, keys)
        grouped = q.reshape(q.shape[0], k.shape[1], groups, q.shape[3])
        return _kernel(grouped, k[:, :, seen], v[:, :, seen], scaling, softcap, None).reshape(q.shape)
    if queries == keys and (window is None or keys <= window) and softcap is None:
        scale = scaling if scaling is not None else q.shape[3] ** -0.5
        if q.device.type == "cpu" and keys <= LONGEST_MATRIX and torch.is_grad_enabled():
            return cast(Tensor, CausalAttention.apply(q, k, v, scale))  # type: ignore[no-untyped-call]
        return causal(q, k, v, scale)
    return _masked(q, k, v, scaling, softcap, _mask(layout, (queries,), keys, window, q.device))


def _masked(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, softcap: float | None, mask: Tensor
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and (softcap is not None or q.device.type != "cpu" or torch.is_grad_enabled()):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return _kernel(q, k, v, scaling, softcap, mask)


def _mask(
    layout: Layout, lengths: tuple[int, ...], keys: int, window: int | None, device: torch.device
) -> Tensor:
    """`_seen`, made once a batch unless it is large."""
    if sum(lengths) * keys > _MOST_KEPT:
        return _seen(lengths, keys, window, device)
    key = (lengths, keys, window, device)
    if key not in layout.memo:
        layout.memo[key] = _seen(lengths, keys, window, device)
    return cast(Tensor, layout.memo[key])


def _seen(lengths: tuple[int, ...], keys: int, window: int | None, device: torch.device) -> Tensor:
    """(sum of lengths, keys): what rows of these lengths see of keys that end with their own.

    All that is left of them, and what each has itself up to the token, within the window; none of another's.
    """
    left = keys - sum(lengths)
    own = torch.cat([torch.arange(length, device=device) for length in lengths])
    position = torch.cat([torch.arange(left, device=device), left + own])
    queries = position[left:, None]
    mask = position <= queries
    if len(lengths) > 1:
        row = torch.repeat_interleave(torch.tensor(lengths, device=device))
        mask[:, left:] &= row == row[:, None]
    if window is not None:
        mask &= position > queries - window
    return mask


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    softcap: float | None,
    mask: Tensor | None,
) -> Tensor:
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
