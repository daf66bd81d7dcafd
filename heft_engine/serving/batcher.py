"""Dynamic batching: one thread runs all forward passes, and requests that wait for the same model share one.

An idle batcher starts a pass at once. Requests that arrive meanwhile are taken together by the next one, up to a token
budget. After a shared pass the batcher lingers for a few milliseconds: clients that ask one question after another ask
again at once. An error in a pass ends the requests in it; the thread goes on. A row that does not fit into memory alone
ends its own request only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Protocol, TypeVar

from heft_engine.data.encoding import Example
from heft_engine.errors import OutOfMemory
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.prefix_cache import PrefixCache
from heft_engine.inference.scoring import Scores, score_or_fail_rows
from heft_engine.serving.request_queue import Request, RequestQueue, ScheduledBatch

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Most tokens of one pass, unless a single row has more.
TOKEN_BUDGET = 2_048
#: Longest wait for the requests that follow a shared pass.
LINGER_SECONDS = 0.004
PREFIX_BYTES = 512 * 1024**2
#: Interval at which `wait` asks whether a result is still needed.
_POLL_SECONDS = 0.25


class Observer(Protocol):
    """Measures the batcher."""

    def on_pass(
        self, *, rows: int, tokens: int, cached_tokens: int, seconds: float, waits: Sequence[float]
    ) -> None:
        """Called after each scoring pass. `tokens` were computed, `cached_tokens` taken from the prefix cache; `waits`
        are each row's seconds in the queue."""


class DecodeWork(Protocol):
    """Passes other than scoring, which alternate with it."""

    @property
    def is_busy(self) -> bool:
        """Returns True if `step` has work to do."""

    def step(self) -> None:
        """Runs one pass. If it raises, its requests have been told."""

    def fail(self, error: Exception) -> None:
        """Ends all requests with `error`: no step will follow."""


