"""Models in memory under a byte budget, the longest unused put away first.

A base is loaded once for all its models. A fine-tuned model is held merged (its own copy of the weights that its
adapters touch; the bits of its evaluation) or shared (what it adds to the base, in one batch with a thousand others).
`hold` "auto": merged while it has most of its base's requests to itself, shared otherwise; a shared model that becomes
hot is merged in the background, a merged one that cools down beside busy ones goes back. A model whose probe rows
don't agree unmerged is held merged.

It does NOT know queues, owners or storage: whoever asks brings the way to a bundle.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from heft_engine.base_models import BaseModel, resolve
from heft_engine.bundle import Bundle, read_bundle
from heft_engine.config import TaskType
from heft_engine.devices import choose_device, choose_dtype, dtype_of
from heft_engine.errors import BundleError
from heft_engine.predictor import KEY_VALUE_BYTES, Predictor, base_of
from heft_engine.serving.bases import Base, Kind, key_of, size_on_disk
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.demand import Demand

log = logging.getLogger(__name__)

Hold = Literal["auto", "merged", "shared"]
#: Shares of its base's requests from which a model is hot, and below which it has cooled down.
HOT, COOL = 0.25, 0.05
#: Requests of the last minute on a base before shares mean anything.
ENOUGH = 16
#: Between two looks at the shares of one base.
CONSIDER_SECONDS = 1.0

#: Gives the folder of a bundle, for as long as it is read.
Fetch = Callable[[], AbstractContextManager[Path]]


@dataclass(frozen=True, kw_only=True)
class _Held:
    predictor: Predictor
    kind: Kind
    base: Hashable
    memory_bytes: int


@dataclass(eq=False)
class _Entry:
    """A model that is held, or on its way."""

    load: Callable[[], _Held]
    fetch: Fetch | None
    held: Future[_Held] = field(default_factory=Future)
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    demand: Demand = field(default_factory=Demand)
    is_changing: bool = False
    forgotten: bool = False
    #: Its probe rows did not agree unmerged.
    only_merged: bool = False
    memory_bytes: int = 0

    @property
    def now(self) -> _Held | None:
        return self.held.result() if self.held.done() and self.held.exception() is None else None

    @property
    def is_idle(self) -> bool:
        return self.users == 0 and self.held.done() and not self.is_changing


class ModelPool:
    """Safe to use from many threads. `put_away` is called after models have left, to give their memory back."""

    def __init__(
        self,
        *,
        budget_bytes: int,
        batcher: Batcher,
        hold: Hold = "auto",
        model_dir: Path | None = None,
        cache_dir: Path | None = None,
        allow_paths: bool = True,
        device: str | None = None,
        key_value_bytes: int = KEY_VALUE_BYTES,
        out_of_memory: tuple[type[BaseException], ...] = (MemoryError,),
        put_away: Callable[[], None] = lambda: None,
    ) -> None:
        self._budget = budget_bytes
        self._batcher = batcher
        self._hold = hold
        self._model_dir = model_dir
        self._cache_dir = cache_dir
        self._allow_paths = allow_paths
        self._device = device or choose_device()
        self._key_value_bytes = key_value_bytes
        self._out_of_memory = out_of_memory
        self._after_putting_away = put_away
        self._lock = threading.RLock()
        self._entries: dict[Hashable, _Entry] = {}
        self._considered: dict[Hashable, float] = {}
        self._bases: dict[Hashable, Base] = {}
        # One model at a time, and a base between passes: transformers changes torch's default dtype while it loads.
        self._loading = threading.Lock()
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="hold-otherwise")

    @contextmanager
    def model(self, name: str, fetch: Fetch) -> Iterator[Predictor]:
        """The fine-tuned model called `name`, loaded from its bundle if it is not held; it stays meanwhile.

        Raises BundleError, ModelError, and what `fetch` raises; the next request tries again.
        """
        with self._using(name, lambda: _Entry(load=lambda: self._load(name, fetch), fetch=fetch)) as held:
            yield held.predictor

    @contextmanager
    def base(self, reference: str, task: TaskType) -> Iterator[Predictor]:
        """A base model as it is. Raises ModelError."""
        with self._using(
            (reference, task), lambda: _Entry(lambda: self._plain(reference, task), None)
        ) as held:
            yield held.predictor

    def make_room(self) -> None:
        """Puts away every model that nobody is asking."""
        with self._lock:
            self._put_away(0)

    def forget(self, name: str) -> None:
        """Puts a model away, and what was kept of its prompts, after the answers that are under way."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return
            entry.forgotten = True
            if entry.is_idle:
                self._remove(name)

    def close(self) -> None:
        """Ends the batcher and lets everything go."""
        self._changes.shutdown(cancel_futures=True)
        self._batcher.close()
        with self._lock:
            self._entries.clear()
            self._bases.clear()

    @property
    def names(self) -> list[str]:
        """Of the fine-tuned models that are held or on their way."""
        with self._lock:
            return [name for name in self._entries if isinstance(name, str)]

    @property
    def memory_bytes(self) -> int:
        with self._lock:
            return self._held_bytes()

    def kinds(self) -> dict[Kind, tuple[int, int]]:
        """Of each kind: how many are held, and their bytes. `base` counts bases, whoever stands on them."""
        counts: dict[Kind, tuple[int, int]] = {"merged": (0, 0), "shared": (0, 0), "base": (0, 0)}
        with self._lock:
            for held in (entry.now for entry in self._entries.values()):
                if held is not None and held.kind != "base":
                    count, size = counts[held.kind]
                    counts[held.kind] = (count + 1, size + held.memory_bytes)
            bases = list(self._bases.values())
        counts["base"] = (len(bases), sum(base.memory_bytes for base in bases))
        return counts

    @contextmanager
    def _using(self, name: Hashable, make: Callable[[], _Entry]) -> Iterator[_Held]:
        with self._lock:
            entry = self._entries.get(name)
            is_new = entry is None
            if entry is None:
                entry = self._entries[name] = make()
            entry.users += 1
            entry.demand.add()
        try:
            if is_new:
                self._bring(entry)
            yield entry.held.result()
        finally:
            self._leave(name, entry)

    def _bring(self, entry: _Entry) -> None:
        try:
            held = self._loaded(entry)
            entry.memory_bytes = held.memory_bytes
            entry.held.set_result(held)
        except BaseException as fault:  # noqa: BLE001 - whoever waits for it is told, this caller among them
            entry.held.set_exception(fault)

    def _loaded(self, entry: _Entry) -> _Held:
        try:
            return entry.load()
        except self._out_of_memory:
            log.warning("no memory for another model: all idle ones are put away")
        self.make_room()
        return entry.load()

    def _leave(self, name: Hashable, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            entry.used_at = time.monotonic()
            failed = entry.held.exception() is not None
            if self._entries.get(name) is entry and (failed or (entry.forgotten and entry.is_idle)):
                self._remove(name)
            self._put_away(self._budget)
            self._reconsider(entry)

    def _load(self, name: str, fetch: Fetch, kind: Kind | None = None) -> _Held:
        with fetch() as path:
            bundle = read_bundle(path)
            base_model = base_of(
                bundle, model_dir=self._model_dir, cache_dir=self._cache_dir, allow_paths=self._allow_paths
            )
            key = key_of(base_model, dtype_of(bundle.info.dtype))
            with self._loading:
                base = self._base(key, base_model)
                return self._held(name, bundle, base, key, kind or self._kind(name, key))

    def _held(self, name: str, bundle: Bundle, base: Base, key: Hashable, kind: Kind) -> _Held:
        if kind == "shared":
            try:
                predictor, size = base.shared(bundle, (name, kind))
                return _Held(predictor=predictor, kind=kind, base=key, memory_bytes=size)
            except BundleError as fault:
                log.warning("%s is held merged: unmerged, %s", name, fault)
                with self._lock:
                    if (entry := self._entries.get(name)) is not None:
                        entry.only_merged = True
        predictor, size = base.merged(bundle, (name, "merged"))
        return _Held(predictor=predictor, kind="merged", base=key, memory_bytes=size)

    def _plain(self, reference: str, task: TaskType) -> _Held:
        base_model = resolve(
            reference, model_dir=self._model_dir, cache_dir=self._cache_dir, allow_paths=self._allow_paths
        )
        key = key_of(base_model, choose_dtype("auto", self._device))
        with self._loading:
            predictor = self._base(key, base_model).plain(task, (reference, "base"))
            return _Held(predictor=predictor, kind="base", base=key, memory_bytes=0)

    def _base(self, key: Hashable, model: BaseModel) -> Base:
        """Loaded if it is not there. One at a time."""
        with self._lock:
            base = self._bases.get(key)
            if base is not None:
                return base
            self._put_away(self._budget - size_on_disk(model.path))
        assert isinstance(key, tuple)
        dtype = key[-1]
        base = self._batcher.run(
            lambda: Base(
                model,
                dtype=dtype,
                device=self._device,
                batcher=self._batcher,
                key_value_bytes=self._key_value_bytes,
            )
        )
        with self._lock:
            self._bases[key] = base
        return base

    def _kind(self, name: str, key: Hashable) -> Kind:
        """How a model that is being loaded shall be held."""
        if self._hold != "auto":
            return self._hold
        with self._lock:
            own, others = self._shares(name, key)
        return "merged" if own >= HOT * (own + others) else "shared"

    def _shares(self, name: Hashable, key: Hashable) -> tuple[float, float]:
        """Requests of the last minute: of a model, and of the others on its base."""
        own, others = 0.0, 0.0
        for other, entry in self._entries.items():
            if other == name:
                own = entry.demand.now
            elif entry.now is not None and entry.now.base == key:
                others += entry.demand.now
        return own, others

    def _reconsider(self, entry: _Entry) -> None:
        """Has the models of a base held otherwise, in the background, when their requests ask for it."""
        held = entry.now
        if self._hold != "auto" or held is None or held.kind == "base":
            return
        if time.monotonic() < self._considered.get(held.base, 0.0) + CONSIDER_SECONDS:
            return
        self._considered[held.base] = time.monotonic()
        found = [
            (name, other, other.now.kind, other.demand.now)
            for name, other in self._entries.items()
            if other.now is not None and other.now.base == held.base
        ]
        total = sum(demand for *_, demand in found)
        if total < ENOUGH:
            return
        for name, other, kind, demand in found:
            if kind == "shared" and demand >= HOT * total:
                self._change(name, other, "merged")
            if kind == "merged" and demand < COOL * total and not other.only_merged:
                self._change(name, other, "shared")

    def _change(self, name: Hashable, entry: _Entry, kind: Kind) -> None:
        if entry.is_changing or entry.fetch is None:
            return
        entry.is_changing = True
        try:
            self._changes.submit(self._hold_as, name, entry, kind)
        except RuntimeError:  # closed meanwhile
            entry.is_changing = False

    def _hold_as(self, name: Hashable, entry: _Entry, kind: Kind) -> None:
        future: Future[_Held] | None = None
        try:
            assert isinstance(name, str)
            assert entry.fetch is not None
            future = Future()
            future.set_result(self._load(name, entry.fetch, kind))
            log.info("%s is held %s now", name, kind)
        except Exception:
            log.exception("%s could not be held %s and stays as it is", name, kind)
            future = None
        with self._lock:
            before = entry.held
            entry.is_changing = False
            if future is not None and self._entries.get(name) is entry:
                entry.held = future
                entry.memory_bytes = future.result().memory_bytes
                self._batcher_forget(before.result())
            if entry.forgotten and entry.is_idle and self._entries.get(name) is entry:
                self._remove(name)
            self._put_away(self._budget)

    def _held_bytes(self) -> int:
        models = sum(entry.memory_bytes for entry in self._entries.values())
        bases = sum(base.memory_bytes + base.written_bytes for base in self._bases.values())
        return models + bases + self._batcher.prefix_bytes

    def _put_away(self, budget: int) -> None:
        """Until what is held fits into `budget`, or everybody is being asked."""
        if self._held_bytes() <= budget:
            return
        for name in sorted(self._entries, key=lambda name: self._entries[name].used_at):
            if self._entries[name].is_idle:
                self._remove(name)
                if self._held_bytes() <= budget:
                    return

    def _remove(self, name: Hashable) -> None:
        log.info("put away: %s", name)
        held = self._entries.pop(name).now
        if held is None:
            return
        self._batcher_forget(held)
        standing = {entry.now.base for entry in self._entries.values() if entry.now is not None}
        coming = any(not entry.held.done() or entry.is_changing for entry in self._entries.values())
        if held.base not in standing and not coming:
            self._bases.pop(held.base, None)
        self._after_putting_away()

    def _batcher_forget(self, held: _Held) -> None:
        scope = held.predictor.weights.scope
        threading.Thread(target=self._batcher.forget, args=(scope,), daemon=True).start()
