"""Compilations of grammars on threads of their own, with limits of the time that each waits for its turn and runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from heft_engine.errors import Overloaded

T = TypeVar("T")


class Compilation(Generic[T]):
    """One compilation, for which several requests may wait. Safe to use from many threads.

    A running one can't be stopped. One that nobody waits for any more when its turn comes is dropped.
    """

    def __init__(self, compile: Callable[[], T]) -> None:
        """The caller is the first that waits."""
        self.future: Future[T] = Future()
        self._compile = compile
        self._lock = threading.Lock()
        self._waiting = 1
        self._is_dropped = False
        self._has_started = threading.Event()
        self._started_at = 0.0

    def join(self) -> bool:
        """Counts one more that waits. Returns False if the compilation has been dropped."""
        with self._lock:
            if not self._is_dropped:
                self._waiting += 1
            return not self._is_dropped

    def result(self, *, queue_seconds: float, seconds: float) -> T:
        """Waits for the grammar; each that waits calls it once.

        Raises Overloaded if it has not begun after `queue_seconds`, TimeoutError if it has run for `seconds`, and what
        the compilation raised.
        """
        try:
            if not self._has_started.wait(queue_seconds):
                raise Overloaded(
                    f"other grammars have been compiled for {queue_seconds:g} s before this one: ask again later"
                )
            return self.future.result(max(0.0, self._started_at + seconds - time.monotonic()))
        finally:
            with self._lock:
                self._waiting -= 1

    def run(self) -> None:
        """Compiles the grammar, or drops the compilation."""
        with self._lock:
            self._is_dropped = self._waiting == 0
        if self._is_dropped:
            self.future.cancel()
            return
        self._started_at = time.monotonic()
        self._has_started.set()
        try:
            grammar = self._compile()
        except Exception as error:  # noqa: BLE001 - it is raised where requests wait
            self.future.set_exception(error)
        else:
            self.future.set_result(grammar)


class CompilationThreads:
    """Threads that run compilations in order. They end with the process, which does not wait for them."""

    def __init__(self, number: int) -> None:
        self._queue: SimpleQueue[Compilation[Any]] = SimpleQueue()
        for index in range(number):
            threading.Thread(target=self._run, name=f"grammar-compiler-{index}", daemon=True).start()

    def submit(self, compilation: Compilation[Any]) -> None:
        self._queue.put(compilation)

    def _run(self) -> None:
        while True:
            self._queue.get().run()
