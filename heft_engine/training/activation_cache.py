"""Cached activations of the frozen part of the model, computed once a stage for each of its rows.

While a stage trains, two things never change: the layers below the first trained one, for every token; and the layers
above it, for every token before the first intervened one (attention is causal). So each row goes through the whole
model once, and an epoch runs only its suffix, the tokens from the first intervened one on, through the upper layers,
against cached keys and values. Losses are equal to rounding on every level:

    KV               hidden states of the suffix at the first trained layer; keys and values of the layers above it,
                     of the tokens before the suffix
    HIDDEN_STATES    every token's hidden state at the first trained layer; the layers above run again in each step,
                     without a gradient before the suffix
    NONE             nothing: the whole model runs in each step (heft_engine.training.forward_pass.FullPass)

Rows lie end to end in one flat tensor, in memory or mapped from a file.
"""

from __future__ import annotations

import itertools
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
from heft_engine.model.layout import Layout, PackedRow, PaddedPrefix
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import fill, micro_batches, pack, packed_length
from heft_engine.runtime.out_of_memory import run_in_halves
from heft_engine.runtime.transfers import index_tensor, to_device
from heft_engine.training.activation_store import StageActivations

#: Tokens of one pass that fills the cache. The same split gives the same bits when the cache is built again; a pass
#: that runs out of memory is split further.
TOKEN_BUDGET = 4_096
#: Bytes of hidden states above the first layer that are stored for later runs, as a share of the keys and values.
_UPPER_STATES_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class CachedRow:
    """Views into the cache: states (tokens, hidden), keys_values (layers, 2, kv_heads, prefix_length, head_dim)."""

    example: Example
    prefix_length: int  #: tokens before the suffix
    states: Tensor
    keys_values: Tensor | None


