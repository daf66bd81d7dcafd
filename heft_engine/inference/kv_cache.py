"""Keys and values of sequences that are being written, in slots that grow, under a byte budget.

A slot has one of a few capacities, about half as large again from one to the next, so that a new token is written in
place and a sequence is copied only when it outgrows its slot. Slots of one capacity lie together in chunks of at most
CHUNK, so that attention takes a chunk in one call and neither joining nor leaving copies more than a chunk. What is
allocated is what the slots in use need, never more.

It does NOT know attention, nor whose sequence is in a slot.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from heft_engine.model.packed_lm import PackedLM

SMALLEST = 64
CHUNK = 8


def capacity_for(tokens: int) -> int:
    """The smallest capacity that holds so many tokens: 64, 96, 128, 192, 256, … A function of the length alone, so
    that a sequence is computed alike whatever it is beside."""
    capacity = SMALLEST
    while capacity < tokens:
        capacity += capacity // 2 if capacity & (capacity - 1) == 0 else capacity // 3
    return capacity


class Slot:
    """Where one sequence's keys and values lie. `length` of its tokens are there; `final` is its last capacity."""

    def __init__(self, final: int) -> None:
        self.final = final
        self.length = 0
        self.index = 0
        self.chunk: Chunk

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The first tokens' keys and values, (kv_heads, T, head_dim) each."""
        tokens = keys.shape[1]
        self.chunk.layers[layer][0, self.index, :, :tokens] = keys
        self.chunk.layers[layer][1, self.index, :, :tokens] = values


class Chunk:
    """Up to CHUNK slots of one capacity. `layers[i]`: (2, slots, kv_heads, capacity, head_dim)."""

    def __init__(self, capacity: int, empty: list[Tensor]) -> None:
        self.capacity = capacity
        self.layers = empty
        self.slots: list[Slot] = []

    def add(self, slot: Slot) -> None:
        """Zeros, not whatever was in memory: a masked key counts for nothing only if its value is a number."""
        for layer, held in enumerate(self.layers):
            room = held.new_zeros(2, 1, *held.shape[2:])
            self.layers[layer] = torch.cat([held, room], dim=1)
        slot.chunk, slot.index = self, len(self.slots)
        self.slots.append(slot)

    def remove(self, slot: Slot) -> None:
        """The last slot moves into the gap."""
        last = self.slots.pop()
        for layer, held in enumerate(self.layers):
            if last is not slot:
                held[:, slot.index] = held[:, last.index]
            self.layers[layer] = held[:, :-1].clone()
        if last is not slot:
            self.slots[slot.index] = last
            last.index = slot.index


class KVCache:
    """All slots of one model. A sequence reserves what it may come to need before it gets one."""

    def __init__(self, lm: PackedLM, budget_bytes: int) -> None:
        self._places = [_device_of(layer) for layer in lm.layers]
        self._dtype = lm.dtype
        self._shape = lm.kv_shape
        self.budget_bytes = budget_bytes
        self.reserved_bytes = 0
        self.allocated_bytes = 0
        self._chunks: dict[int, list[Chunk]] = {}

    def bytes_for(self, tokens: int) -> int:
        heads, width = self._shape
        return 2 * len(self._places) * heads * capacity_for(tokens) * width * self._dtype.itemsize

    def chunks(self) -> Iterator[Chunk]:
        for capacity in sorted(self._chunks):
            yield from self._chunks[capacity]

    def allocate(self, tokens: int, final_tokens: int) -> Slot:
        """A slot for `tokens` that may grow to `final_tokens`. The caller has seen that there is room."""
        slot = Slot(capacity_for(final_tokens))
        self._put(slot, capacity_for(tokens))
        self.reserved_bytes += self.bytes_for(slot.final)
        slot.length = tokens
        return slot

    def grow(self, slot: Slot) -> None:
        """Makes room for one more token."""
        if slot.length < slot.chunk.capacity:
            return
        kept = [held[:, slot.index].clone() for held in slot.chunk.layers]
        self._take_out(slot)
        self._put(slot, capacity_for(slot.length + 1))
        for held, before in zip(slot.chunk.layers, kept, strict=True):
            held[:, slot.index, :, : slot.length] = before

    def free(self, slot: Slot) -> None:
        self.reserved_bytes -= self.bytes_for(slot.final)
        self._take_out(slot)

    def clear(self) -> None:
        """Forgets every slot."""
        self._chunks.clear()
        self.reserved_bytes = self.allocated_bytes = 0

    def _put(self, slot: Slot, capacity: int) -> None:
        chunks = self._chunks.setdefault(capacity, [])
        chunk = next((chunk for chunk in chunks if len(chunk.slots) < CHUNK), None)
        if chunk is None:
            heads, width = self._shape
            empty = [
                torch.empty(2, 0, heads, capacity, width, dtype=self._dtype, device=device)
                for device in self._places
            ]
            chunk = Chunk(capacity, empty)
            chunks.append(chunk)
        chunk.add(slot)
        self.allocated_bytes += self.bytes_for(capacity)

    def _take_out(self, slot: Slot) -> None:
        chunk = slot.chunk
        chunk.remove(slot)
        self.allocated_bytes -= self.bytes_for(chunk.capacity)
        if not chunk.slots:
            self._chunks[chunk.capacity].remove(chunk)


def _device_of(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device
