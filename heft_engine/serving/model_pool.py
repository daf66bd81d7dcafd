"""Models in memory under a byte budget, the longest unused put away first.

A base is loaded once for all its models. A fine-tuned model is held merged (its own copy of the weights that its
adapters touch; the bits of its evaluation) or shared (what it adds to the base, in one batch with a thousand others).
`placement` "auto": merged while it has most of its base's requests to itself, shared otherwise; a shared model that
becomes hot is merged in the background, a merged one that cools down beside busy ones goes back. A model whose probe
rows don't agree unmerged is held merged.

It does NOT know queues, owners or storage: whoever asks brings the way to a bundle.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from heft_engine.bundle.format import Bundle, read_bundle
from heft_engine.config.metric_names import TaskType
from heft_engine.errors import BundleError
from heft_engine.model.base_models import BaseModel, resolve
from heft_engine.runtime.devices import choose_device, choose_dtype, dtype_of
from heft_engine.runtime.threads import run_in_short_lived_thread
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.loaded_base import Base, Kind, key_of, size_on_disk
from heft_engine.serving.placement import Entry, Fetch, Held, changes, kind_at_first
from heft_engine.serving.predictor import KEY_VALUE_BYTES, Predictor, base_of

log = logging.getLogger(__name__)

Placement = Literal["auto", "merged", "shared"]
#: Between two looks at the shares of one base.
CONSIDER_SECONDS = 1.0
#: Before a change that failed is tried again.
RETRY_SECONDS = 60.0


class ModelPool:
    """Safe to use from many threads. `on_evict` is called after models have left, to give their memory back."""

    def __init__(
        self,
        *,
        budget_bytes: int,
        batcher: Batcher,
        placement: Placement = "auto",
        model_dir: Path | None = None,
        cache_dir: Path | None = None,
        allow_paths: bool = True,
        device: str | None = None,
        key_value_bytes: int = KEY_VALUE_BYTES,
        out_of_memory: tuple[type[BaseException], ...] = (MemoryError,),
        on_evict: Callable[[], None] = lambda: None,
    ) -> None:
        self._budget = budget_bytes
        self._batcher = batcher
        self._placement = placement
        self._model_dir = model_dir
        self._cache_dir = cache_dir
        self._allow_paths = allow_paths
        self._device = device or choose_device()
        self._key_value_bytes = key_value_bytes
        self._out_of_memory = out_of_memory
        self._on_evict = on_evict
        self._lock = threading.RLock()
        self._entries: dict[Hashable, Entry] = {}
        self._considered: dict[Hashable, float] = {}
        self._has_left = False
        self._bases: dict[Hashable, Base] = {}
        # One model at a time, and a base between passes: transformers changes torch's default dtype while it loads.
        self._loading = threading.Lock()
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="hold-otherwise")

    @contextmanager
    def model(self, name: str, fetch: Fetch) -> Iterator[Predictor]:
        """The fine-tuned model called `name`, loaded from its bundle if it is not held; it stays meanwhile.

        Raises BundleError, ModelError, and what `fetch` raises; the next request tries again.
        """
        with self._using(name, lambda: Entry(load=lambda: self._load(name, fetch), fetch=fetch)) as held:
            yield held.predictor

    @contextmanager
    def base(self, reference: str, task: TaskType) -> Iterator[Predictor]:
        """A base model as it is. Raises ModelError."""
        with self._using(
            (reference, task), lambda: Entry(lambda: self._plain(reference, task), None)
        ) as held:
            yield held.predictor

    def evict_idle(self) -> None:
        """Puts away every model that nobody is asking."""
        with self._lock:
            self._put_away(0)
        self._give_back()

    def forget(self, name: str) -> None:
        """Puts a model away, and what was kept of its prompts, after the answers that are under way."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return
            entry.forgotten = True
            if entry.is_idle:
                self._remove(name)
        self._give_back()

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
    def _using(self, name: Hashable, make: Callable[[], Entry]) -> Iterator[Held]:
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

    def _bring(self, entry: Entry) -> None:
        try:
            held = run_in_short_lived_thread(lambda: self._loaded(entry))
            with self._lock:
                entry.stand(held)
        except BaseException as fault:  # noqa: BLE001 - whoever waits for it is told, this caller among them
            entry.held.set_exception(fault)

    def _loaded(self, entry: Entry) -> Held:
        try:
            return entry.load()
        except self._out_of_memory:
            log.warning("no memory for another model: all idle ones are put away")
        self.evict_idle()
        return entry.load()

    def _leave(self, name: Hashable, entry: Entry) -> None:
        with self._lock:
            entry.users -= 1
            entry.used_at = time.monotonic()
            failed = entry.held.done() and entry.held.exception() is not None
            if self._entries.get(name) is entry and (failed or (entry.forgotten and entry.is_idle)):
                self._remove(name)
            self._put_away(self._budget)
            self._reconsider(entry)
        self._give_back()

    def _load(self, name: str, fetch: Fetch, kind: Kind | None = None) -> Held:
        with fetch() as path:
            bundle = read_bundle(path)
            base_model = base_of(
                bundle, model_dir=self._model_dir, cache_dir=self._cache_dir, allow_paths=self._allow_paths
            )
            key = key_of(base_model, dtype_of(bundle.info.dtype))
            with self._loading:
                base = self._base(name, key, base_model)
                return self._held(name, bundle, base, key, kind or self._kind(name, key))

    def _held(self, name: str, bundle: Bundle, base: Base, key: Hashable, kind: Kind) -> Held:
        if kind == "shared":
            try:
                predictor, size = base.shared(bundle, (name, kind))
                return Held(predictor=predictor, kind=kind, base=key, memory_bytes=size)
            except BundleError as fault:
                log.warning("%s is held merged: unmerged, %s", name, fault)
                with self._lock:
                    if (entry := self._entries.get(name)) is not None:
                        entry.only_merged = True
        predictor, size = base.merged(bundle, (name, "merged"))
        return Held(predictor=predictor, kind="merged", base=key, memory_bytes=size)

    def _plain(self, reference: str, task: TaskType) -> Held:
        base_model = resolve(
            reference, model_dir=self._model_dir, cache_dir=self._cache_dir, allow_paths=self._allow_paths
        )
        key = key_of(base_model, choose_dtype("auto", self._device))
        with self._loading:
            base = self._base((reference, task), key, base_model)
            predictor = base.plain(task, (reference, "base"))
            return Held(predictor=predictor, kind="base", base=key, memory_bytes=0)

    def _base(self, name: Hashable, key: Hashable, model: BaseModel) -> Base:
        """What the model called `name` stands on, loaded if it is not there. One at a time."""
        with self._lock:
            if (entry := self._entries.get(name)) is not None:
                entry.base = key
            base = self._bases.get(key)
            if base is not None:
                return base
            self._put_away(self._budget - size_on_disk(model.path))
        self._give_back()
        assert isinstance(key, tuple)
        dtype = key[-1]
        base = self._batcher.run(
            lambda: Base(
                model,
                dtype=dtype,
                device=self._device,
                batcher=self._batcher,
                key_value_bytes=self._key_value_bytes,
                spare_bytes=self._spare_bytes,
            )
        )
        with self._lock:
            self._bases[key] = base
        return base

    def _kind(self, name: str, key: Hashable) -> Kind:
        """How a model that is being loaded shall be held."""
        if self._placement != "auto":
            return self._placement
        with self._lock:
            others = [e for e in self._entries.values() if e.now is not None and e.now.base == key]
            return kind_at_first(self._entries[name], others) if name in self._entries else "shared"

    def _reconsider(self, entry: Entry) -> None:
        """Has the models of a base held otherwise, in the background, when their requests ask for it."""
        held = entry.now
        if self._placement != "auto" or held is None or held.kind == "base":
            return
        if time.monotonic() < self._considered.get(held.base, 0.0) + CONSIDER_SECONDS:
            return
        self._considered[held.base] = time.monotonic()
        found = {n: e for n, e in self._entries.items() if e.now is not None and e.now.base == held.base}
        for name, kind in changes(found):
            self._change(name, self._entries[name], kind)

    def _change(self, name: Hashable, entry: Entry, kind: Kind) -> None:
        if entry.is_changing or entry.fetch is None or time.monotonic() < entry.no_change_before:
            return
        assert isinstance(name, str)
        entry.is_changing = True
        try:
            self._changes.submit(self._hold_as, name, entry, entry.fetch, kind)
        except RuntimeError:  # closed meanwhile
            entry.is_changing = False

    def _hold_as(self, name: str, entry: Entry, fetch: Fetch, kind: Kind) -> None:
        held: Held | None = None
        try:
            if not entry.forgotten:
                held = run_in_short_lived_thread(lambda: self._load(name, fetch, kind))
                log.info("%s is held %s now", name, kind)
        except Exception:
            log.exception("%s could not be held %s and stays as it is", name, kind)
        finally:
            with self._lock:
                self._changed(name, entry, held)
            self._give_back()

    def _changed(self, name: str, entry: Entry, held: Held | None) -> None:
        entry.is_changing = False
        if held is None:
            entry.no_change_before = time.monotonic() + RETRY_SECONDS
        elif self._entries.get(name) is entry:
            before = entry.held.result()
            entry.stand(held)
            self._has_left = True
            self._batcher.forget(before.predictor.variant.scope)
        if entry.forgotten and entry.is_idle and self._entries.get(name) is entry:
            self._remove(name)
        self._put_away(self._budget)

    def _spare_bytes(self) -> int:
        """Half of what nobody has asked for yet: the rest is for other models."""
        with self._lock:
            return (self._budget - self._held_bytes()) // 2

    def _held_bytes(self) -> int:
        models = sum(entry.memory_bytes for entry in self._entries.values())
        bases = sum(base.memory_bytes + base.written_bytes for base in self._bases.values())
        return models + bases + self._batcher.prefix_bytes

    def _put_away(self, budget: int) -> None:
        """Until what is held fits into `budget`, or everybody is being asked. Asked after every answer: with a
        thousand models, nothing here may look at them twice."""
        excess = self._held_bytes() - budget
        if excess <= 0:
            return
        for name in sorted(self._entries, key=lambda name: self._entries[name].used_at):
            if excess <= 0:
                return
            if self._entries[name].is_idle:
                excess -= self._remove(name)

    def _remove(self, name: Hashable) -> int:
        """The bytes that go: its own, and those of its base if it was the last one on it."""
        log.info("put away: %s", name)
        self._has_left = True
        entry = self._entries.pop(name)
        if entry.now is not None:
            self._batcher.forget(entry.now.predictor.variant.scope)
        gone = entry.memory_bytes
        if all(other.base != entry.base for other in self._entries.values()):
            base = self._bases.pop(entry.base, None)
            gone += base.memory_bytes + base.written_bytes if base is not None else 0
        return gone

    def _give_back(self) -> None:
        """Once for all that have left, with nobody waiting for the lock meanwhile."""
        with self._lock:
            has_left, self._has_left = self._has_left, False
        if has_left:
            self._on_evict()
