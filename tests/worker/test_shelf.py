"""Models under a byte budget: who is put away, who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from worker_bench import eventually

from worker.shelf import Shelf


@dataclass(eq=False)
class Weights:
    name: str
    memory_bytes: int = 10
    threads: set[int] = field(default_factory=set)

    def ask(self) -> str:
        self.threads.add(threading.get_ident())
        return self.name


class Library:
    """Loads weights, and remembers which."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.faults: list[BaseException] = []

    def loader(self, name: str, memory_bytes: int = 10) -> Callable[[], Weights]:
        def load() -> Weights:
            self.loaded.append(name)
            if self.faults:
                raise self.faults.pop()
            return Weights(name, memory_bytes)

        return load


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def shelf() -> Iterator[Shelf[Weights]]:
    shelf: Shelf[Weights] = Shelf(25)
    yield shelf
    shelf.close()


def ask(shelf: Shelf[Weights], library: Library, name: str, memory_bytes: int = 10) -> str:
    return shelf.ask(name, library.loader(name, memory_bytes), Weights.ask)


def test_a_model_is_loaded_once(shelf: Shelf[Weights], library: Library) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(shelf, library, "a"), range(16)))
    assert answers == ["a"] * 16
    assert library.loaded == ["a"]


def test_a_model_is_asked_on_one_thread_whoever_asks(shelf: Shelf[Weights], library: Library) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(shelf, library, "a"), range(16)))
    threads = shelf.ask("a", library.loader("a"), lambda weights: weights.threads)
    assert len(threads) == 1


def test_the_longest_unused_is_put_away(shelf: Shelf[Weights], library: Library) -> None:
    for name in ("a", "b", "a", "c"):
        ask(shelf, library, name)
    assert shelf.memory_bytes == 20
    ask(shelf, library, "a")
    assert library.loaded == ["a", "b", "c"]
    ask(shelf, library, "b")
    assert library.loaded == ["a", "b", "c", "b"]


def test_one_that_is_larger_than_the_budget_still_answers(shelf: Shelf[Weights], library: Library) -> None:
    assert ask(shelf, library, "large", 1_000) == "large"


def test_nobody_is_put_away_while_it_is_asked(shelf: Shelf[Weights], library: Library) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slowly(weights: Weights) -> str:
        asked.set()
        assert go_on.wait(20)
        return weights.name

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(shelf.ask, "a", library.loader("a"), slowly)
        assert asked.wait(20)
        ask(shelf, library, "b", 100)
        shelf.make_room()
        assert shelf.memory_bytes == 10, "b is gone, a stays"
        go_on.set()
        assert answer.result(20) == "a"
    shelf.make_room()
    assert shelf.memory_bytes == 0


def test_a_load_that_failed_is_tried_again_with_the_next_request(
    shelf: Shelf[Weights], library: Library
) -> None:
    library.faults = [OSError("storage away")]
    with pytest.raises(OSError, match="storage away"):
        ask(shelf, library, "a")
    assert ask(shelf, library, "a") == "a"


def test_without_memory_the_idle_go_first(shelf: Shelf[Weights], library: Library) -> None:
    ask(shelf, library, "a")
    library.faults = [MemoryError()]
    assert ask(shelf, library, "b") == "b"
    assert shelf.memory_bytes == 10
    assert library.loaded == ["a", "b", "b"]


def test_memory_is_given_back_after_a_model_has_left(library: Library) -> None:
    told: list[int] = []
    shelf: Shelf[Weights] = Shelf(5, put_away=lambda: told.append(1))
    ask(shelf, library, "a")
    eventually(lambda: told == [1])
    shelf.close()


def test_a_forgotten_model_goes_when_its_last_answer_is_out(shelf: Shelf[Weights], library: Library) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(weights: Weights) -> str:
        entered.set()
        assert leave.wait(10)
        return weights.name

    ask(shelf, library, "idle")
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(shelf.ask, "busy", library.loader("busy"), slow)
        assert entered.wait(10)
        for name in ("idle", "busy", "unknown"):
            shelf.forget(name)
        assert list(shelf.held) == ["busy"]
        leave.set()
        assert answer.result(10) == "busy"
    assert shelf.held == {}
    assert shelf.memory_bytes == 0
