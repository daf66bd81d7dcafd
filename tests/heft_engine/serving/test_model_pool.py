"""Models in memory: loaded once, merged or shared, evicted when others need the memory."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import LORA, REFT, but, config, parse, run, yes_no
from tiny_models import save_tiny_model

from cli.stack.process import wait_until
from heft_engine.errors import BundleError, ModelError
from heft_engine.serving import model_pool as model_pool
from heft_engine.serving import placement
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.model_pool import ModelPool
from heft_engine.serving.predictor import Prediction, load

ROWS = parse(yes_no(6, seed=5))
ROOMY = 2**40


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four bundles m0 … m3 on one base, from two training runs."""
    folder = tmp_path_factory.mktemp("pool")
    save_tiny_model(folder / "base")
    for seed in range(2):
        stages = [but(LORA, n_epochs=1), but(REFT, n_epochs=1)]
        run(config(folder / "base", "heft", stages, seed=seed), folder / f"m{seed}")
        shutil.copytree(folder / f"m{seed}", folder / f"m{seed + 2}")
    return folder


class Library:
    """Fetches bundles, and counts the fetches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        self.fault: BaseException | None = None

    def fetch(self, name: str) -> Callable[[], Any]:
        @contextmanager
        def bring() -> Iterator[Path]:
            self.fetched.append(name)
            if self.fault is not None:
                fault, self.fault = self.fault, None
                raise fault
            yield self.folder / name

        return bring


@pytest.fixture
def library(bundles: Path) -> Library:
    return Library(bundles)


@pytest.fixture
def make_pool() -> Iterator[Callable[..., ModelPool]]:
    pools: list[ModelPool] = []

    def make(**options: Any) -> ModelPool:
        settings = {"budget_bytes": ROOMY, "placement": "auto", "device": "cpu", **options}
        pools.append(ModelPool(batcher=Batcher(prefix_bytes=0), **settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def ask(pool: ModelPool, library: Library, name: str) -> list[Prediction]:
    with pool.model(name, library.fetch(name)) as predictor:
        return predictor.predict(ROWS)


def close(first: list[Prediction], second: list[Prediction]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(abs((a.probability or 0) - (b.probability or 0)) < 1e-4 for a, b in pairs)


def test_a_merged_model_answers_with_the_librarys_bits_and_a_shared_one_within_the_probe_tolerance(
    make_pool: Callable[..., ModelPool], library: Library, bundles: Path
) -> None:
    expected = {name: load(bundles / name, device="cpu").predict(ROWS) for name in ("m0", "m1")}
    merged, shared = make_pool(placement="merged"), make_pool(placement="shared")
    for name, answers in expected.items():
        assert ask(merged, library, name) == answers
        assert close(ask(shared, library, name), answers)
    assert expected["m0"] != expected["m1"]
    assert merged.usage()["merged"][0] == shared.usage()["shared"][0] == 2
    base = merged.usage()["base"]
    assert base == shared.usage()["base"]
    assert base[0] == 1
    assert shared.usage()["shared"][1] < merged.usage()["merged"][1] < base[1]
    assert merged.memory_bytes == base[1] + merged.usage()["merged"][1]


def test_a_model_that_went_on_from_another_is_served_merged_and_shared(
    make_pool: Callable[..., ModelPool], library: Library, bundles: Path
) -> None:
    """Its base is that of the first model: two LoRA stages and two interventions at one place act on its rows."""
    stages = [but(LORA, n_epochs=1, rank=3), but(REFT, n_epochs=1, init="new")]
    run(config(bundles / "m0", "recipe", stages), bundles / "further")
    merged, shared = make_pool(placement="merged"), make_pool(placement="shared")
    answers = load(bundles / "further", device="cpu").predict(ROWS)
    assert not close(answers, load(bundles / "m0", device="cpu").predict(ROWS))
    for pool in (merged, shared):
        ask(pool, library, "m0")
        assert close(ask(pool, library, "further"), answers)
        assert pool.usage()["base"][0] == 1


def test_a_model_is_fetched_once_for_concurrent_requests(
    make_pool: Callable[..., ModelPool], library: Library
) -> None:
    pool = make_pool()
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda _: ask(pool, library, "m0"), range(6)))
    assert answers == answers[:1] * 6
    assert library.fetched == ["m0"]
    assert pool.names == ["m0"]


@pytest.mark.parametrize("hold", ["merged", "shared"])
def test_loading_a_model_leaves_no_openmp_threads_that_slow_the_passes(
    make_pool: Callable[..., ModelPool], library: Library, hold: str
) -> None:
    """A thread that has computed in parallel keeps its OpenMP team, which then competes with that of the passes."""
    pool, loaders = make_pool(placement=hold), []

    @contextmanager
    def fetch() -> Iterator[Path]:
        loaders.append(threading.current_thread())
        with library.fetch("m0")() as path:
            yield path

    with pool.model("m0", fetch) as predictor:
        predictor.predict(ROWS)
    assert [thread.is_alive() for thread in loaders] == [False]


def test_the_only_model_of_a_base_is_merged_and_models_beside_busy_ones_are_shared(
    make_pool: Callable[..., ModelPool], library: Library
) -> None:
    pool = make_pool()
    for _ in range(4):
        ask(pool, library, "m0")
    assert pool.usage()["merged"][0] == 1
    ask(pool, library, "m1")
    assert (pool.usage()["merged"][0], pool.usage()["shared"][0]) == (1, 1)


def test_a_shared_model_that_becomes_hot_is_merged_and_a_merged_one_that_cools_is_shared(
    make_pool: Callable[..., ModelPool], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "UNMERGE_SHARE", 0.2)
    evictions: list[bool] = []
    pool = make_pool(on_evict=lambda: evictions.append(True))
    for _ in range(5):
        ask(pool, library, "m0")
    before = ask(pool, library, "m1")
    assert not evictions
    assert pool.usage()["shared"][0] == 1
    for _ in range(40):
        ask(pool, library, "m1")

    def kinds() -> dict[Any, str | None]:
        ask(pool, library, "m1")
        return {name: entry.loaded.kind if entry.loaded else None for name, entry in pool._entries.items()}

    assert wait_until(lambda: kinds() == {"m0": "shared", "m1": "merged"}, seconds=20)
    assert close(ask(pool, library, "m1"), before)
    assert wait_until(lambda: len(evictions) >= 1, seconds=20), "the earlier copies were not freed"


def test_the_least_recently_used_model_is_evicted(
    make_pool: Callable[..., ModelPool], library: Library
) -> None:
    roomy = make_pool(placement="shared")
    for name in ("m0", "m1", "m2"):
        ask(roomy, library, name)
    evictions: list[bool] = []
    pool = make_pool(
        placement="shared", budget_bytes=roomy.memory_bytes, on_evict=lambda: evictions.append(True)
    )
    for name in ("m0", "m1", "m2", "m0", "m3"):
        ask(pool, library, name)
    assert set(pool.names) == {"m0", "m2", "m3"}
    assert evictions == [True]
    assert pool.memory_bytes <= roomy.memory_bytes


def test_a_lower_limit_evicts_idle_models_and_is_lifted_again(
    make_pool: Callable[..., ModelPool], library: Library
) -> None:
    evictions: list[bool] = []
    pool = make_pool(placement="shared", on_evict=lambda: evictions.append(True))
    for name in ("m0", "m1", "m2"):
        ask(pool, library, name)
    with pool.model("m0", library.fetch("m0")):
        pool.limit(1)
        assert pool.names == ["m0"], "it is in use"
        assert evictions == [True]
    assert pool.names == []
    pool.limit(2**60)
    ask(pool, library, "m1")
    pool.limit(math.inf)
    assert pool.names == ["m1"]
    with_budget = make_pool(budget_bytes=1)
    with_budget.limit(2**60)
    ask(with_budget, library, "m0")
    assert with_budget.names == [], "a limit is no larger than the budget"


def test_a_model_larger_than_the_budget_answers_and_is_evicted(
    make_pool: Callable[..., ModelPool], library: Library
) -> None:
    pool = make_pool(budget_bytes=1)
    answers = ask(pool, library, "m0")
    assert pool.names == []
    assert pool.memory_bytes == 0
    assert ask(pool, library, "m0") == answers
    assert library.fetched == ["m0", "m0"]


def test_a_model_in_use_is_not_evicted(make_pool: Callable[..., ModelPool], library: Library) -> None:
    pool = make_pool(budget_bytes=1)
    with pool.model("m0", library.fetch("m0")) as predictor:
        pool.evict_idle()
        ask(pool, library, "m1")
        assert pool.names == ["m0"]
        assert predictor.predict(ROWS[:1])
    assert pool.names == []


def test_a_load_that_failed_is_tried_again_with_the_next_request(
    make_pool: Callable[..., ModelPool], library: Library
) -> None:
    pool = make_pool()
    library.fault = ConnectionError("away")
    with pytest.raises(ConnectionError):
        ask(pool, library, "m0")
    assert pool.names == []
    assert ask(pool, library, "m0")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_without_memory_idle_models_are_evicted_first(
    make_pool: Callable[..., ModelPool], library: Library, error: BaseException
) -> None:
    pool = make_pool()
    ask(pool, library, "m0")
    library.fault = error
    assert ask(pool, library, "m1")
    assert pool.names == ["m1"]


def test_a_removed_model_is_freed_after_its_last_answer(
    make_pool: Callable[..., ModelPool], library: Library
) -> None:
    pool = make_pool()
    with pool.model("m0", library.fetch("m0")) as predictor:
        pool.remove("m0")
        assert predictor.predict(ROWS[:1])
        assert pool.names == ["m0"]
    assert pool.names == []
    pool.remove("m0")
    pool.remove("unknown")


def test_a_model_whose_probe_rows_differ_unmerged_is_merged(
    make_pool: Callable[..., ModelPool], library: Library, bundles: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundles / "m0", tmp_path / "m0")
    described = json.loads((tmp_path / "m0" / "heft.json").read_text())
    (tmp_path / "m0" / "heft.json").write_text(json.dumps(described | {"probe_tolerance": 0.0}))
    pool = make_pool(placement="shared")
    ask(pool, Library(tmp_path), "m0")
    assert pool.usage()["merged"][0] == 1


def test_damaged_bundles_and_unknown_bases_are_refused(
    make_pool: Callable[..., ModelPool], bundles: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundles / "m0", tmp_path / "m0")
    (tmp_path / "m0" / "heft.json").write_text("{}")
    pool = make_pool()
    with pytest.raises(BundleError):
        ask(pool, Library(tmp_path), "m0")
    with pytest.raises(ModelError), pool.base("no-such-model", "yes_no"):
        pass
    assert pool.memory_bytes == 0


def test_a_base_answers_beside_its_models(
    make_pool: Callable[..., ModelPool], library: Library, bundles: Path
) -> None:
    pool = make_pool(model_dir=bundles)
    threads = [threading.Thread(target=ask, args=(pool, library, name)) for name in ("m0", "m1")]
    for thread in threads:
        thread.start()
    with pool.base("base", "yes_no") as predictor:
        assert predictor.predict(ROWS)[0].answer in ("yes", "no")
    for thread in threads:
        thread.join()
    assert sorted(pool.names) == ["m0", "m1"]


def test_a_base_whose_model_failed_to_load_is_freed(
    make_pool: Callable[..., ModelPool], bundles: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundles / "m0", tmp_path / "m0")
    described = json.loads((tmp_path / "m0" / "heft.json").read_text())
    (tmp_path / "m0" / "heft.json").write_text(json.dumps(described | {"tokenizer_sha256": "another"}))
    evictions: list[bool] = []
    pool = make_pool(on_evict=lambda: evictions.append(True))
    with pytest.raises(BundleError, match="tokenizer"):
        ask(pool, Library(tmp_path), "m0")
    assert pool.usage()["base"][0] == 0
    assert evictions == [True]


def test_an_unused_base_is_evicted_before_another_is_loaded(
    make_pool: Callable[..., ModelPool], bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two that don't fit beside each other could never be asked one after the other."""
    for name in ("a", "b"):
        shutil.copytree(bundles / "base", tmp_path / name)
    loading: list[tuple[int, int]] = []
    evictions: list[bool] = []
    pool = make_pool(model_dir=tmp_path, budget_bytes=1, on_evict=lambda: evictions.append(True))
    plain = model_pool.LoadedBase

    def base(*arguments: Any, **options: Any) -> Any:
        loading.append((pool.usage()["base"][0], len(evictions)))
        return plain(*arguments, **options)

    monkeypatch.setattr(model_pool, "LoadedBase", base)
    with pool.base("a", "yes_no") as first:
        expected = first.predict(ROWS)
        with pool.base("b", "yes_no") as second:
            assert second.predict(ROWS) == expected
    pool._budget = ROOMY
    with pool.base("a", "yes_no"), pool.base("b", "yes_no"):
        assert pool.usage()["base"][0] == 2
    pool._budget = 1
    with pool.base("a", "choice"):
        pass
    assert loading == [(0, 0), (1, 0), (0, 2), (1, 2)], "bases in memory, and calls of on_evict"


def test_a_change_that_fails_leaves_the_model_as_it_is_and_is_not_tried_again_at_once(
    make_pool: Callable[..., ModelPool], library: Library
) -> None:
    pool = make_pool()
    for _ in range(5):
        ask(pool, library, "m0")
    before = ask(pool, library, "m1")
    entry = pool._entries["m1"]
    library.fault = MemoryError()  # of the next fetch

    def has_failed() -> bool:
        ask(pool, library, "m1")
        return library.fault is None and not entry.is_reloading

    assert wait_until(has_failed, seconds=30)
    fetched = len(library.fetched)
    pool._next_maintenance = 0.0
    assert ask(pool, library, "m1") == before
    assert len(library.fetched) == fetched
    assert pool.usage()["shared"][0] == 1
    pool.remove("m1")
    assert "m1" not in pool.names
