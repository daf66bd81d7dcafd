"""Attention of one new token a sequence to the sequence's cached tokens, one call a chunk of slots.

torch's fused kernel treats every sequence of a call by itself, so a sequence's bits don't depend on the others. It
knows no soft cap; with one, matrix products of one fixed shape have the same property. Windows count absolute
positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from heft_engine.inference.kv_cache import SLOTS_PER_CHUNK, Chunk
from heft_engine.model.layout import AttentionOptions


class DecodeAttention:
    """One decoding step of all slots of some chunks, whose sequences stand in the flat batch chunk by chunk.

    Implements `layout.DecodeStep`.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = [_ChunkAttention(chunk) for chunk in chunks]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """query (1, heads, B, head_dim), key and value (1, kv_heads, B, head_dim) → (1, B, heads, head_dim).

        Writes the new keys and values into their slots.
        """
        sizes = [chunk.size for chunk in self._chunks]
        q, k, v = (torch.split(states[0].transpose(0, 1), sizes) for states in (query, key, value))
        outputs = [chunk.attend(layer, q[i], k[i], v[i], options) for i, chunk in enumerate(self._chunks)]
        return torch.cat(outputs)[None]


class _ChunkAttention:
    """The slots of one chunk, each with a new token at position `slot.length`."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.size = len(chunk.slots)
        self._positions = torch.tensor([slot.length for slot in chunk.slots])
        self._biases: dict[tuple[int | None, torch.device], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """q (slots, heads, head_dim), k and v (slots, kv_heads, head_dim) → (slots, heads, head_dim)."""
        scaling, window, softcap = options
        keys, values = self.chunk.layers[layer]
        slots, positions = torch.arange(self.size, device=q.device), self._positions.to(q.device)
        keys[slots, :, positions], values[slots, :, positions] = k, v
        # Grouped-query attention: a group's query heads become queries of its one key/value head.
        grouped = q.reshape(self.size, keys.shape[1], -1, q.shape[2])
        bias = self._bias(window, q)
        if softcap is None:
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scaling)
        else:
            scale = scaling if scaling is not None else q.shape[2] ** -0.5
            out = _capped_attention(grouped * scale, keys, values, bias, softcap)
        return out.reshape(q.shape)

    def _bias(self, window: int | None, like: Tensor) -> Tensor:
        """Returns (slots, 1, 1, capacity): 0 where the new token may look, −∞ elsewhere."""
        key = (window, like.device)
        if key not in self._biases:
            cached = torch.arange(self.chunk.capacity)[None]
            current = self._positions[:, None]
            visible = cached <= current
            if window is not None:
                visible &= cached > current - window
            bias = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
            self._biases[key] = bias[:, None, None].to(like)
        return self._biases[key]


def _capped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, softcap: float) -> Tensor:
    """Attention with logits softcap · tanh(q·k / softcap), padded to a whole chunk."""
    slots, padding = len(q), (0, 0, 0, 0, 0, 0, 0, SLOTS_PER_CHUNK - len(q))
    q, k, v, bias = (F.pad(tensor, padding) for tensor in (q, k, v, bias))
    logits = torch.tanh((q @ k.transpose(2, 3)).float() / softcap) * softcap + bias
    return (torch.softmax(logits, dim=-1).to(v.dtype) @ v)[:slots]
