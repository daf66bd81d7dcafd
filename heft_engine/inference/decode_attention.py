"""Attention of one new token a sequence against all that its slot holds: one call a chunk of slots, not one a sequence.

torch's fused kernel treats every sequence of a call on its own, so a sequence's bits don't depend on the others; with
a soft cap there is no such kernel, and matrix products of one fixed shape do the same. A query sees its own window of
absolute positions. It does NOT know models or samplers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from heft_engine.inference.kv_cache import CHUNK, Chunk


class DecodeAttention:
    """One step of all slots of these chunks, chunk by chunk in the flat batch. See `packing.Decoding`."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._parts = [_Part(chunk) for chunk in chunks]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query (1, heads, B, head_dim), key and value (1, kv_heads, B, head_dim) → (1, B, heads, head_dim).

        Keys and values are written into their slots on the way.
        """
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        sizes = [part.size for part in self._parts]
        pieces = zip(self._parts, *(torch.split(each, sizes) for each in (q, k, v)), strict=True)
        outs = [part.attend(layer, q, k, v, scaling, window, softcap) for part, q, k, v in pieces]
        return torch.cat(outs)[None]


class _Part:
    """The slots of one chunk, each with a new token at position `slot.length`."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.size = len(chunk.slots)
        self._positions = torch.tensor([slot.length for slot in chunk.slots])
        self._biases: dict[tuple[int | None, torch.device], Tensor] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """(slots, heads, head_dim) each → the same."""
        keys, values = self.chunk.layers[layer]
        rows, places = torch.arange(self.size, device=q.device), self._positions.to(q.device)
        keys[rows, :, places], values[rows, :, places] = k, v
        # Query heads of a group stand as so many queries of their one key/value head.
        grouped = q.reshape(self.size, keys.shape[1], -1, q.shape[2])
        bias = self._bias(window, q)
        if softcap is None:
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scaling)
        else:
            scale = scaling if scaling is not None else q.shape[2] ** -0.5
            out = _capped(grouped * scale, keys, values, bias, softcap)
        return out.reshape(q.shape)

    def _bias(self, window: int | None, like: Tensor) -> Tensor:
        """(slots, 1, 1, capacity): 0 where the new token may look, −∞ elsewhere."""
        where = (window, like.device)
        if where not in self._biases:
            place = torch.arange(self.chunk.capacity)[None]
            now = self._positions[:, None]
            seen = place <= now
            if window is not None:
                seen &= place > now - window
            bias = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
            self._biases[where] = bias[:, None, None].to(like)
        return self._biases[where]


def _capped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, softcap: float) -> Tensor:
    rows, padding = len(q), (0, 0, 0, 0, 0, 0, 0, CHUNK - len(q))
    q, k, v, bias = (F.pad(each, padding) for each in (q, k, v, bias))
    scores = torch.tanh((q @ k.transpose(2, 3)).float() / softcap) * softcap + bias
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v)[:rows]
