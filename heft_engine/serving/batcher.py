"""One thread that runs all forward passes: whoever waits for the same weights shares one.

A pass starts at once when nothing runs; while it runs, requests gather, and the next one takes them together, up to a
token budget. After a pass that many shared, it waits a few milliseconds at most for those who ask again at once.
Whatever goes wrong in a pass is told to those who waited; the thread goes on.

It does NOT know rows, labels, owners, which rows a pass takes (`waiting_rows`), nor where models come from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

from heft_engine.data.encoding import Example
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.prefix_cache import PrefixCache
from heft_engine.inference.scoring import Scores
from heft_engine.inference.scoring_pass import ScoringRow, score_rows
from heft_engine.serving.request_queue import Request, WaitingRow, WaitingRows

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Tokens of one pass.
TOKEN_BUDGET = 2_048
#: How long a busy batcher waits for those it has just answered to ask again.
LINGER_SECONDS = 0.004
PREFIX_BYTES = 512 * 1024**2


class Cancelled(Exception):
    """Nobody wants this answer any more, or nobody gives it."""


class Observer(Protocol):
    """Told what the batcher does."""

    def passed(self, *, rows: int, tokens: int, kept_tokens: int, seconds: float) -> None:
        """A scoring pass has run: rows in it, tokens computed, tokens taken from the prefix cache."""

    def waited(self, seconds: float) -> None:
        """A row's wait from its request to the start of its pass."""


class DecodeWork(Protocol):
    """Other work of the same thread, a pass at a time."""

    @property
    def is_busy(self) -> bool:
        """Whether a turn would do something."""

    def step(self) -> None:
        """One pass. Tells those who wait what went wrong, before it raises."""

    def fail(self, fault: Exception) -> None:
        """Tells everybody who waits that there will be no more turns."""


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
        self._waiting = WaitingRows(self._cache, token_budget)
        self._observer = observer
        self._changed = threading.Condition()
        self._calls: list[Callable[[], None]] = []
        self._work: list[DecodeWork] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._worked_at = time.monotonic()
        self._shared_last = 0  #: Rows of the last pass, and when it ended.
        self._ended = 0.0

    @property
    def prefix_bytes(self) -> int:
        """What kept prefixes hold."""
        return self._cache.held_bytes

    @property
    def worked_at(self) -> float:
        """When the last work ended, of whatever kind, by the monotonic clock."""
        return self._worked_at

    def submit(
        self,
        variant: ModelVariant,
        examples: Sequence[Example],
        *,
        scale: float = 1.0,
        owner: Hashable = None,
    ) -> Future[list[Scores]]:
        """The scores of `examples`, in order, as soon as a pass has had room for each.

        `owner`: what is kept of one owner's prompts is found by no other. Whoever does not want the answer any more
        cancels the future: what has not begun is left.
        """
        keeps = self._cache.budget_bytes > 0
        request = Request.of(variant, examples, scale=scale, owner=owner, keeps=keeps)
        if not request.rows:
            request.future.set_result([])
            return request.future
        with self._changed:
            self._begin()
            self._waiting.add(request)
            self._changed.notify()
        return request.future

    def run(self, call: Callable[[], T]) -> T:
        """The result of `call`, which has the passes' thread for itself meanwhile."""
        if threading.current_thread() is self._thread:
            return call()
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(call())
            except BaseException as fault:  # noqa: BLE001 - whatever it is, it belongs to the caller
                future.set_exception(fault)

        with self._changed:
            self._begin()
            self._calls.append(work)
            self._changed.notify()
        return future.result()

    def schedule(self, work: DecodeWork) -> None:
        """Gives other work its turns, between scoring passes, until it is not busy any more."""
        with self._changed:
            self._begin()
            if work not in self._work:
                self._work.append(work)
            self._changed.notify()

    def forget(self, scope: Hashable) -> None:
        """Has all dropped that is kept of some variant, whoever asked."""
        with self._changed:
            if self._thread is not None and not self._closed:
                self._calls.append(lambda: self._cache.forget(scope))
                self._changed.notify()

    def close(self) -> None:
        """Ends after the pass that runs; who still waits is told Cancelled."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _begin(self) -> None:
        if self._closed:
            raise RuntimeError("this batcher is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="forward-passes", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        while self._next():
            try:
                self._score()
            except BaseException as fault:
                log.exception("the scoring of what waited failed")
                self._waiting.fail(fault)
            self._worked_at = time.monotonic()
        with self._changed:
            calls, self._calls = self._calls, []
            turns, self._work = self._work, []
        self._waiting.fail(Cancelled())
        for each in turns:
            each.fail(Cancelled())
        for call in calls:
            call()

    def _next(self) -> bool:
        """Waits for something to do, and does all but the scoring. False when it is over."""
        with self._changed:
            while not (self._closed or self._waiting or self._calls or self._busy_work()):
                self._changed.wait()
            if self._closed:
                return False
            calls, self._calls = self._calls, []
            turns = self._busy_work()
            self._gather_more()
        for call in calls:
            call()
        for each in turns:
            try:
                each.step()
            except Exception:
                # Those who waited for it have been told.
                log.exception("a pass that writes text failed")
        return not self._closed

    def _busy_work(self) -> list[DecodeWork]:
        self._work = [turns for turns in self._work if turns.is_busy]
        return list(self._work)

    def _gather_more(self) -> None:
        """Those who shared the last pass have their answers since a moment, and may ask again at once."""
        end = self._ended + LINGER_SECONDS
        while self._waiting and not self._closed and not self._calls and not self._busy_work():
            left = end - time.monotonic()
            if self._waiting.count >= self._shared_last or left <= 0:
                return
            self._changed.wait(left)

    def _score(self) -> None:
        rows = self._waiting.take()
        self._shared_last = len(rows)
        if not rows:
            return
        began = time.monotonic()
        try:
            results = score_rows(rows[0][0].request.variant.lm, [row for _, row in rows], self._cache)
        except BaseException as fault:  # noqa: BLE001 - whatever it is, it belongs to those who wait
            log.warning("a scoring pass of %d rows failed: %s", len(rows), fault)
            for row, _ in rows:
                row.request.fail(fault)
            self._waiting.drop_done()
            return
        for (row, _), scores in zip(rows, results, strict=True):
            row.request.take(row, scores)
        self._ended = time.monotonic()
        self._waiting.drop_done()
        self._observe(rows, self._ended - began, began)

    def _observe(self, rows: Sequence[tuple[WaitingRow, ScoringRow]], seconds: float, began: float) -> None:
        if self._observer is None:
            return
        kept = sum(scoring.kept.length for _, scoring in rows if scoring.kept is not None)
        tokens = sum(row.tokens for row, _ in rows) - kept
        self._observer.passed(rows=len(rows), tokens=tokens, kept_tokens=kept, seconds=seconds)
        for row, _ in rows:
            self._observer.waited(began - row.request.arrived)
