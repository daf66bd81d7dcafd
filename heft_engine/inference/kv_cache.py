"""Key/value cache of sequences that are being decoded: slots that grow, under a byte budget.

A slot's capacity grows by about half at a time, so that a new token is written in place and a sequence is copied only
when it outgrows its slot. Slots of one capacity lie together in chunks, so that attention takes a chunk in one call and
adding or removing a sequence copies no more than a chunk. No memory is allocated beyond the slots in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.out_of_memory import is_out_of_memory

MIN_CAPACITY = 64
SLOTS_PER_CHUNK = 8


def capacity_for(tokens: int) -> int:
    """Returns the smallest capacity for so many tokens: 64, 96, 128, 192, 256, …

    It depends on the length alone: a sequence's bits must not depend on the rest of its batch.
    """
    capacity = MIN_CAPACITY
    while capacity < tokens:
        capacity += capacity // 2 if capacity & (capacity - 1) == 0 else capacity // 3
    return capacity


class Slot:
    """The place of one sequence's keys and values, which hold `length` tokens now and at most `max_capacity`."""

    def __init__(self, max_capacity: int) -> None:
        self.max_capacity = max_capacity
        self.length = 0
        self.index = 0
        self.chunk: Chunk

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Writes the first tokens' keys and values, (kv_heads, tokens, head_dim) each."""
        tokens = keys.shape[1]
        self.chunk.layers[layer][0, self.index, :, :tokens] = keys
        self.chunk.layers[layer][1, self.index, :, :tokens] = values


class Chunk:
    """Up to SLOTS_PER_CHUNK slots of one capacity. `layers[i]`: (2, slots, kv_heads, capacity, head_dim)."""

    def __init__(self, capacity: int, layers: list[Tensor]) -> None:
        self.capacity = capacity
        self.layers = layers
        self.slots: list[Slot] = []

    def add(self, slot: Slot) -> None:
        """Appends a slot of zeros: a masked key counts for nothing only if its value is a number.

        Nothing is added if memory runs out.
        """
        try:
            for layer, tensor in enumerate(self.layers):
                zeros = tensor.new_zeros(2, 1, *tensor.shape[2:])
                self.layers[layer] = torch.cat([tensor, zeros], dim=1)
        except BaseException:
            self.layers = [_cut(tensor, len(self.slots)) for tensor in self.layers]
            raise
        slot.chunk, slot.index = self, len(self.slots)
        self.slots.append(slot)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of its tensors' memory: also those behind the slots, where there was no memory to copy the rest."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.layers)

    def remove(self, index: int) -> None:
        """Removes the slot at an index; the last one moves into its place."""
        last = self.slots.pop()
        is_last = index == len(self.slots)
        for layer, tensor in enumerate(self.layers):
            if not is_last:
                tensor[:, index] = tensor[:, -1]
            self.layers[layer] = _cut(tensor, len(self.slots))
        if not is_last:
            self.slots[index] = last
            last.index = index


class KVCache:
    """All slots of one model. A sequence reserves the most that it may need before it gets a slot."""

    def __init__(self, lm: PackedLM, budget_bytes: int) -> None:
        self._devices = [_device_of(layer) for layer in lm.layers]
        self._dtype = lm.dtype
        self._shape = lm.kv_shape
        self.budget_bytes = budget_bytes
        self.reserved_bytes = 0
        self.allocated_bytes = 0
        self._chunks: dict[int, list[Chunk]] = {}

    def bytes_for(self, tokens: int) -> int:
        heads, head_dim = self._shape
        return 2 * len(self._devices) * heads * capacity_for(tokens) * head_dim * self._dtype.itemsize

    def chunks(self) -> Iterator[Chunk]:
        for capacity in sorted(self._chunks):
            yield from self._chunks[capacity]

    def allocate(self, tokens: int, max_tokens: int) -> Slot:
        """Returns a slot for `tokens` that may grow to `max_tokens`. The caller has checked the budget."""
        slot = Slot(capacity_for(max_tokens))
        self._insert(slot, capacity_for(tokens))
        self.reserved_bytes += self.bytes_for(slot.max_capacity)
        slot.length = tokens
        return slot

    def grow(self, slot: Slot) -> None:
        """Makes room for one more token. If memory runs out, the slot stays as it is."""
        if slot.length < slot.chunk.capacity:
            return
        chunk, index = slot.chunk, slot.index
        self._insert(slot, capacity_for(slot.length + 1))
        for tensor, contents in zip(slot.chunk.layers, chunk.layers, strict=True):
            tensor[:, slot.index, :, : slot.length] = contents[:, index]
        self._remove(chunk, index)

    def free(self, slot: Slot) -> None:
        self.reserved_bytes -= self.bytes_for(slot.max_capacity)
        self._remove(slot.chunk, slot.index)

    def clear(self) -> None:
        """Frees every slot."""
        self._chunks.clear()
        self.reserved_bytes = self.allocated_bytes = 0

    def _insert(self, slot: Slot, capacity: int) -> None:
        chunks = self._chunks.setdefault(capacity, [])
        chunk = next((chunk for chunk in chunks if len(chunk.slots) < SLOTS_PER_CHUNK), None)
        if chunk is None:
            heads, head_dim = self._shape
            empty = [
                torch.empty(2, 0, heads, capacity, head_dim, dtype=self._dtype, device=device)
                for device in self._devices
            ]
            chunk = Chunk(capacity, empty)
            chunks.append(chunk)
        try:
            self._change(chunk, lambda: chunk.add(slot))
        finally:
            if not chunk.slots:
                self._drop(chunk)

    def _remove(self, chunk: Chunk, index: int) -> None:
        self._change(chunk, lambda: chunk.remove(index))
        if not chunk.slots:
            self._drop(chunk)

    def _change(self, chunk: Chunk, change: Callable[[], None]) -> None:
        """Changes a chunk, and counts its memory whatever happens."""
        before = chunk.allocated_bytes
        try:
            change()
        finally:
            self.allocated_bytes += chunk.allocated_bytes - before

    def _drop(self, chunk: Chunk) -> None:
        self.allocated_bytes -= chunk.allocated_bytes
        self._chunks[chunk.capacity].remove(chunk)


def _cut(tensor: Tensor, slots: int) -> Tensor:
    """Returns a chunk's tensor with its first slots alone.

    The memory of the others stays in use where there is none for a copy.
    """
    if tensor.shape[1] == slots:
        return tensor
    try:
        return tensor[:, :slots].clone()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return tensor[:, :slots]


def _device_of(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device
