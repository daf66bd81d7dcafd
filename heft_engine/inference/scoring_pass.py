"""A scoring pass over rows of several requests, each with its own scale, adapter and cached prefix.

Without cached prefixes a row's scores have the bits of `heft_engine.inference.scoring.score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.partition import in_row_order, partition, run_parts
from heft_engine.inference.prefix_cache import CachedPrefix, PrefixCache, PrefixWriter
from heft_engine.inference.scoring import Scores, score_hidden
from heft_engine.model.layout import RowAdapter
from heft_engine.model.packing import pack, packed_length


@dataclass(kw_only=True, eq=False)
class ScoringRow:
    """An example to score with one model.

    hashes: its prompt's block hashes (`prefix_cache.prefix_hashes`); empty where nothing may be cached.
    cached_prefix: the tokens that need not be computed.
    """

    example: Example
    variant: ModelVariant
    scale: float = 1.0
    hashes: Sequence[bytes] = ()
    cached_prefix: CachedPrefix | None = None

    @property
    def cached_tokens(self) -> int:
        return self.cached_prefix.length if self.cached_prefix is not None else 0

    @property
    def uncached_tokens(self) -> int:
        """Tokens to compute."""
        return packed_length(self.example) - self.cached_tokens


@torch.inference_mode()
def score_rows(rows: Sequence[ScoringRow], cache: PrefixCache | None = None) -> list[Scores]:
    """Returns the scores of every row, in order. All rows are of one PackedLM; their prefixes go into `cache`."""
    lm = rows[0].variant.lm
    # Rows that continue the same prefix stand side by side: attention takes them together.
    first: dict[CachedPrefix | None, int] = {}
    order = sorted(range(len(rows)), key=lambda index: first.setdefault(rows[index].cached_prefix, index))
    examples, cached_tokens = zip(*((rows[i].example, rows[i].cached_tokens) for i in order), strict=True)
    parts = [[order[place] for place in places] for places in partition(lm, examples, cached_tokens)]
    batches = [_Batch([rows[index] for index in part], cache) for part in parts]
    scores = run_parts(lm, _Batch.score, batches)
    for batch in batches:
        batch.commit()
    return in_row_order(parts, scores)


class _Batch:
    """Rows that go through the layers together."""

    def __init__(self, rows: Sequence[ScoringRow], cache: PrefixCache | None) -> None:
        self._rows = rows
        self._lm = rows[0].variant.lm
        is_cached = cache is not None and any(row.hashes for row in rows)
        self._sink = _PrefixSink(cache, rows, self._lm.n_layers) if cache is not None and is_cached else None

    def score(self) -> list[Scores]:
        rows = self._rows
        length = self._lm.backend.pass_length(sum(row.uncached_tokens for row in rows))
        cached_tokens = [row.cached_tokens for row in rows]
        batch = pack([row.example for row in rows], cached_tokens=cached_tokens, length=length)
        # One more row may fill the batch up to `length`.
        filler = (None,) * (len(batch.layout.rows) - len(rows))
        adapters: tuple[RowAdapter | None, ...] = tuple(row.variant.adapter for row in rows)
        prefixes: tuple[CachedPrefix | None, ...] = tuple(row.cached_prefix for row in rows)
        layout = replace(
            batch.layout,
            scales=tuple(row.scale for row in rows) + (0.0,) * len(filler),
            cached_prefixes=prefixes + filler if any(cached_tokens) else None,
            adapters=adapters + filler if any(adapter is not None for adapter in adapters) else None,
            kv_sink=self._sink,
        )
        return score_hidden(self._lm, batch, self._lm.hidden(replace(batch, layout=layout)))

    def commit(self) -> None:
        """Caches the prefixes of a pass that has succeeded."""
        if self._sink is not None:
            self._sink.commit()


class _PrefixSink:
    """Writes each row's keys and values into the cache. Implements `layout.KVSink`."""

    def __init__(self, cache: PrefixCache, rows: Sequence[ScoringRow], layers: int) -> None:
        self._cache = cache
        self._rows = rows
        self._layers = layers
        self._writers: dict[int, PrefixWriter | None] = {}

    def write(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        if row >= len(self._rows):
            return  # the filler
        if row not in self._writers:
            scored = self._rows[row]
            self._writers[row] = self._cache.reserve(
                scored.variant.scope, scored.hashes, scored.cached_prefix, keys, self._layers
            )
        writer = self._writers[row]
        if writer is not None:
            writer.write(layer, keys, values)

    def commit(self) -> None:
        for writer in self._writers.values():
            if writer is not None:
                writer.commit()
