"""Models that are held, and how each shall be: merged while it has much of its base's requests, shared otherwise.

It does NOT load, count bytes or know threads: whoever asks holds the pool's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from heft_engine.serving.demand import Demand
from heft_engine.serving.loaded_base import Kind
from heft_engine.serving.predictor import Predictor

#: Shares of its base's requests from which a model is hot, and below which it has cooled down.
HOT, COOL = 0.25, 0.05
#: Requests of the last minute on a base before shares mean anything.
ENOUGH = 16

#: Gives the folder of a bundle, for as long as it is read.
Fetch = Callable[[], AbstractContextManager[Path]]


@dataclass(frozen=True, kw_only=True)
class Held:
    predictor: Predictor
    kind: Kind
    base: Hashable
    memory_bytes: int


@dataclass(eq=False)
class Entry:
    """A model that is held, or on its way: `held` is waited for, `now` is what there is."""

    load: Callable[[], Held]
    fetch: Fetch | None
    held: Future[Held] = field(default_factory=Future)
    now: Held | None = None
    #: What it stands on, as soon as that is known.
    base: Hashable = None
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    demand: Demand = field(default_factory=Demand)
    is_changing: bool = False
    forgotten: bool = False
    #: Its probe rows did not agree unmerged.
    only_merged: bool = False
    #: A change that failed is not tried again at once.
    no_change_before: float = 0.0

    def stand(self, held: Held) -> None:
        """From now on it is held so."""
        future: Future[Held] = Future() if self.held.done() else self.held
        self.now = held
        future.set_result(held)
        self.held = future

    @property
    def memory_bytes(self) -> int:
        """Its own, and what texts hold that are being written with layers of its own: a base counts those on it."""
        held = self.now
        if held is None:
            return 0
        return held.memory_bytes + (held.predictor.generator.memory_bytes if held.kind == "merged" else 0)

    @property
    def is_idle(self) -> bool:
        return self.users == 0 and self.held.done() and not self.is_changing


def kind_at_first(entry: Entry, others: Sequence[Entry]) -> Kind:
    """Of a model that is being loaded, beside those on its base."""
    beside = sum(other.demand.now for other in others if other is not entry)
    return "merged" if entry.demand.now >= HOT * (entry.demand.now + beside) else "shared"


def changes(entries: Mapping[Hashable, Entry]) -> Iterator[tuple[Hashable, Kind]]:
    """The models of one base that should be held otherwise."""
    total = sum(entry.demand.now for entry in entries.values())
    if total < ENOUGH:
        return
    for name, entry in entries.items():
        kind = entry.now.kind if entry.now is not None else None
        if kind == "shared" and entry.demand.now >= HOT * total:
            yield name, "merged"
        if kind == "merged" and entry.demand.now < COOL * total and not entry.only_merged:
            yield name, "shared"
