"""Attention of packed rows on AMX, all rows of a pass in one call."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from heft_engine.cpu import operators
from heft_engine.cpu.amx import AmxOps, Segments
from heft_engine.model.layout import AttentionOptions, Layout, PrefixKV

#: Under which a layout's memo has its segments and prefixes.
_SEGMENTS = "amx_segments"


def amx_for(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> AmxOps | None:
    """Returns the AMX operators if they support the rows of a pass: query, key and value (…, head_dim)."""
    amx = operators.amx_ops()
    if amx is None or torch.is_grad_enabled() or options.softcap is not None:
        return None
    if layout.decoding is not None or layout.prefix is not None:
        return None
    same_width = query.shape[-1] == key.shape[-1] == value.shape[-1]
    return amx if same_width and all(map(amx.supports_heads, (query, key, value))) else None


def attend(
    amx: AmxOps,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    options: AttentionOptions,
) -> Tensor:
    """query (T, heads, head_dim), key and value (T, kv_heads, head_dim) → (T, heads, head_dim)."""
    if layout.kv_sink is not None:
        for index, row in enumerate(layout.rows):
            tokens = row.length if len(row.branches) < 2 else row.prompt_length
            row_keys, row_values = (
                states[row.start : row.start + tokens].transpose(0, 1)[None] for states in (key, value)
            )
            layout.kv_sink.write(layer, index, row_keys, row_values)
    if _SEGMENTS not in layout.memo:
        layout.memo[_SEGMENTS] = _segments(layout)
    segments, prefixes = cast(tuple[Segments, list[PrefixKV]], layout.memo[_SEGMENTS])
    sources = [(key, value)]
    for prefix in prefixes:
        keys, values = prefix.keys_values(layer)
        sources.append((keys[0].transpose(0, 1), values[0].transpose(0, 1)))
    return amx.attention(query, sources, segments, options.scaling, options.window)


def _segments(layout: Layout) -> tuple[Segments, list[PrefixKV]]:
    """Returns what each row's tokens attend to: source 0 are the tokens of the pass, those after it the prefixes."""
    sources: dict[PrefixKV, int] = {}
    segments = []
    for index, row in enumerate(layout.rows):
        prefix = layout.cached_prefixes[index] if layout.cached_prefixes is not None else None
        left = [] if prefix is None else [(sources.setdefault(prefix, 1 + len(sources)), 0, prefix.length)]
        if len(row.branches) < 2:
            segments.append((row.start, row.length, [*left, (0, row.start, row.length)]))
            continue
        prompt = (0, row.start, row.prompt_length)
        segments.append((row.start, row.prompt_length, [*left, prompt]))
        start = row.start + row.prompt_length
        for length in row.branches:
            segments.append((start, length, [*left, prompt, (0, start, length)]))
            start += length
    return Segments(segments), list(sources)
