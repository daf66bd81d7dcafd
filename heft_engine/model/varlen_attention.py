"""Attention over packed rows on a GPU: one call of torch.nn.attention.varlen a layer, whatever the layout.

Training rows, suffixes on kept keys, branches, cached prefixes and windows are all segments: queries that stand side by
side in the batch, and the keys that they see, the last of which are the queries' own. Where all keys are the batch's in
order, the kernel reads them where they lie; otherwise they are gathered. Cumulative lengths and gather index are the
same for every layer: they are computed on the CPU and copied once a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from heft_engine.model.layout import AttentionOptions, Layout, PackedRow, PrefixKV

#: The kernel's largest head, and the range for whose gradient it wants other GPUs (sm 86, 89 and 120 lack it).
_LARGEST_HEAD = 256
_UNTRAINABLE_HEADS = range(193, 225)
_FIRST_CAPABILITY = (8, 0)
#: Keys that a scoring pass gathers at most: 0.5 GB of keys and values a layer for Llama-2-7B.
MOST_KEYS = 32_768
_MEMO, _FITS = "varlen", "varlen fits"


def is_supported(query: Tensor, options: AttentionOptions) -> bool:
    """Returns True if the kernel takes a layer's attention: CUDA from sm 80, half precision, no soft cap.

    A model on "meta" is planned for such a GPU.
    query: (1, heads, T, head_dim).
    """
    width = query.shape[3]
    return (
        query.device.type in ("cuda", "meta")
        and query.dtype in (torch.bfloat16, torch.float16)
        and options.softcap is None
        and width % 8 == 0
        and width <= _LARGEST_HEAD
        and width not in _UNTRAINABLE_HEADS
        and _has_kernel(query.device)
    )


@lru_cache(maxsize=64)
def _has_kernel(device: torch.device) -> bool:
    if device.type == "meta":
        return True
    # ROCm calls its devices "cuda" too; its kernel does not take num_splits.
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


def fits(layout: Layout) -> bool:
    """Returns False if the branches and cached prefixes of a layout would be gathered into more than MOST_KEYS keys.

    Each branch and each row that continues a prefix has a copy of all that is left of it. A training pass's prefixes
    are planned for (heft_engine.training.plan).
    """
    if layout.prefix is not None:
        return True
    if _FITS not in layout.memo:
        keys = 0
        prefixes = layout.cached_prefixes or (None,) * len(layout.rows)
        for row, prefix in zip(layout.rows, prefixes, strict=True):
            first, *branches = row.segments
            left = first + (prefix.length if prefix is not None else 0)
            keys += left + sum(left + branch for branch in branches)
        layout.memo[_FITS] = keys <= max(MOST_KEYS, sum(row.length for row in layout.rows))
    return cast(bool, layout.memo[_FITS])


def varlen_attention(
    layer: int, query: Tensor, key: Tensor, value: Tensor, layout: Layout, options: AttentionOptions
) -> Tensor:
    """query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim), rotated → (1, T, heads, head_dim)."""
    segments = _segments_of(layout, query.device)
    if layout.kv_sink is not None:
        _write(layout, layer, key, value)
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    if segments.index is not None:
        earlier = _earlier_keys_values(segments, layout, layer, query.device)
        keys, values = (
            torch.cat([*parts, states]).index_select(0, segments.index)
            for parts, states in zip(earlier, (keys, values), strict=True)
        )
    window = (-1, 0) if options.window is None else (options.window - 1, 0)
    # One split: the sums of a row are not cut by the longest row beside it. With a window the kernel may still choose
    # other tiles when no row is longer than the window.
    out = varlen_attn(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        segments.query_starts,
        segments.key_starts,
        segments.most_queries,
        segments.most_keys,
        scale=options.scaling,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
        num_splits=1,
    )
    return cast(Tensor, out)[None]


@dataclass(frozen=True, kw_only=True)
class _Segments:
    """The segments of a layout, on its device.

    query_starts, key_starts: (segments + 1,), int32, cumulative lengths. most_queries, most_keys: of one segment.
    index: (keys,), int32, where each key lies in [kept keys, keys of the batch]; None where it is the batch's, in
    order. prefixes: cached prefixes whose keys are the kept ones, each once.
    """

    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int
    index: Tensor | None
    prefixes: tuple[PrefixKV, ...]


def _segments_of(layout: Layout, device: torch.device) -> _Segments:
    """Returns the layout's segments, computed once a pass and device."""
    at = (_MEMO, device)
    if at not in layout.memo:
        layout.memo[at] = _segments(layout, device)
    return cast(_Segments, layout.memo[at])


