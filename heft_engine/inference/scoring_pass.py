"""One forward pass over rows of several requests, each with its own scale, adapter and kept prefix.

The rows' scores are those of `heft_engine.inference.scoring`, to the bit where nothing is kept. It does NOT know
who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.inference.partition import in_row_order, partition, run_parts
from heft_engine.inference.prefix_cache import CachedPrefix, PrefixCache, PrefixWriter
from heft_engine.inference.scoring import Scores, score_hidden
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import RowAdapter, pack, packed_length


@dataclass(frozen=True, kw_only=True)
class ScoringRow:
    """An example as one row of a pass. `hashes`: see `prefix_cache.chain`; empty where nothing may be kept."""

    example: Example
    scale: float = 1.0
    adapter: RowAdapter | None = None
    scope: object = None
    hashes: Sequence[bytes] = ()
    kept: CachedPrefix | None = None

    @property
    def skipped(self) -> int:
        """Tokens that need not be computed."""
        return self.kept.length if self.kept is not None else 0


@torch.inference_mode()
def score_rows(lm: PackedLM, rows: Sequence[ScoringRow], cache: PrefixCache | None = None) -> list[Scores]:
    """Scores of every row, in order, and what the rows leave for others in `cache`."""
    # Rows that continue the same prefix stand beside each other: attention takes them together.
    first: dict[CachedPrefix | None, int] = {}
    order = sorted(range(len(rows)), key=lambda index: first.setdefault(rows[index].kept, index))
    return in_row_order([order], [_score([rows[index] for index in order], lm, cache)])


def _score(rows: Sequence[ScoringRow], lm: PackedLM, cache: PrefixCache | None) -> list[Scores]:
    shares = partition(lm, [row.example for row in rows], [row.skipped for row in rows])
    parts = [_Part(lm, [rows[row] for row in own], cache) for own in shares]
    scores = in_row_order(shares, run_parts(lm, _Part.score, parts))
    for part in parts:
        part.leave()
    return scores


class _Part:
    """Rows of a pass that one lane takes."""

    def __init__(self, lm: PackedLM, rows: Sequence[ScoringRow], cache: PrefixCache | None) -> None:
        self._lm, self._rows = lm, rows
        leaves = cache is not None and any(row.hashes for row in rows)
        self._leaving = _Leaving(cache, rows, lm.n_layers) if cache is not None and leaves else None

    def score(self) -> list[Scores]:
        rows, skipped = self._rows, [row.skipped for row in self._rows]
        tokens = sum(packed_length(row.example) for row in rows) - sum(skipped)
        length = self._lm.pass_length(tokens)
        batch = pack([row.example for row in rows], skipped=skipped, length=length)
        # The row that fills the pass, where there is one.
        nothing = (None,) * (len(batch.layout.rows) - len(rows))
        adapters: tuple[RowAdapter | None, ...] = tuple(row.adapter for row in rows)
        kept: tuple[CachedPrefix | None, ...] = tuple(row.kept for row in rows)
        layout = replace(
            batch.layout,
            scales=tuple(row.scale for row in rows) + (0.0,) * len(nothing),
            cached_prefixes=kept + nothing if any(skipped) else None,
            adapters=adapters + nothing if any(adapter is not None for adapter in adapters) else None,
            kv_sink=self._leaving,
        )
        hidden = self._lm.hidden(replace(batch, layout=layout))
        return score_hidden(self._lm, batch, hidden)

    def leave(self) -> None:
        """What others may find, once the whole pass has gone well."""
        if self._leaving is not None:
            self._leaving.close()


class _Leaving:
    """Puts each row's keys and values into the cache. See `packing.KVSink`."""

    def __init__(self, cache: PrefixCache, rows: Sequence[ScoringRow], layers: int) -> None:
        self._cache = cache
        self._rows = rows
        self._layers = layers
        self._rooms: dict[int, PrefixWriter | None] = {}

    def write(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        if row >= len(self._rows):
            return  # what fills the pass
        if row not in self._rooms:
            asked = self._rows[row]
            hashes = asked.hashes
            self._rooms[row] = self._cache.room(asked.scope, hashes, asked.kept, keys, self._layers)
        room = self._rooms[row]
        if room is not None:
            room.write(layer, keys, values)

    def close(self) -> None:
        for room in self._rooms.values():
            if room is not None:
                room.close()