class Batcher:
    """Safe to use from many threads. Its own thread starts with the first request and ends with `close`."""

    def __init__(
        self,
        *,
        prefix_bytes: int = PREFIX_BYTES,
        token_budget: int = TOKEN_BUDGET,
        observer: Observer | None = None,
    ) -> None:
        self._cache = PrefixCache(prefix_bytes)
        self._observer = observer
        self._changed = threading.Condition()  #: Guards the queue, the calls and the decode work.
        self._queue = RequestQueue(self._cache, token_budget)
        self._calls: list[Callable[[], None]] = []
        self._decode_work: list[DecodeWork] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._last_active_at = time.monotonic()
        self._last_pass_rows = 0
        self._last_pass_ended_at = 0.0

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prefix cache now."""
        return self._cache.used_bytes

    @property
    def last_active_at(self) -> float:
        """The end of the last work of any kind, on the monotonic clock."""
        return self._last_active_at

    def submit(
        self,
        variant: ModelVariant,
        examples: Sequence[Example],
        *,
        scale: float = 1.0,
        owner: Hashable = None,
    ) -> Future[list[Scores]]:
        """Queues examples and returns the future of their scores.

        Cached prefixes are shared between requests of one `owner`. Rows of a cancelled future that are not in a pass
        yet are dropped.
        """
        if not examples:
            done: Future[list[Scores]] = Future()
            done.set_result([])
            return done
        request = Request(variant, examples, scale=scale, owner=owner, cached=self._cache.budget_bytes > 0)
        with self._changed:
            self._start()
            self._queue.add(request)
            self._changed.notify()
        return request.future

    def score(
        self,
        variant: ModelVariant,
        examples: Sequence[Example],
        *,
        scale: float = 1.0,
        owner: Hashable = None,
        is_active: Callable[[], bool] = lambda: True,
    ) -> list[Scores]:
        """Returns the examples' scores: `submit` and `wait`."""
        return wait(self.submit(variant, examples, scale=scale, owner=owner), is_active)

    def run(self, call: Callable[[], T]) -> T:
        """Runs `call` on the batcher's thread, between passes, and returns its result."""
        if threading.current_thread() is self._thread:
            return call()
        future: Future[T] = Future()

        def run_call() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
                future.set_exception(error)

        with self._changed:
            self._start()
            self._calls.append(run_call)
            self._changed.notify()
        return future.result()

    def schedule(self, work: DecodeWork) -> None:
        """Runs a step of `work` between scoring passes for as long as it is busy."""
        with self._changed:
            self._start()
            if work not in self._decode_work:
                self._decode_work.append(work)
            self._changed.notify()

    def clear_prefixes(self, scope: Hashable) -> None:
        """Removes everything cached under a model variant's scope. Returns before it is done."""
        with self._changed:
            if self._thread is not None and not self._closed:
                self._calls.append(lambda: self._cache.remove(scope))
                self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the running pass; waiting requests get CancelledError."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _start(self) -> None:
        if self._closed:
            raise RuntimeError("this batcher is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="forward-passes", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        while self._wait_for_work():
            with self._changed:
                calls, self._calls = self._calls, []
                decode_work = list(self._decode_work)
            for call in calls:
                call()
            for work in decode_work:
                try:
                    work.step()
                except Exception:
                    log.exception("a decoding step failed")
            if not self._closed:
                self._score(self._next_batch())
            self._last_active_at = time.monotonic()
        self._end()

    def _next_batch(self) -> ScheduledBatch:
        with self._changed:
            try:
                return self._queue.take()
            except BaseException as error:
                log.exception("scheduling a scoring pass failed")
                self._queue.fail(error)
                return ScheduledBatch()

    def _wait_for_work(self) -> bool:
        """Waits for something to do. Returns False once the batcher is closed."""
        with self._changed:
            while not (self._closed or self._has_other_work()):
                rows = self._queue.waiting_rows()
                seconds = self._last_pass_ended_at + LINGER_SECONDS - time.monotonic()
                if rows and (rows >= self._last_pass_rows or seconds <= 0):
                    break
                self._changed.wait(seconds if rows else None)
            return not self._closed

    def _has_other_work(self) -> bool:
        self._decode_work = [work for work in self._decode_work if work.is_busy]
        return bool(self._calls or self._decode_work)

    def _score(self, batch: ScheduledBatch) -> None:
        self._last_pass_rows = len(batch.rows)
        if not batch.rows:
            return
        began = time.monotonic()
        try:
            outcomes = score_or_fail_rows([row for _, row in batch.rows], self._cache)
        except BaseException as error:  # noqa: BLE001 - it is raised where the requests are waited for
            log.warning("a scoring pass of %d rows failed: %s", len(batch.rows), error)
            for request, _ in batch.rows:
                request.fail(error)
            return
        self._last_pass_ended_at = time.monotonic()
        for (request, row), outcome in zip(batch.rows, outcomes, strict=True):
            if isinstance(outcome, OutOfMemory):
                log.warning("a row failed: %s", outcome)
                request.fail(outcome)
            else:
                request.complete(row, outcome)
        if self._observer is not None:
            self._observer.on_pass(
                rows=len(batch.rows),
                tokens=batch.tokens,
                cached_tokens=batch.cached_tokens,
                seconds=self._last_pass_ended_at - began,
                waits=[began - request.arrived_at for request, _ in batch.rows],
            )

    def _end(self) -> None:
        with self._changed:
            self._queue.fail(CancelledError())
            calls, self._calls = self._calls, []
            decode_work, self._decode_work = self._decode_work, []
        for work in decode_work:
            work.fail(CancelledError())
        for call in calls:
            call()


def wait(future: Future[T], is_active: Callable[[], bool]) -> T:
    """Returns the future's result. Raises CancelledError, and cancels it, once `is_active` returns False."""
    while True:
        try:
            return future.result(_POLL_SECONDS)
        except TimeoutError:
            if future.done():
                return future.result()  # just now, or the pass itself raised TimeoutError
            if not is_active():
                future.cancel()
                raise CancelledError from None
