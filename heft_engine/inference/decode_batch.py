"""Continuous batching: sequences that join, are written a token at a time in one flat pass, and leave, in any order.

Prompts are prefilled packed, several in one pass, with each request's own scale of the intervention; it acts on prompt
tokens alone, so a written token costs what it costs the plain model. A step takes the newest token of every sequence as
a packed row of one token. Products have fixed shapes and attention treats every sequence on its own, so a sequence's
tokens are the same whatever is beside it.

It does NOT know text, stop strings or who waits: see `admission` and `writing`. One thread at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.inference.decode_attention import DecodeAttention
from heft_engine.inference.kv_cache import KVCache, Slot
from heft_engine.inference.partition import TOKEN_BUDGET
from heft_engine.inference.sampling import SampledToken, Sampler, SamplingParams
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import Layout, PackedRow, RowAdapter, micro_batches, pack

R = TypeVar("R", bound="DecodeRequest")
GREEDY = SamplingParams()


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One sequence to write: at most `max_tokens` (at least 1) after `prompt`. `id` is no other sequence's."""

    id: Hashable
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = GREEDY
    scale: float = 1.0
    #: What the sequence's own model adds to the base.
    adapter: RowAdapter | None = None

    @property
    def kept_tokens(self) -> int:
        """Tokens whose keys and values are kept at the end: the last one written is never fed in."""
        return len(self.prompt) + self.max_tokens - 1


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """What a pass wrote for one sequence."""

    id: Hashable
    choice: SampledToken


class _Sequence:
    def __init__(self, request: DecodeRequest, slot: Slot) -> None:
        self.request = request
        self.slot = slot
        self.sampler = Sampler(request.sampling)
        self.newest = -1
        self.written = 0

    def row(self, start: int) -> PackedRow:
        prompt = len(self.request.prompt)
        return PackedRow(start=start, prompt=prompt, branches=(1,), skipped=prompt)


