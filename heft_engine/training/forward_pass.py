"""Where the loop's losses come from: the whole model each time, or a cache of what does not change.

Both give the sum of the cross-entropy over the supervised tokens of some rows; they agree to rounding. It does NOT
know optimisers or events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from heft_engine.adapters.adapter import Boundary
from heft_engine.config.flops import CacheLevel
from heft_engine.data.encoding import Example
from heft_engine.evaluation.evaluate import supervised_loss
from heft_engine.model.loss import cross_entropy
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import fill, pack, packed_length
from heft_engine.runtime.devices import memory_share
from heft_engine.training.activation_cache import SuffixCache, size_of
from heft_engine.training.activation_store import StageActivations

#: Kept tokens, keys and values alone, that weigh as much in a pass as one that runs.
KEPT_TOKENS = 4


def pass_tokens(level: CacheLevel, example: Example, skipped: int) -> int:
    """Tokens that a row weighs in a pass, `skipped` of which are kept on the highest rung."""
    if level != CacheLevel.KV:
        return packed_length(example)
    # What is kept of a row is copied beside the others' for the pass: it counts, though it costs little.
    return packed_length(example) - skipped + skipped // KEPT_TOKENS


class Source(Protocol):
    """Rows that losses can be computed of, by index."""

    def tokens(self, index: int) -> int: ...  #: of a pass's budget that the row takes
    def hidden(
        self, indices: Sequence[int]
    ) -> Tensor: ...  #: last states that predict the rows' supervised tokens
    def loss(self, indices: Sequence[int]) -> Tensor: ...  #: summed over the rows' supervised tokens


@dataclass(frozen=True, kw_only=True)
class PlainSource:
    """The whole model, every time."""

    lm: PackedLM
    examples: Sequence[Example]

    def tokens(self, index: int) -> int:
        return packed_length(self.examples[index])

    def hidden(self, indices: Sequence[int]) -> Tensor:
        batch = pack([self.examples[index] for index in indices])
        return self.lm.hidden(batch)[batch.supervised()[0]]

    def loss(self, indices: Sequence[int]) -> Tensor:
        rows = [self.examples[index] for index in indices]
        return supervised_loss(self.lm, rows, fill(self.lm.device, sum(map(packed_length, rows))))[0]


@dataclass(frozen=True, kw_only=True)
class CachedSource:
    """The suffixes, through the upper layers."""

    cache: SuffixCache

    def tokens(self, index: int) -> int:
        row = self.cache.rows[index]
        return pass_tokens(self.cache.level, row.example, row.skipped)

    def loss(self, indices: Sequence[int]) -> Tensor:
        targets = [token for index in indices for token in self.cache.rows[index].example.answers[0]]
        return cross_entropy(self.cache.lm, self.hidden(indices), targets)

    def hidden(self, indices: Sequence[int]) -> Tensor:
        cache, lm = self.cache, self.cache.lm
        states, positions, layout = cache.suffix(indices)
        for placed in cache.boundary.interventions:
            states = placed.apply(states, layout)
        states = lm.run_layers(states, positions, layout, cache.boundary.layer, lm.n_layers)
        reads: list[int] = []
        for row, index in zip(layout.rows, indices, strict=True):
            example = cache.rows[index].example
            at = row.start + row.prompt - row.skipped - 1
            reads += range(at, at + len(example.answers[0]))
        return lm.finish(states)[0, torch.tensor(reads, device=states.device)]


@dataclass(frozen=True, kw_only=True)
class CacheBudget:
    """What the operator allows a run's cache: bytes of memory, and bytes of files in `directory`.

    memory None: a quarter of what is free when the stage starts. `sharers`: runs that share what is free, this one
    among them.
    """

    memory: int | None = None
    disk: int = 0
    directory: Path | None = None
    sharers: int = 1

    def less(self, plan: CachePlan) -> CacheBudget:
        """What is left of the budget beside a plan."""
        if plan.on_disk:
            return replace(self, disk=self.disk - plan.bytes)
        return replace(self, memory=self.memory_bytes() - plan.bytes)

    def memory_bytes(self) -> int:
        if self.memory is not None:
            return self.memory
        return memory_share(torch.device("cpu"), self.sharers) // 4


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Which rung a stage trains on, where it lies, and how many bytes it takes; checkpoints carry it."""

    level: CacheLevel
    on_disk: bool
    bytes: int

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> CachePlan:
        return CachePlan(level=CacheLevel(values["rung"]), on_disk=values["on_disk"], bytes=values["bytes"])

    def to_json(self) -> dict[str, Any]:
        """As checkpoints and events carry it."""
        return {"rung": self.level.value, "on_disk": self.on_disk, "bytes": self.bytes}

    def open(
        self,
        lm: PackedLM,
        boundary: Boundary,
        examples: Sequence[Example],
        file: Path | None,
        prefills: StageActivations | None = None,
    ) -> Source:
        """The source of these rows. Runs the prefill for every rung but "nothing", or takes it from `prefills`."""
        if self.level == CacheLevel.NONE or not examples:
            return PlainSource(lm=lm, examples=examples)
        cache = SuffixCache(lm, boundary, examples, self.level, file if self.on_disk else None, prefills)
        if self.on_disk and file is not None:
            file.unlink(
                missing_ok=True
            )  # The mapping stays; nothing is left behind, however this process ends.
        return CachedSource(cache=cache)


def plan_cache(
    lm: PackedLM, boundary: Boundary, examples: Sequence[Example], budget: CacheBudget
) -> CachePlan:
    """The highest rung of the ladder that the budget holds: keys and values in memory, on disk, then states alone.

    A boundary at layer 0 leaves nothing to keep. One epoch gains too: its backward pass ends at the suffix.
    """
    if boundary.layer == 0 or not examples:
        return CachePlan(level=CacheLevel.NONE, on_disk=False, bytes=0)
    disk = budget.disk if budget.directory is not None else 0
    levels: tuple[CacheLevel, ...] = (CacheLevel.KV, CacheLevel.HIDDEN_STATES)
    for level in levels if any(boundary.first_token(len(e.prompt)) for e in examples) else levels[1:]:
        size = size_of(lm, boundary, examples, level)
        if size <= budget.memory_bytes():
            return CachePlan(level=level, on_disk=False, bytes=size)
        if size <= disk:
            return CachePlan(level=level, on_disk=True, bytes=size)
    return CachePlan(level=CacheLevel.NONE, on_disk=False, bytes=0)


@torch.inference_mode()
def mean_source_loss(source: Source, examples: Sequence[Example], token_budget: int) -> float:
    """Cross-entropy per supervised token (nats); infinite where it overflows."""
    total = sum(float(source.loss(part)) for part in cut(source, range(len(examples)), token_budget))
    tokens = sum(example.supervised_tokens for example in examples)
    return total / tokens if math.isfinite(total) else math.inf


def cut(source: Source, indices: Sequence[int], token_budget: int) -> list[list[int]]:
    """Runs of indices of at most `token_budget` tokens, in order; a longer row goes alone."""
    return cut_by(source.tokens, indices, token_budget)


def cut_by(tokens_of: Callable[[int], int], indices: Sequence[int], token_budget: int) -> list[list[int]]:
    """As `cut`, by what each index weighs."""
    parts: list[list[int]] = []
    room = 0
    for index in indices:
        tokens = tokens_of(index)
        if not parts or tokens > room:
            parts.append([])
            room = token_budget
        parts[-1].append(index)
        room -= tokens
    return parts