class SuffixCache:
    """The cached activations of some rows, on one level."""

    def __init__(
        self,
        lm: PackedLM,
        boundary: Boundary,
        examples: Sequence[Example],
        level: CacheLevel,
        file: Path | None = None,
        stored: StageActivations | None = None,
    ) -> None:
        """Fills the cache by running the model, or takes it from `stored` (level KV alone), and stores it there.

        `file` maps the cache from disk instead of holding it in memory.
        """
        self.lm = lm
        self.boundary = boundary
        self.level: CacheLevel = level
        self.examples = examples
        self._prefix_lengths = [boundary.first_token(len(example.prompt)) for example in examples]
        #: Seconds that an earlier run spent on what was found in `stored`; negative: that this one spent on storing.
        self.saved_seconds = 0.0
        saved = stored.find(boundary.layer, self._tokens, lm.hidden_size, lm.dtype) if stored else None
        if saved is not None:
            depth = boundary.layer - saved.first
            self.rows = self._rows(saved.states[depth], saved.keys_values, saved.first)
            self.saved_seconds = saved.seconds
        else:
            self._compute(file, stored)

    @property
    def _tokens(self) -> int:
        """Number of tokens whose hidden states are cached."""
        total = sum(map(packed_length, self.examples))
        return total - sum(self._prefix_lengths) if self.level == CacheLevel.KV else total

    def _compute(self, file: Path | None, stored: StageActivations | None) -> None:
        lm, boundary = self.lm, self.boundary
        started = time.monotonic()
        size = size_of(lm, boundary, self.examples, self.level) // lm.dtype.itemsize
        flat = (
            torch.empty(size, dtype=lm.dtype)
            if file is None
            else torch.from_file(str(file), shared=True, size=size, dtype=lm.dtype)
        )
        state_size = self._tokens * lm.hidden_size
        states, keys_values = flat[:state_size].view(self._tokens, lm.hidden_size), flat[state_size:]
        self.rows = self._rows(states, keys_values, boundary.layer)
        if stored is not None and not stored.accepts(flat.nbytes):
            stored = None
        # A cache on disk is there because memory has no room for it, and so none for more.
        upper = self._upper_states(keys_values, stored) if stored is not None and file is None else None
        lengths = [len(row.states) for row in self.rows]
        first_token = [0, *itertools.accumulate(lengths)]

        def fill_rows(indices: Sequence[int]) -> None:
            rows = [self.rows[index] for index in indices]
            self._fill(rows, upper[:, first_token[indices[0]] :] if upper is not None else None)

        first = 0
        with torch.no_grad():
            for examples in micro_batches(self.examples, TOKEN_BUDGET):
                run_in_halves(fill_rows, range(first, first + len(examples)), lm.device)
                first += len(examples)
        if stored is not None:
            computed = time.monotonic()
            with suppress(OSError):  # the disk is full: later runs compute it again
                layers = [states, *(upper if upper is not None else ())]
                stored.put(boundary.layer, layers, keys_values, computed - started)
            self.saved_seconds = computed - time.monotonic()

    def _upper_states(self, keys_values: Tensor, stored: StageActivations) -> Tensor | None:
        """Returns an empty tensor (depths, tokens, hidden) for the states before each layer above the first one.

        They let a later stage begin at a higher layer. None where they would take too much.
        """
        depths = self.lm.n_layers - 1 - self.boundary.layer
        shape = (depths, self._tokens, self.lm.hidden_size)
        size = math.prod(shape) * keys_values.itemsize
        if depths < 1 or not self.boundary.clear_above or size > _UPPER_STATES_SHARE * keys_values.nbytes:
            return None
        first = self._tokens * self.lm.hidden_size * keys_values.itemsize
        return keys_values.new_empty(shape) if stored.accepts(first + keys_values.nbytes + size) else None

    def _rows(self, states: Tensor, keys_values: Tensor, first: int) -> list[CachedRow]:
        """Returns views of the rows. states: (tokens, hidden); keys_values: flat, of the layers from `first` on."""
        layers, (kv_heads, head_dim) = self.lm.n_layers - first, self.lm.kv_shape
        rows: list[CachedRow] = []
        token = element = 0
        for example, prefix_length in zip(self.examples, self._prefix_lengths, strict=True):
            length, prefix = packed_length(example), None
            if self.level == CacheLevel.KV:
                length -= prefix_length
                size = layers * 2 * kv_heads * prefix_length * head_dim
                shape = (layers, 2, kv_heads, prefix_length, head_dim)
                prefix = keys_values[element : element + size].view(shape)[self.boundary.layer - first :]
                element += size
            row_states = states[token : token + length]
            token += length
            rows.append(
                CachedRow(example=example, prefix_length=prefix_length, states=row_states, keys_values=prefix)
            )
        return rows

    def _fill(self, rows: Sequence[CachedRow], upper: Tensor | None) -> None:
        """Runs some rows and writes their activations. upper: (depths, tokens, hidden), these rows' tokens first."""
        lm, boundary = self.lm, self.boundary
        batch = pack([row.example for row in rows])
        ids, positions = batch.inputs(lm.device)
        with lm.interventions.disabled(boundary.interventions):
            states = lm.run_layers(lm.embed(ids), positions, batch.layout, 0, boundary.layer)
        suffixes = index_tensor(_cached_tokens(batch.layout, rows), lm.device)
        row_states = torch.split(states[0, suffixes], [len(row.states) for row in rows])
        for row, of_row in zip(rows, row_states, strict=True):
            row.states.copy_(of_row)
        if self.level != CacheLevel.KV:
            return

        def write_upper(layer: int, states: Tensor) -> None:
            if upper is not None and layer > boundary.layer:
                upper[layer - boundary.layer - 1, : len(suffixes)] = states[0, suffixes]

        lengths = [row.prefix_length for row in rows]
        prefixes = prefix_keys_values(lm, boundary.layer, states[0], batch.layout, lengths, write_upper)
        for row, prefix in zip(rows, prefixes, strict=True):
            assert row.keys_values is not None
            row.keys_values.copy_(prefix)

    def suffix(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Layout]:
        """Returns the suffixes of some rows as one batch: states (1, T, hidden), positions (1, T), and their layout.

        The layout's prefix holds the keys and values of the tokens before them.
        """
        rows = [self.rows[index] for index in indices]
        device = self.lm.device
        if self.level == CacheLevel.KV:
            states = [row.states for row in rows]
            prefixes = [row.keys_values for row in rows if row.keys_values is not None]
        else:
            states = [row.states[row.prefix_length :] for row in rows]
            prefixes = self._run_prefixes(rows) if any(row.prefix_length for row in rows) else []
        packed: list[PackedRow] = []
        positions: list[Tensor] = []
        start = 0
        for row, row_states in zip(rows, states, strict=True):
            prompt, length = len(row.example.prompt), len(row_states)
            answer = length - (prompt - row.prefix_length)
            packed.append(
                PackedRow(
                    start=start,
                    prompt=prompt,
                    branches=(answer,) if answer > 0 else (),
                    cached_tokens=row.prefix_length,
                )
            )
            positions.append(torch.arange(row.prefix_length, row.prefix_length + length))
            start += length
        suffixes = tuple(packed)
        prefix = PaddedPrefix.of(self.boundary.layer, prefixes, suffixes, device) if prefixes else None
        layout = Layout(rows=suffixes, prefix=prefix)
        return (
            to_device(torch.cat(states), device)[None],
            to_device(torch.cat(positions), device)[None],
            layout,
        )

    @torch.no_grad()
    def _run_prefixes(self, rows: Sequence[CachedRow]) -> list[Tensor]:
        """Returns keys and values before the suffixes, computed from hidden states for this step alone."""
        packed: list[PackedRow] = []
        start = 0
        for row in rows:
            prompt = len(row.example.prompt)
            packed.append(
                PackedRow(start=start, prompt=prompt, branches=(), unread_tokens=prompt - row.prefix_length)
            )
            start += row.prefix_length
        filler = fill(self.lm.device, start) - start
        if filler:
            packed.append(PackedRow(start=start, prompt=filler, branches=()))
        zeros = rows[0].states.new_zeros(filler, self.lm.hidden_size)
        states = torch.cat([*(row.states[: row.prefix_length] for row in rows), zeros])
        states = to_device(states, self.lm.device)
        lengths = [row.prefix_length for row in rows] + [0] * (len(packed) - len(rows))
        layout = Layout(rows=tuple(packed))
        return prefix_keys_values(self.lm, self.boundary.layer, states, layout, lengths)[: len(rows)]


