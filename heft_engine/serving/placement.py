"""The pool's entries, and the placement of each: merged while it has much of its base model's traffic, else shared.

Not thread-safe: the pool calls everything here under its lock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from heft_engine.config.metric_names import TaskType
from heft_engine.serving.loaded_base import BaseKey, Kind, LoadedModel

#: Shares of a base model's requests above which a model is merged, and below which it is shared again.
MERGE_SHARE, UNMERGE_SHARE = 0.25, 0.05
#: Recent requests on a base model below which shares mean nothing.
MIN_REQUESTS = 16
#: Time after which a request counts 1/e.
DECAY_SECONDS = 60.0

#: Gives a bundle's directory for as long as it is read.
Fetch = Callable[[], AbstractContextManager[Path]]


class BaseName(NamedTuple):
    """A base model in the pool, once for each task that it is used for."""

    reference: str
    task: TaskType


#: The name of a fine-tuned model is its id.
ModelName = str | BaseName


@dataclass(eq=False)
class PoolEntry:
    """A model in the pool, loaded or being loaded. Callers wait for `future`; `loaded` is what is in memory."""

    name: ModelName
    fetch: Fetch | None  #: None for a base model
    future: Future[LoadedModel] = field(default_factory=Future)
    loaded: LoadedModel | None = None
    base: BaseKey | None = None  #: known before the model is loaded
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    requests: int = 0  #: since the last `update_rates`
    rate: float = 0.0  #: requests of about the last minute
    is_reloading: bool = False
    is_removed: bool = False  #: leaves the pool once it is idle
    only_merged: bool = False  #: its probe rows did not agree unmerged
    reload_after: float = 0.0  #: monotonic; a reload that failed is not tried again at once

    def set_loaded(self, model: LoadedModel) -> None:
        """Uses `model` from now on, in place of the one before it."""
        future: Future[LoadedModel] = Future() if self.future.done() else self.future
        self.loaded = model
        future.set_result(model)
        self.future = future

    @property
    def memory_bytes(self) -> int:
        return self.loaded.memory_bytes if self.loaded is not None else 0

    @property
    def has_failed(self) -> bool:
        return self.future.done() and self.future.exception() is not None

    @property
    def is_idle(self) -> bool:
        return self.users == 0 and self.future.done() and not self.is_reloading


def update_rates(entries: Iterable[PoolEntry], seconds: float) -> None:
    """Counts the requests of the last `seconds` in; older ones decay exponentially."""
    decay = math.exp(-seconds / DECAY_SECONDS)
    for entry in entries:
        entry.rate = entry.rate * decay + entry.requests
        entry.requests = 0


def first_placement(entry: PoolEntry, neighbours: Sequence[PoolEntry]) -> Kind:
    """Returns how to load a model, given the models on its base model."""
    others = sum(other.rate for other in neighbours if other is not entry)
    return "merged" if entry.rate >= MERGE_SHARE * (entry.rate + others) else "shared"


def placement_changes(entries: Sequence[PoolEntry]) -> Iterator[tuple[PoolEntry, Kind]]:
    """Yields the models of one base model that should be placed otherwise."""
    total = sum(entry.rate for entry in entries)
    if total < MIN_REQUESTS:
        return
    for entry in entries:
        kind = entry.loaded.kind if entry.loaded is not None else None
        share = entry.rate / total
        if kind == "shared" and share >= MERGE_SHARE:
            yield entry, "merged"
        if kind == "merged" and share < UNMERGE_SHARE and not entry.only_merged:
            yield entry, "shared"
