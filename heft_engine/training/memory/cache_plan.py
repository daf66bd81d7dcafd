"""The choice of a cache for a stage's rows: the highest level that a budget of memory and disk holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from heft_engine.adapters.adapter import Boundary
from heft_engine.config.flops import CacheLevel
from heft_engine.data.encoding import Example
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.devices import memory_share
from heft_engine.training.activation_cache import SuffixCache, size_of
from heft_engine.training.activation_store import StageActivations
from heft_engine.training.forward_pass import ForwardPass, FullPass, SuffixPass


class CachePlace(StrEnum):
    """The memory that a cache lies in. Checkpoints carry the values."""

    HOST = "host"  #: the machine's memory: on a CPU, the same that passes take
    DISK = "disk"  #: a mapped file


@dataclass(frozen=True, kw_only=True)
class CacheBudget:
    """Bytes that a run's cache may take: of the machine's memory, and of files in `directory`.

    memory: None is a quarter of what is free when the stage starts, shared among `sharers` runs.
    """

    memory: int | None = None
    disk: int = 0
    directory: Path | None = None
    sharers: int = 1

    def without(self, plan: CachePlan) -> CacheBudget:
        """Returns what a plan leaves of the budget."""
        if plan.place == CachePlace.DISK:
            return replace(self, disk=self.disk - plan.bytes)
        return replace(self, memory=self.memory_bytes() - plan.bytes)

    def memory_bytes(self) -> int:
        if self.memory is not None:
            return self.memory
        return memory_share(torch.device("cpu"), self.sharers) // 4


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The cache of some rows: its level, its place and its bytes. Checkpoints carry it."""

    level: CacheLevel
    place: CachePlace = CachePlace.HOST
    bytes: int = 0

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> CachePlan:
        """Returns the plan of `to_json`; of a checkpoint without a place, by whether it was on disk."""
        place = values.get("place", "disk" if values["on_disk"] else "host")
        return CachePlan(level=CacheLevel(values["rung"]), place=CachePlace(place), bytes=values["bytes"])

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as checkpoints and events carry it."""
        on_disk = self.place == CachePlace.DISK
        return {
            "rung": self.level.value,
            "place": self.place.value,
            "on_disk": on_disk,
            "bytes": self.bytes,
        }

    def bytes_on(self, device: torch.device) -> int:
        """Returns the bytes that the cache takes of a device's own memory."""
        in_host_memory = self.place == CachePlace.HOST
        return self.bytes if in_host_memory and device.type == "cpu" else 0

    def open(
        self,
        lm: PackedLM,
        boundary: Boundary,
        examples: Sequence[Example],
        file: Path | None,
        activations: StageActivations | None = None,
    ) -> ForwardPass:
        """Returns the forward pass of these examples. Fills the cache, or takes it from `activations`."""
        if self.level == CacheLevel.NONE or not examples:
            return FullPass(lm=lm, examples=examples)
        file = file if self.place == CachePlace.DISK else None
        cache = SuffixCache(lm, boundary, examples, self.level, file, activations)
        if file is not None:
            # The mapping stays; nothing is left behind, however this process ends.
            file.unlink(missing_ok=True)
        return SuffixPass(cache=cache)


def plan_cache(
    lm: PackedLM, boundary: Boundary, examples: Sequence[Example], budget: CacheBudget
) -> CachePlan:
    """Returns the highest level that fits, in memory before on disk: keys and values, then hidden states alone.

    A boundary at layer 0 leaves nothing to cache. A single epoch gains too: its backward pass ends at the suffix.
    """
    if boundary.layer == 0 or not examples:
        return CachePlan(level=CacheLevel.NONE)
    levels = [CacheLevel.HIDDEN_STATES]
    if any(boundary.first_token(len(example.prompt)) for example in examples):
        levels.insert(0, CacheLevel.KV)
    disk = budget.disk if budget.directory is not None else 0
    for level in levels:
        size = size_of(lm, boundary, examples, level)
        if size <= budget.memory_bytes():
            return CachePlan(level=level, bytes=size)
        if size <= disk:
            return CachePlan(level=level, place=CachePlace.DISK, bytes=size)
    return CachePlan(level=CacheLevel.NONE)
