"""Attention of a few last tokens of many rows against keys and values that are kept: all rows in one padded batch.

Row by row, each of these little products costs more in its call than in its arithmetic. No gradient is computed for
what is kept. It does NOT know where the prefixes come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from heft_engine.model.packing import PackedRow


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What stands left of a batch of suffixes, padded to the longest.

    keys_values: (layers, 2, rows, kv_heads, P, head_dim), `first_layer` being the first. lengths: of each row, ≤ P.
    `rows` are the suffixes, each one causal sequence.
    """

    first_layer: int
    keys_values: Tensor
    lengths: tuple[int, ...]
    rows: tuple[PackedRow, ...]
    _biases: dict[int | None, Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        first_layer: int, kept: Sequence[Tensor], rows: tuple[PackedRow, ...], device: torch.device
    ) -> Prefix:
        """From one tensor a row, (layers, 2, kv_heads, length, head_dim)."""
        lengths = tuple(each.shape[3] for each in kept)
        layers, two, heads, _, width = kept[0].shape
        padded = kept[0].new_zeros(layers, two, len(kept), heads, max(lengths), width, device=device)
        for index, (each, length) in enumerate(zip(kept, lengths, strict=True)):
            padded[:, :, index, :, :length] = each
        return Prefix(first_layer=first_layer, keys_values=padded, lengths=lengths, rows=rows)

    @cached_property
    def longest(self) -> int:
        """S: tokens of the longest suffix."""
        return max(row.length for row in self.rows)

    @cached_property
    def is_even(self) -> bool:
        """Whether all suffixes are as long, so that the flat batch is the padded one."""
        return all(row.length == self.longest for row in self.rows)

    @cached_property
    def padded_index(self) -> Tensor:
        """(rows, S): where each row's tokens lie in the flat batch; padding points at the row's first token."""
        device = self.keys_values.device
        starts = torch.tensor([row.start for row in self.rows], device=device)
        lengths = torch.tensor([row.length for row in self.rows], device=device)
        offsets = torch.arange(self.longest, device=device)
        return starts[:, None] + torch.where(offsets[None] < lengths[:, None], offsets[None], 0)

    @cached_property
    def flat_index(self) -> Tensor:
        """(T,): where each flat token lies in (rows · S)."""
        places = [torch.arange(row.length) + index * self.longest for index, row in enumerate(self.rows)]
        return torch.cat(places).to(self.keys_values.device)

    def bias(self, window: int | None, device: torch.device) -> Tensor:
        """(rows, 1, S, P + S), float32: 0 where a suffix token may look, −∞ elsewhere. Windows count positions."""
        if window not in self._biases:
            self._biases[window] = self._new_bias(window, device)
        return self._biases[window].to(device)

    def _new_bias(self, window: int | None, device: torch.device) -> Tensor:
        before = torch.tensor(self.lengths, device=device)[:, None]
        own = torch.tensor([row.length for row in self.rows], device=device)[:, None]
        prefix = torch.arange(self.keys_values.shape[4], device=device)[None]
        suffix = torch.arange(self.longest, device=device)[None]
        exists = torch.cat([prefix < before, suffix < own], dim=1)  # (rows, P + S)
        position = torch.cat([prefix.expand(len(self.rows), -1), before + suffix], dim=1)
        query = (before + suffix)[:, :, None]
        seen = exists[:, None, :] & (position[:, None, :] <= query)
        if window is not None:
            seen &= position[:, None, :] > query - window
        # A padded query must see something: the softmax of nothing is no number.
        seen |= (suffix >= own)[:, :, None]
        return torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))[:, None]


def suffix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    layer: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Of flat suffixes: query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim).

    Returns (1, T, heads, head_dim).
    """
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
