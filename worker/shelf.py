"""Models in memory under a byte budget, the longest unused put away first.

Each has a thread of its own on which it is loaded and asked: one forward pass at a time, in the order of the
requests, and one team of compute threads a model rather than one for each of the 64 that wait.
It does NOT know what a model is, beyond that it holds memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

log = logging.getLogger(__name__)


class Holds(Protocol):
    @property
    def memory_bytes(self) -> int: ...


M = TypeVar("M", bound=Holds)
T = TypeVar("T")


class _Resident(Generic[M]):
    """A model on the shelf, or on its way there."""

    def __init__(self, name: Hashable, load: Callable[[], M]) -> None:
        self.users = 0
        self.forgotten = False
        self.used_at = time.monotonic()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"model-{name}")
        self.loaded = self.thread.submit(load)

    @property
    def memory_bytes(self) -> int:
        ready = self.loaded.done() and self.loaded.exception() is None
        return self.loaded.result().memory_bytes if ready else 0

    @property
    def is_idle(self) -> bool:
        return self.users == 0 and self.loaded.done()

    def ask(self, work: Callable[[M], T]) -> T:
        return self.thread.submit(lambda: work(self.loaded.result())).result()


class Shelf(Generic[M]):
    """Safe to use from many threads. `put_away` is called after models have left, to give their memory
    back."""

    def __init__(
        self,
        budget_bytes: int,
        *,
        out_of_memory: tuple[type[BaseException], ...] = (MemoryError,),
        put_away: Callable[[], None] = lambda: None,
    ) -> None:
        self._budget = budget_bytes
        self._out_of_memory = out_of_memory
        self._after_putting_away = put_away
        self._lock = threading.Lock()
        self._residents: dict[Hashable, _Resident[M]] = {}

    def ask(self, name: Hashable, load: Callable[[], M], work: Callable[[M], T]) -> T:
        """What `work` makes of the model called `name`, which is loaded if it is not there.

        Raises what `load` or `work` raise; a model that could not be loaded is tried again with the next
        request.
        """
        with self._lock:
            resident = self._residents.get(name)
            if resident is None:
                resident = self._residents[name] = _Resident(name, lambda: self._load(load))
            resident.users += 1
        try:
            return resident.ask(work)
        finally:
            self._leave(name, resident)

    def make_room(self) -> None:
        """Put away every model that nobody is asking."""
        with self._lock:
            self._put_away(0)

    def forget(self, name: Hashable) -> None:
        """Put one away, after the answers that are under way."""
        with self._lock:
            resident = self._residents.get(name)
            if resident is None:
                return
            resident.forgotten = True
            if resident.is_idle:
                self._remove(name)

    @property
    def held(self) -> dict[Hashable, int]:
        """{name: bytes} of the models on it; those on their way hold none yet."""
        with self._lock:
            return {name: resident.memory_bytes for name, resident in self._residents.items()}

    def close(self) -> None:
        """Put everything away, after the answers that are under way."""
        with self._lock:
            residents, self._residents = list(self._residents.values()), {}
        for resident in residents:
            resident.thread.shutdown()

    @property
    def memory_bytes(self) -> int:
        """What the models on it hold together."""
        with self._lock:
            return sum(resident.memory_bytes for resident in self._residents.values())

    def _load(self, load: Callable[[], M]) -> M:
        try:
            return load()
        except self._out_of_memory:
            log.warning("no memory for another model: all idle ones are put away")
        self.make_room()
        return load()

    def _leave(self, name: Hashable, resident: _Resident[M]) -> None:
        with self._lock:
            resident.users -= 1
            resident.used_at = time.monotonic()
            is_over = resident.loaded.exception() is not None or (resident.forgotten and resident.is_idle)
            if is_over and self._residents.get(name) is resident:
                self._remove(name)
            self._put_away(self._budget)

    def _put_away(self, budget: int) -> None:
        """Until what is held fits into `budget`, or everybody is being asked."""
        held = sum(resident.memory_bytes for resident in self._residents.values())
        longest_unused = sorted(self._residents, key=lambda name: self._residents[name].used_at)
        for name in longest_unused:
            if held > budget and self._residents[name].is_idle:
                held -= self._residents[name].memory_bytes
                self._remove(name)

    def _remove(self, name: Hashable) -> None:
        log.info("put away: %s", name)
        self._residents.pop(name).thread.shutdown(wait=False)
        self._after_putting_away()
