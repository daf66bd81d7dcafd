"""What never changes while a stage trains, computed once: layers below the lowest trained one, for every token, and
the layers above it for every token left of the first intervened position (attention is causal).

So each row goes through the frozen model once, and an epoch runs only what is left: the suffix from the first
intervened token on, through the upper layers, against cached keys and values. It is the same mathematics; tests hold
every level to the plain computation.

    keys_values     suffix states at the lowest trained layer; keys and values of the layers above, left of the suffix
    states          every token's state at the lowest trained layer; the layers above run again each step, without
                    gradient left of the suffix
    nothing         the whole model runs each step (heft_engine.training.forward_pass.FullPass)

Rows lie one behind the other in one flat tensor, in memory or mapped from a file. It does NOT know losses or
optimisers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from heft_engine.adapters.adapter import Boundary
from heft_engine.config.flops import CacheLevel
from heft_engine.data.encoding import Example
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import Layout, PackedRow, fill, micro_batches, pack, packed_length
from heft_engine.model.prefix_attention import Prefix
from heft_engine.training.activation_store import StageActivations

#: Tokens of one prefill pass. The same cut gives the same bits when the cache is built again.
TOKEN_BUDGET = 4_096
#: Of the keys' and values' bytes: what the states of higher layers may add to a prefill that is kept for later runs.
_STATES_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class CachedRow:
    """Views into the cache. states: (tokens, hidden). keys_values: (layers, 2, kv_heads, skipped, head_dim)."""

    example: Example
    skipped: int
    states: Tensor
    keys_values: Tensor | None


class SuffixCache:
    """The frozen part of every row, on one rung."""

    def __init__(
        self,
        lm: PackedLM,
        boundary: Boundary,
        examples: Sequence[Example],
        level: CacheLevel,
        file: Path | None = None,
        prefills: StageActivations | None = None,
    ) -> None:
        """Runs the prefill, unless `prefills` (of the keys_values rung) has it.

        `file` maps the cache from disk instead of holding it in memory.
        """
        self.lm = lm
        self.boundary = boundary
        self.level: CacheLevel = level
        self.examples = examples
        self._skipped = [boundary.first_token(len(example.prompt)) for example in examples]
        #: Seconds that another run has spent on the prefill; below 0, what this one spends on keeping it for others.
        self.saved_seconds = 0.0
        found = prefills.find(boundary.layer, self._tokens, lm.hidden_size, lm.dtype) if prefills else None
        if found is not None:
            depth = boundary.layer - found.first
            self.rows = self._rows(found.states[depth], found.keys_values, found.first)
            self.saved_seconds = found.seconds
        else:
            self._compute(file, prefills)

    @property
    def _tokens(self) -> int:
        """Whose states are kept."""
        total = sum(map(packed_length, self.examples))
        return total - sum(self._skipped) if self.level == CacheLevel.KV else total

    def _compute(self, file: Path | None, prefills: StageActivations | None) -> None:
        lm, boundary = self.lm, self.boundary
        began = time.monotonic()
        size = size_of(lm, boundary, self.examples, self.level) // lm.dtype.itemsize
        flat = (
            torch.empty(size, dtype=lm.dtype)
            if file is None
            else torch.from_file(str(file), shared=True, size=size, dtype=lm.dtype)
        )
        own, kept = flat[: self._tokens * lm.hidden_size], flat[self._tokens * lm.hidden_size :]
        states = own.view(self._tokens, lm.hidden_size)
        self.rows = self._rows(states, kept, boundary.layer)
        if prefills is not None and not prefills.holds(flat.nbytes):
            prefills = None
        # What lies on disk has no room in memory for more.
        above = self._room_above(kept, prefills) if prefills is not None and file is None else None
        start = tokens = 0
        with torch.no_grad():
            for part in micro_batches(self.examples, TOKEN_BUDGET):
                rows = self.rows[start : start + len(part)]
                self._prefill(part, rows, above[:, tokens:] if above is not None else None)
                start, tokens = start + len(rows), tokens + sum(len(row.states) for row in rows)
        if prefills is not None:
            ready = time.monotonic()
            with suppress(OSError):  # no room for it: later runs compute it again
                prefills.keep(
                    boundary.layer, [states, *(above if above is not None else ())], kept, ready - began
                )
            self.saved_seconds = ready - time.monotonic()

    def _room_above(self, kept: Tensor, prefills: StageActivations) -> Tensor | None:
        """(depths, tokens, hidden) for the states before each layer above the first; None if not worth it."""
        depths = self.lm.n_layers - 1 - self.boundary.layer
        shape = (depths, self._tokens, self.lm.hidden_size)
        size = math.prod(shape) * kept.itemsize
        if depths < 1 or not self.boundary.clear_above or size > _STATES_SHARE * kept.nbytes:
            return None
        own = self._tokens * self.lm.hidden_size * kept.itemsize
        return kept.new_empty(shape) if prefills.holds(own + kept.nbytes + size) else None

    def _rows(self, states: Tensor, kept: Tensor, first: int) -> list[CachedRow]:
        """Views of the rows, one behind the other. states: (tokens, hidden). kept: flat, of the layers from `first`."""
        layers, (kv_heads, head_dim) = self.lm.n_layers - first, self.lm.kv_shape
        rows: list[CachedRow] = []
        token = at = 0
        for example, skipped in zip(self.examples, self._skipped, strict=True):
            length, past = packed_length(example), None
            if self.level == CacheLevel.KV:
                length -= skipped
                size = layers * 2 * kv_heads * skipped * head_dim
                past = kept[at : at + size].view(layers, 2, kv_heads, skipped, head_dim)
                past = past[self.boundary.layer - first :]
                at += size
            own = states[token : token + length]
            token += length
            rows.append(CachedRow(example=example, skipped=skipped, states=own, keys_values=past))
        return rows

    def _prefill(self, examples: Sequence[Example], rows: Sequence[CachedRow], above: Tensor | None) -> None:
        """Fills the rows' views. above: (depths, tokens, hidden), the rows' own suffixes first."""
        lm, boundary = self.lm, self.boundary
        batch = pack(examples)
        ids, positions = batch.input_ids.to(lm.device)[None], batch.position_ids.to(lm.device)[None]
        with lm.interventions.disabled(boundary.interventions):
            states = lm.run_layers(lm.embed(ids), positions, batch.layout, 0, boundary.layer)
        at = [  # where the states that are kept lie in the pass
            token
            for packed, row in zip(batch.layout.rows, rows, strict=True)
            for token in range(packed.start + packed.length - len(row.states), packed.start + packed.length)
        ]
        suffixes = torch.tensor(at, device=lm.device)
        for row, own in zip(
            rows, torch.split(states[0, suffixes], [len(row.states) for row in rows]), strict=True
        ):
            row.states.copy_(own)
        if self.level != CacheLevel.KV:
            return

        def watch(layer: int, states: Tensor) -> None:
            if above is not None and layer > boundary.layer:
                above[layer - boundary.layer - 1, : len(at)] = states[0, suffixes]

        skipped = [row.skipped for row in rows]
        kept = left_keys_values(lm, boundary.layer, states[0], batch.layout, skipped, watch)
        for row, past in zip(rows, kept, strict=True):
            assert row.keys_values is not None
            row.keys_values.copy_(past)

    def suffix(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Layout]:
        """The suffixes of some rows as one batch: states (1, T, hidden), positions (1, T), layout with prefix."""
        rows = [self.rows[index] for index in indices]
        device = self.lm.device
        if self.level == CacheLevel.KV:
            states = [row.states for row in rows]
            kept = [row.keys_values for row in rows if row.keys_values is not None]
        else:
            states = [row.states[row.skipped :] for row in rows]
            kept = self._left(rows) if any(row.skipped for row in rows) else []
        packed, start, positions = [], 0, []
        for row, own in zip(rows, states, strict=True):
            prompt = len(row.example.prompt)
            length = len(own)
            branches = (length - (prompt - row.skipped),) if length > prompt - row.skipped else ()
            packed.append(PackedRow(start=start, prompt=prompt, branches=branches, skipped=row.skipped))
            positions.append(torch.arange(row.skipped, row.skipped + length))
            start += length
        suffixes = tuple(packed)
        prefix = Prefix.of(self.boundary.layer, kept, suffixes, device) if kept else None
        layout = Layout(rows=suffixes, prefix=prefix)
        return torch.cat(states).to(device)[None], torch.cat(positions).to(device)[None], layout

    @torch.no_grad()
    def _left(self, rows: Sequence[CachedRow]) -> list[Tensor]:
        """On the states rung: keys and values left of the suffixes, computed for this step alone."""
        packed, start = [], 0
        for row in rows:
            prompt = len(row.example.prompt)
            packed.append(PackedRow(start=start, prompt=prompt, branches=(), missing=prompt - row.skipped))
            start += row.skipped
        filler = fill(self.lm.device, start) - start
        if filler:
            packed.append(PackedRow(start=start, prompt=filler, branches=()))
        empty = rows[0].states.new_zeros(filler, self.lm.hidden_size)
        states = torch.cat([*(row.states[: row.skipped] for row in rows), empty]).to(self.lm.device)
        lengths = [row.skipped for row in rows] + [0] * (len(packed) - len(rows))
        layout = Layout(rows=tuple(packed))
        return left_keys_values(self.lm, self.boundary.layer, states, layout, lengths)[: len(rows)]


class FirstTokens:
    """A `KVSink` of each row's first `lengths[row]` keys and values."""

    def __init__(self, first_layer: int, lengths: Sequence[int]) -> None:
        self._first_layer = first_layer
        self._lengths = lengths
        self._kept: list[list[Tensor]] = [[] for _ in lengths]

    def write(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        end = self._lengths[row]
        self._kept[row].append(torch.stack([keys[0, :, :end], values[0, :, :end]]))

    def rows(self) -> list[Tensor]:
        """(layers, 2, kv_heads, length, head_dim) a row."""
        return [torch.stack(layers) for layers in self._kept]


def left_keys_values(
    lm: PackedLM,
    layer: int,
    states: Tensor,
    layout: Layout,
    lengths: Sequence[int],
    watch: Callable[[int, Tensor], None] | None = None,
) -> list[Tensor]:
    """Keys and values of the layers from `layer` on, of each row's first `lengths` tokens; states: (T, hidden).

    `watch` is told the states (1, T, hidden) before each layer.
    """
    if layer == lm.n_layers:
        kv_heads, head_dim = lm.kv_shape
        return [states.new_empty(0, 2, kv_heads, length, head_dim) for length in lengths]
    kv_sink = FirstTokens(layer, lengths)
    offsets = [torch.arange(row.length) for row in layout.rows]
    positions = torch.cat(offsets).to(states.device)[None]
    collecting = Layout(rows=layout.rows, scale=layout.scale, kv_sink=kv_sink)
    lm.run_layers(states[None], positions, collecting, layer, lm.n_layers, watch)
    return kv_sink.rows()


def size_of(lm: PackedLM, boundary: Boundary, examples: Sequence[Example], level: CacheLevel) -> int:
    """Bytes that a rung takes for these rows."""
    return sum(_row_sizes(lm, boundary, examples, level)) * lm.dtype.itemsize


def _row_sizes(
    lm: PackedLM, boundary: Boundary, examples: Sequence[Example], level: CacheLevel
) -> Iterator[int]:
    kv_heads, head_dim = lm.kv_shape
    a_token = 2 * kv_heads * head_dim * (lm.n_layers - boundary.layer)
    for example in examples:
        length = packed_length(example)
        if level == CacheLevel.HIDDEN_STATES:
            yield length * lm.hidden_size
        elif level == CacheLevel.KV:
            left = boundary.first_token(len(example.prompt))
            yield (length - left) * lm.hidden_size + left * a_token
