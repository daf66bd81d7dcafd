"""Models in memory under a byte budget; the least recently used are evicted.

A base model is loaded once for all of its models. A fine-tuned model is merged (its own copy of the weights that its
adapters change, with the bits of its evaluation) or shared (an unmerged adapter, in one batch with a thousand others).
With placement "auto" a model is merged while it has most of its base model's requests to itself and shared otherwise;
it is reloaded in the background when that changes. A model whose probe rows don't agree unmerged is always merged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from heft_engine.bundle.assemble import resolve_base
from heft_engine.bundle.format import read_bundle
from heft_engine.config.metric_names import TaskType
from heft_engine.errors import BundleError
from heft_engine.model.base_models import BaseModel, resolve
from heft_engine.model.precision import dtype_for
from heft_engine.runtime.devices import choose_device, dtype_of
from heft_engine.runtime.out_of_memory import is_out_of_memory
from heft_engine.runtime.threads import run_in_short_lived_thread
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.loaded_base import BaseKey, Kind, LoadedBase, LoadedModel, expected_bytes
from heft_engine.serving.placement import (
    BaseName,
    Fetch,
    ModelName,
    PoolEntry,
    first_placement,
    placement_changes,
    update_rates,
)
from heft_engine.serving.predictor import KEY_VALUE_BYTES, Predictor

log = logging.getLogger(__name__)

Placement = Literal["auto", "merged", "shared"]
MAINTENANCE_SECONDS = 1.0  #: Least time between two looks at memory and placement, unless a model was loaded.
#: Least time before a reload that failed is tried again.
RETRY_SECONDS = 60.0


class ModelPool:
    """Safe to use from many threads. `on_evict` is called after models have left memory."""

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
        on_evict: Callable[[], None] = lambda: None,
    ) -> None:
        self._budget = self._largest_budget = budget_bytes  # `limit` lowers the first
        self._batcher = batcher
        self._placement = placement
        self._source: dict[str, Any] = {
            "model_dir": model_dir,
            "cache_dir": cache_dir,
            "allow_paths": allow_paths,
        }
        self._device = choose_device(device)
        self._key_value_bytes = key_value_bytes
        self._on_evict = on_evict
        self._lock = threading.RLock()
        self._entries: dict[ModelName, PoolEntry] = {}
        self._bases: dict[BaseKey, LoadedBase] = {}
        self._next_maintenance = 0.0
        self._rates_updated_at = time.monotonic()
        self._evicted = False
        # One model at a time, and a base model between passes: transformers changes torch's default dtype meanwhile.
        self._loading = threading.Lock()
        self._reloads = ThreadPoolExecutor(1, thread_name_prefix="reload")

    @contextmanager
    def model(self, name: str, fetch: Fetch) -> Iterator[Predictor]:
        """Gives a fine-tuned model, loaded from its bundle unless it is in memory; it is not evicted meanwhile.

        Raises BundleError, ModelError, and what `fetch` raises; the next call tries again.
        """
        with self._use(name, fetch) as model:
            yield model.predictor

    @contextmanager
    def base(self, reference: str, task: TaskType) -> Iterator[Predictor]:
        """Gives a base model as it is. Raises ModelError."""
        with self._use(BaseName(reference, task)) as model:
            yield model.predictor

    def evict_idle(self) -> None:
        """Evicts every model that is not in use."""
        with self._lock:
            self._evict(0)
        self._notify_evicted()

    def limit(self, limit_bytes: float) -> None:
        """Keeps models within so many bytes too, from now on; infinite: within the budget alone. Evicts idle ones."""
        with self._lock:
            self._budget = int(min(limit_bytes, self._largest_budget))
            self._evict(self._budget)
            self._next_maintenance = 0.0
        self._notify_evicted()

    def remove(self, name: str) -> None:
        """Removes a model and its cached prefixes, once it is not in use."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return
            entry.is_removed = True
            self._drop_removed(entry)
        self._notify_evicted()

    def close(self) -> None:
        """Ends the batcher and drops all models."""
        self._reloads.shutdown(cancel_futures=True)
        self._batcher.close()
        with self._lock:
            self._entries.clear()
            self._bases.clear()

    @property
    def names(self) -> list[str]:
        """The fine-tuned models that are loaded or being loaded."""
        with self._lock:
            return [name for name in self._entries if isinstance(name, str)]

    @property
    def memory_bytes(self) -> int:
        with self._lock:
            return self._used_bytes()

    def usage(self) -> dict[Kind, tuple[int, int]]:
        """Returns the number of loaded models of each kind, and the bytes of their weights."""
        usage: dict[Kind, tuple[int, int]] = {"merged": (0, 0), "shared": (0, 0), "base": (0, 0)}
        with self._lock:
            models = [entry.loaded for entry in self._entries.values() if entry.loaded is not None]
            bases = list(self._bases.values())
        for model in models:
            if model.kind != "base":
                count, size = usage[model.kind]
                usage[model.kind] = (count + 1, size + model.weight_bytes)
        usage["base"] = (len(bases), sum(base.weight_bytes for base in bases))
        return usage

    @contextmanager
    def _use(self, name: ModelName, fetch: Fetch | None = None) -> Iterator[LoadedModel]:
        with self._lock:
            is_new = name not in self._entries
            if is_new:
                self._entries[name] = PoolEntry(name, fetch)
            entry = self._entries[name]
            entry.users += 1
            entry.requests += 1
        try:
            if is_new:
                self._load(entry)
            yield entry.future.result()
        finally:
            self._release(entry)

    def _load(self, entry: PoolEntry) -> None:
        try:
            model = run_in_short_lived_thread(lambda: self._load_or_make_room(entry))
            with self._lock:
                entry.set_loaded(model)
                self._next_maintenance = 0.0
        except BaseException as error:  # noqa: BLE001 - it is raised in all threads that wait for the future
            entry.future.set_exception(error)

    def _load_or_make_room(self, entry: PoolEntry) -> LoadedModel:
        try:
            return self._load_model(entry)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("out of memory while loading a model: evicting all idle ones")
        self.evict_idle()
        return self._load_model(entry)

    def _release(self, entry: PoolEntry) -> None:
        with self._lock:
            entry.users -= 1
            entry.used_at = now = time.monotonic()
            self._drop_removed(entry)
            if now >= self._next_maintenance:
                fits = self._evict(self._budget)
                self._next_maintenance = now + MAINTENANCE_SECONDS if fits else 0.0
                self._rebalance(now)
        self._notify_evicted()

    def _load_model(self, entry: PoolEntry, kind: Kind | None = None) -> LoadedModel:
        if isinstance(entry.name, BaseName):
            model = resolve(entry.name.reference, **self._source)
            key = BaseKey.of(model, dtype_for(model, "auto", self._device))
            with self._loading:
                base = self._get_base(entry, key, model)
                return base.load_plain(entry.name.task, scope=(entry.name.reference, "base"))
        assert entry.fetch is not None
        with entry.fetch() as path:
            bundle = read_bundle(path)
            model = resolve_base(bundle, **self._source)
            key = BaseKey.of(model, dtype_of(bundle.info.dtype), bundle.info.base_quantization)
            with self._loading:
                base = self._get_base(entry, key, model)
                if (kind or self._first_placement(entry, key)) == "shared":
                    try:
                        return base.load_shared(bundle, scope=(entry.name, "shared"))
                    except BundleError as error:
                        log.warning("%s is merged, its unmerged scores differ: %s", entry.name, error)
                        entry.only_merged = True
                return base.load_merged(bundle, scope=(entry.name, "merged"))

    def _get_base(self, entry: PoolEntry, key: BaseKey, model: BaseModel) -> LoadedBase:
        """Returns an entry's base model, loaded if need be. Called under `_loading`."""
        with self._lock:
            entry.base = key
            base = self._bases.get(key)
            if base is not None:
                return base
            self._evict(self._budget - expected_bytes(model.path, key.quantization))
        self._notify_evicted()
        base = self._batcher.run(
            lambda: LoadedBase(
                model,
                key,
                device=self._device,
                batcher=self._batcher,
                key_value_bytes=self._key_value_bytes,
                spare_bytes=self._spare_bytes,
            )
        )
        with self._lock:
            self._bases[key] = base
        return base

    def _first_placement(self, entry: PoolEntry, key: BaseKey) -> Kind:
        if self._placement != "auto":
            return self._placement
        with self._lock:
            self._update_rates(time.monotonic())
            return first_placement(entry, self._on(key))

    def _on(self, key: BaseKey) -> list[PoolEntry]:
        """Returns the loaded models of one base model."""
        return [
            entry for entry in self._entries.values() if entry.loaded is not None and entry.loaded.base == key
        ]

    def _rebalance(self, now: float) -> None:
        """Reloads models in the background where their placement should change."""
        if self._placement != "auto":
            return
        self._update_rates(now)
        for base in self._bases:
            for entry, kind in placement_changes(self._on(base)):
                if entry.fetch is None or entry.is_reloading or now < entry.reload_after:
                    continue
                entry.is_reloading = True
                try:
                    self._reloads.submit(self._reload_as, entry, kind)
                except RuntimeError:  # the pool is closed
                    entry.is_reloading = False

    def _update_rates(self, now: float) -> None:
        update_rates(self._entries.values(), now - self._rates_updated_at)
        self._rates_updated_at = now

    def _reload_as(self, entry: PoolEntry, kind: Kind) -> None:
        model: LoadedModel | None = None
        try:
            if not entry.is_removed:
                model = run_in_short_lived_thread(lambda: self._load_model(entry, kind))
                log.info("%s is %s now", entry.name, model.kind)
        except Exception:
            log.exception("%s could not be reloaded as %s and stays as it is", entry.name, kind)
        with self._lock:
            entry.is_reloading = False
            if model is None:
                entry.reload_after = time.monotonic() + RETRY_SECONDS
            elif self._entries.get(entry.name) is entry:
                self._replace(entry, model)
            self._drop_removed(entry)
            self._evict(self._budget)
        self._notify_evicted()

    def _replace(self, entry: PoolEntry, model: LoadedModel) -> None:
        if entry.loaded is not None:
            self._batcher.clear_prefixes(entry.loaded.predictor.variant.scope)
        entry.set_loaded(model)
        self._evicted = True

    def _spare_bytes(self) -> int:
        """Returns half of the free budget: the rest is for other models."""
        with self._lock:
            return (self._budget - self._used_bytes()) // 2

    def _used_bytes(self) -> int:
        models = sum(entry.memory_bytes for entry in self._entries.values())
        bases = sum(base.memory_bytes for base in self._bases.values())
        return models + bases + self._batcher.prefix_bytes

    def _evict(self, budget: int) -> bool:
        """Evicts idle models, the least recently used first, until all fit `budget`. Returns whether they do.

        There may be a thousand models: none is looked at twice.
        """
        excess = self._used_bytes() - budget
        if excess > 0:
            for entry in sorted(self._entries.values(), key=lambda entry: entry.used_at):
                if excess > 0 and entry.is_idle:
                    excess -= self._remove(entry)
        return excess <= 0

    def _drop_removed(self, entry: PoolEntry) -> None:
        is_over = entry.has_failed or (entry.is_removed and entry.is_idle)
        if is_over and self._entries.get(entry.name) is entry:
            self._remove(entry)

    def _remove(self, entry: PoolEntry) -> int:
        """Removes an entry, and its base model with the last entry on it; returns their bytes."""
        log.info("evicted: %s", entry.name)
        self._evicted = True
        del self._entries[entry.name]
        if entry.loaded is not None:
            self._batcher.clear_prefixes(entry.loaded.predictor.variant.scope)
        freed = entry.memory_bytes
        if entry.base is not None and all(other.base != entry.base for other in self._entries.values()):
            base = self._bases.pop(entry.base, None)
            freed += base.memory_bytes if base is not None else 0
        return freed

    def _notify_evicted(self) -> None:
        """Calls `on_evict` once for all evictions since the last call, outside the lock."""
        with self._lock:
            evicted, self._evicted = self._evicted, False
        if evicted:
            self._on_evict()