class DecodeBatch:
    """The sequences that are being written with one model, whose keys and values stay within `budget_bytes`."""

    def __init__(self, lm: PackedLM, *, budget_bytes: int) -> None:
        self._lm = lm
        self._kv_cache = KVCache(lm, budget_bytes)
        self._sequences: dict[Hashable, _Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: Hashable) -> bool:
        return request_id in self._sequences

    @property
    def allocated_bytes(self) -> int:
        """What keys and values hold now."""
        return self._kv_cache.allocated_bytes

    @property
    def budget_bytes(self) -> int:
        return self._kv_cache.budget_bytes

    def bytes_for(self, request: DecodeRequest) -> int:
        """What a request reserves. One that asks for more than the budget can never join."""
        return self._kv_cache.bytes_for(request.kept_tokens)

    def fitting(self, requests: Sequence[R]) -> list[R]:
        """As many of them, from the first on, as have room together now."""
        free = self._kv_cache.budget_bytes - self._kv_cache.reserved_bytes
        taken: list[R] = []
        for request in requests:
            free -= self.bytes_for(request)
            if free < 0:
                break
            taken.append(request)
        return taken

    @torch.inference_mode()
    def join(self, requests: Sequence[DecodeRequest]) -> list[NewToken]:
        """Prefills these prompts, packed, and writes the first token of each. All of them have room.

        If the pass fails, none has joined.
        """
        waiting: dict[Hashable, _Sequence] = {}
        try:
            for request in requests:
                slot = self._kv_cache.allocate(len(request.prompt), request.kept_tokens)
                waiting[request.id] = _Sequence(request, slot)
            tokens = [token for part in _parts(list(waiting.values())) for token in self._prefill(part)]
        except BaseException:
            for sequence in waiting.values():
                self._kv_cache.free(sequence.slot)
            raise
        self._sequences |= waiting
        return tokens

    @torch.inference_mode()
    def step(self) -> list[NewToken]:
        """One more token for every sequence, in one pass."""
        if not self._sequences:
            return []
        over = [s.request.id for s in self._sequences.values() if s.written >= s.request.max_tokens]
        if over:
            raise ValueError(f"these sequences are written to their end and must leave: {over}")
        for sequence in self._sequences.values():
            self._kv_cache.grow(sequence.slot)
        chunks = list(self._kv_cache.chunks())
        by_slot = {id(sequence.slot): sequence for sequence in self._sequences.values()}
        sequences = [by_slot[id(slot)] for chunk in chunks for slot in chunk.slots]
        layout = Layout(
            rows=tuple(sequence.row(start) for start, sequence in enumerate(sequences)),
            decoding=DecodeAttention(chunks),
            adapters=_adapters(sequences),
        )
        device = self._lm.device
        ids = torch.tensor([[sequence.newest for sequence in sequences]], device=device)
        positions = torch.tensor([[sequence.slot.length for sequence in sequences]], device=device)
        with self._lm.inference_mode(one_token=True):
            states = self._lm.run_layers(self._lm.embed(ids), positions, layout, 0, self._lm.n_layers)
            logits = self._lm.logits(self._lm.finish(states)[0])
        for sequence in sequences:
            sequence.slot.length += 1
        return _chosen(sequences, logits)

    @torch.inference_mode()
    def remove(self, request_id: Hashable) -> None:
        """Ends a sequence, between two passes, and frees its slot. One that isn't there is none."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._kv_cache.free(sequence.slot)

    def clear(self) -> None:
        """Ends every sequence and gives all memory back, in whatever state a pass has left it."""
        self._sequences.clear()
        self._kv_cache.clear()

    def _prefill(self, sequences: Sequence[_Sequence]) -> list[NewToken]:
        batch = pack([_bare(sequence.request.prompt) for sequence in sequences])
        layout = replace(
            batch.layout,
            scales=tuple(sequence.request.scale for sequence in sequences),
            kv_sink=_IntoSlots([sequence.slot for sequence in sequences]),
            adapters=_adapters(sequences),
        )
        ends = [row.start + row.prompt - 1 for row in layout.rows]
        device = self._lm.device
        positions = batch.position_ids.to(device)[None]
        with self._lm.inference_mode():
            states = self._lm.embed(batch.input_ids.to(device)[None])
            states = self._lm.run_layers(states, positions, layout, 0, self._lm.n_layers)
        with self._lm.inference_mode(one_token=True):
            logits = self._lm.logits(self._lm.finish(states[:, ends])[0])
        return _chosen(sequences, logits)


class _IntoSlots:
    """Keeps what a prefill leaves behind. See `packing.KVSink`."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots

    def write(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        self._slots[row].write(layer, keys[0], values[0])


def _chosen(sequences: Sequence[_Sequence], logits: Tensor) -> list[NewToken]:
    """The next token of each, from logits (sequences, vocabulary)."""
    likeliest = logits.argmax(dim=-1).tolist()
    tokens = []
    for sequence, best, row in zip(sequences, likeliest, logits, strict=True):
        plain = sequence.request.sampling.is_plain
        choice = SampledToken(token=best) if plain else sequence.sampler.choose(row)
        sequence.newest = choice.token
        sequence.written += 1
        tokens.append(NewToken(id=sequence.request.id, choice=choice))
    return tokens


def _adapters(sequences: Sequence[_Sequence]) -> tuple[RowAdapter | None, ...] | None:
    adapters = tuple(sequence.request.adapter for sequence in sequences)
    return adapters if any(adapter is not None for adapter in adapters) else None


def _bare(prompt: tuple[int, ...]) -> Example:
    return Example(prompt=prompt, answers=(), labels=(), gold=None)


def _parts(sequences: Sequence[_Sequence]) -> list[list[_Sequence]]:
    """Runs of at most TOKEN_BUDGET prompt tokens."""
    parts, start = [], 0
    for part in micro_batches([_bare(each.request.prompt) for each in sequences], TOKEN_BUDGET):
        parts.append(list(sequences[start : start + len(part)]))
        start += len(part)
    return parts