def _cached_tokens(layout: Layout, rows: Sequence[CachedRow]) -> list[int]:
    """Returns the flat indices of the tokens whose hidden states are cached: the last ones of each row."""
    return [
        token
        for packed, row in zip(layout.rows, rows, strict=True)
        for token in range(packed.start + packed.length - len(row.states), packed.start + packed.length)
    ]


class FirstTokensSink:
    """A `KVSink` of each row's first `lengths[row]` keys and values."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._layers: list[list[Tensor]] = [[] for _ in lengths]

    def write(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        end = self._lengths[row]
        self._layers[row].append(torch.stack([keys[0, :, :end], values[0, :, :end]]))

    def rows(self) -> list[Tensor]:
        """Returns (layers, 2, kv_heads, length, head_dim) for each row."""
        # Of a model on several GPUs, on that of the first of the layers.
        return [torch.stack([layer.to(layers[0].device) for layer in layers]) for layers in self._layers]


def prefix_keys_values(
    lm: PackedLM,
    layer: int,
    states: Tensor,
    layout: Layout,
    lengths: Sequence[int],
    watch: Callable[[int, Tensor], None] | None = None,
) -> list[Tensor]:
    """Returns keys and values of the layers from `layer` on, of each row's first `lengths` tokens.

    states: (T, hidden), before `layer`. `watch` is called with each layer and the states (1, T, hidden) before it.
    """
    if layer == lm.n_layers:
        kv_heads, head_dim = lm.kv_shape
        return [states.new_empty(0, 2, kv_heads, length, head_dim) for length in lengths]
    sink = FirstTokensSink(lengths)
    offsets = [torch.arange(row.length) for row in layout.rows]
    positions = to_device(torch.cat(offsets), states.device)[None]
    collecting = Layout(rows=layout.rows, scale=layout.scale, kv_sink=sink)
    lm.run_layers(states[None], positions, collecting, layer, lm.n_layers, watch)
    return sink.rows()


def size_of(lm: PackedLM, boundary: Boundary, examples: Sequence[Example], level: CacheLevel) -> int:
    """Returns the bytes that these rows take on a level."""
    return sum(_row_sizes(lm, boundary, examples, level)) * lm.dtype.itemsize


def _row_sizes(
    lm: PackedLM, boundary: Boundary, examples: Sequence[Example], level: CacheLevel
) -> Iterator[int]:
    kv_heads, head_dim = lm.kv_shape
    per_prefix_token = 2 * kv_heads * head_dim * (lm.n_layers - boundary.layer)
    for example in examples:
        length = packed_length(example)
        if level == CacheLevel.HIDDEN_STATES:
            yield length * lm.hidden_size
        elif level == CacheLevel.KV:
            prefix_length = boundary.first_token(len(example.prompt))
            yield (length - prefix_length) * lm.hidden_size + prefix_length * per_prefix_token