def _segments(layout: Layout, device: torch.device) -> _Segments:
    prefix_places, prefixes, prefix_tokens = _prefix_places(layout)
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    index: list[int] = []
    for row, before in zip(layout.rows, prefix_places, strict=True):
        for length, keys in _row_segments(row, before, prefix_tokens):
            query_lengths.append(length)
            key_lengths.append(len(keys))
            index += keys
    is_plain = index == list(range(sum(query_lengths)))
    sizes = [len(query_lengths) + 1, len(key_lengths) + 1, 0 if is_plain else len(index)]
    numbers = [0, *accumulate(query_lengths), 0, *accumulate(key_lengths), *index[: sizes[2]]]
    # One copy of all of them, which nothing waits for.
    table = torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)
    query_starts, key_starts, gathered = torch.split(table, sizes)
    return _Segments(
        query_starts=query_starts,
        key_starts=key_starts,
        most_queries=max(query_lengths),
        most_keys=max(key_lengths),
        index=None if is_plain else gathered,
        prefixes=prefixes,
    )


def _prefix_places(layout: Layout) -> tuple[list[range], tuple[PrefixKV, ...], int]:
    """Returns where the keys left of each row lie among the kept ones, the distinct cached prefixes, all kept keys."""
    if layout.prefix is not None:
        padded = layout.prefix.keys_values.shape[4]
        places_by_row = [range(i * padded, i * padded + n) for i, n in enumerate(layout.prefix.lengths)]
        return places_by_row, (), padded * len(layout.rows)
    places: dict[PrefixKV, range] = {}
    by_prefix, end = [], 0
    for prefix in layout.cached_prefixes or (None,) * len(layout.rows):
        if prefix is None:
            by_prefix.append(range(0))
            continue
        if prefix not in places:
            places[prefix] = range(end, end + prefix.length)
            end += prefix.length
        by_prefix.append(places[prefix])
    return by_prefix, tuple(places), end


def _row_segments(row: PackedRow, before: range, prefix_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Yields the number of queries and the places of the keys of a row's segments."""
    first, *branches = row.segments
    start = prefix_tokens + row.start
    end = start + first
    left = [*before, *range(start, end)]
    if first:
        yield first, left
    for length in branches:
        yield length, [*left, *range(end, end + length)]
        end += length


def _earlier_keys_values(
    segments: _Segments, layout: Layout, layer: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the kept keys and values of a layer, each in parts of (tokens, kv_heads, head_dim)."""
    if layout.prefix is not None:
        both = layout.prefix.keys_values[layer - layout.prefix.first_layer].to(device, non_blocking=True)
        keys, values = both.transpose(2, 3).flatten(1, 2).unbind()
        return [keys], [values]
    pairs = [prefix.keys_values(layer) for prefix in segments.prefixes]
    return _by_token([keys for keys, _ in pairs]), _by_token([values for _, values in pairs])


def _by_token(parts: Sequence[Tensor]) -> list[Tensor]:
    """(1, kv_heads, tokens, head_dim) → (tokens, kv_heads, head_dim), each."""
    return [part[0].transpose(0, 1) for part in parts]


def _write(layout: Layout, layer: int, keys: Tensor, values: Tensor) -> None:
    """Gives each row's keys and values, those of the prompt alone where it has several branches, to the KVSink."""
    assert layout.kv_sink is not None
    for index, row in enumerate(layout.rows):
        place = slice(row.start, row.start + row.segments[0])
        layout.kv_sink.write(layer, index, keys[:, :, place], values[:, :, place])
