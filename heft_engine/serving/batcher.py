"""One thread that runs all forward passes: whoever waits for the same weights shares one.

A pass starts at once when nothing runs; while it runs, requests gather, and the next one takes them together, up to a
token budget. After a pass that many shared, it waits a few milliseconds at most for those who ask again at once.
Requests take turns row by row, so that a large one does not hold up small ones. A row whose beginning another row of
the same pass computes waits for the next pass and takes it from the prefix cache.

It does NOT know rows, labels, owners or where models come from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from heft_engine.encoding import Example
from heft_engine.interventions import Site
from heft_engine.model import PackedLM
from heft_engine.packing import RowAdapter, packed_length
from heft_engine.scoring import Scores
from heft_engine.serving.prefix_cache import BLOCK, LEAST_GAIN, KeptPrefix, PrefixCache, chain, reach
from heft_engine.serving.scoring_pass import ScoringRow, score_rows

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Tokens of one pass.
TOKEN_BUDGET = 1_536
#: How long a busy batcher waits for those it has just answered to ask again.
LINGER_SECONDS = 0.004
PREFIX_BYTES = 512 * 1024**2


class Cancelled(Exception):
    """Nobody wants this answer any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """What a pass runs with: a model's layers, and what one fine-tuned model adds to them, if they are shared.

    sites: its interventions, wherever they act.
    scope: names the weights, as far as keys and values depend on them; None keeps nothing of them.
    """

    lm: PackedLM
    adapter: RowAdapter | None = None
    sites: tuple[Site, ...] = ()
    scope: Hashable = None


class Observer(Protocol):
    """Told what the batcher does."""

    def passed(self, *, rows: int, tokens: int, kept_tokens: int, seconds: float) -> None:
        """A scoring pass has run: rows in it, tokens computed, tokens taken from the prefix cache."""

    def waited(self, seconds: float) -> None:
        """A row's wait from its request to the start of its pass."""


class Turns(Protocol):
    """Other work of the same thread, a pass at a time."""

    @property
    def is_busy(self) -> bool:
        """Whether a turn would do something."""

    def turn(self) -> None:
        """One pass."""


@dataclass(eq=False)
class _Row:
    request: _Request
    index: int
    example: Example
    hashes: list[bytes]
    #: Tokens to compute if nothing is kept.
    tokens: int


@dataclass(eq=False)
class _Request:
    weights: Weights
    scale: float
    owner: Hashable
    is_wanted: Callable[[], bool]
    future: Future[list[Scores]]
    arrived: float = field(default_factory=time.monotonic)
    waiting: list[_Row] = field(default_factory=list)
    scores: dict[int, Scores] = field(default_factory=dict)
    rows: int = 0

    def fail(self, fault: BaseException) -> None:
        self.waiting.clear()
        if not self.future.done():
            self.future.set_exception(fault)

    def take(self, row: _Row, scores: Scores) -> None:
        self.scores[row.index] = scores
        if len(self.scores) == self.rows and not self.future.done():
            self.future.set_result([self.scores[index] for index in range(self.rows)])


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
        self._token_budget = token_budget
        self._observer = observer
        self._changed = threading.Condition()
        self._requests: list[_Request] = []
        self._calls: list[Callable[[], None]] = []
        self._turns: list[Turns] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._shared_last = 0  #: Rows of the last pass, and when it ended.
        self._ended = 0.0

    @property
    def prefix_bytes(self) -> int:
        """What kept prefixes hold."""
        return self._cache.held_bytes

    @property
    def waiting_rows(self) -> int:
        with self._changed:
            return sum(len(request.waiting) for request in self._requests)

    def submit(
        self,
        weights: Weights,
        examples: Sequence[Example],
        *,
        scale: float = 1.0,
        owner: Hashable = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Future[list[Scores]]:
        """The scores of `examples`, in order, as soon as a pass has had room for each.

        `owner`: what is kept of one owner's prompts is found by no other.
        `is_wanted` is asked before each pass; once it says no, the rest is left and the future raises Cancelled.
        """
        request = _Request(weights=weights, scale=scale, owner=owner, is_wanted=is_wanted, future=Future())
        request.waiting = [self._row(request, index, example) for index, example in enumerate(examples)]
        request.rows = len(request.waiting)
        if not request.rows:
            request.future.set_result([])
            return request.future
        with self._changed:
            self._begin()
            self._requests.append(request)
            self._changed.notify()
        return request.future

    def run(self, call: Callable[[], T]) -> T:
        """The result of `call`, which has the passes' thread for itself meanwhile."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(call())
            except BaseException as fault:  # noqa: BLE001 - whatever it is, it belongs to the caller
                future.set_exception(fault)

        if threading.current_thread() is self._thread:
            return call()
        with self._changed:
            self._begin()
            self._calls.append(work)
            self._changed.notify()
        return future.result()

    def keep_at(self, turns: Turns) -> None:
        """Gives other work its turns, between scoring passes, until it is not busy any more."""
        with self._changed:
            self._begin()
            if turns not in self._turns:
                self._turns.append(turns)
            self._changed.notify()

    def forget(self, scope: Hashable) -> None:
        """Drops all that is kept of some weights, whoever asked."""
        with self._changed:
            if self._thread is None or self._closed:
                return
        self.run(lambda: self._cache.forget(scope))

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

    def _row(self, request: _Request, index: int, example: Example) -> _Row:
        weights, hashes = request.weights, list[bytes]()
        if weights.scope is not None and self._cache.budget_bytes:
            end, depends = reach(weights.sites, len(example.prompt), request.scale)
            hashes = chain((request.owner, weights.scope, depends), example.prompt, end)
        return _Row(request, index, example, hashes, packed_length(example))

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._requests or self._calls or self._busy_turns()):
                    self._changed.wait()
                if self._is_over():
                    break
                calls, self._calls = self._calls, []
                turns = self._busy_turns()
                self._gather_more()
            for call in calls:
                call()
            if self._is_over():
                break
            self._score()
            for each in turns:
                try:
                    each.turn()
                except Exception:
                    # Those who waited for it have been told.
                    log.exception("a pass that writes text failed")
        with self._changed:
            left, self._requests = self._requests, []
            calls, self._calls = self._calls, []
        for request in left:
            request.fail(Cancelled())
        for call in calls:
            call()

    def _is_over(self) -> bool:
        return self._closed

    def _busy_turns(self) -> list[Turns]:
        self._turns = [turns for turns in self._turns if turns.is_busy]
        return list(self._turns)

    def _gather_more(self) -> None:
        """Those who shared the last pass have their answers since a moment, and may ask again at once."""
        end = self._ended + LINGER_SECONDS
        while self._requests and not self._closed and not self._calls and not self._busy_turns():
            waiting = sum(len(request.waiting) for request in self._requests)
            left = end - time.monotonic()
            if waiting >= self._shared_last or left <= 0:
                return
            self._changed.wait(left)

    def _score(self) -> None:
        rows = self._next_rows()
        self._shared_last = len(rows)
        if not rows:
            return
        began = time.monotonic()
        lm = rows[0][0].request.weights.lm
        asked = [scoring for _, scoring in rows]
        try:
            results = score_rows(lm, asked, self._cache)
        except BaseException as fault:  # noqa: BLE001 - whatever it is, it belongs to those who wait
            log.warning("a scoring pass of %d rows failed: %s", len(rows), fault)
            for row, _ in rows:
                row.request.fail(fault)
            self._drop_done()
            return
        for (row, _), scores in zip(rows, results, strict=True):
            row.request.take(row, scores)
        self._ended = time.monotonic()
        self._drop_done()
        self._observe(rows, time.monotonic() - began, began)

    def _observe(self, rows: Sequence[tuple[_Row, ScoringRow]], seconds: float, began: float) -> None:
        if self._observer is None:
            return
        kept = sum(scoring.kept.length for _, scoring in rows if scoring.kept is not None)
        tokens = sum(row.tokens for row, _ in rows) - kept
        self._observer.passed(rows=len(rows), tokens=tokens, kept_tokens=kept, seconds=seconds)
        for row, _ in rows:
            self._observer.waited(began - row.request.arrived)

    def _drop_done(self) -> None:
        with self._changed:
            self._requests = [request for request in self._requests if not request.future.done()]

    def _next_rows(self) -> list[tuple[_Row, ScoringRow]]:
        """Rows for one pass, taken from their requests."""
        with self._changed:
            requests = list(self._requests)
        for request in requests:
            if request.future.cancelled() or not request.is_wanted():
                request.fail(Cancelled())
        self._drop_done()
        wanted = [request for request in requests if request.waiting]
        if not wanted:
            return []
        lm = wanted[0].weights.lm
        return self._packed([request for request in wanted if request.weights.lm is lm])

    def _packed(self, requests: Sequence[_Request]) -> list[tuple[_Row, ScoringRow]]:
        taken: list[tuple[_Row, ScoringRow]] = []
        room = self._token_budget
        computing: set[bytes] = set()
        for row in _in_turns(requests):
            kept = self._cache.find(row.hashes)
            known = kept.length if kept is not None else 0
            if _gains_by_waiting(row.hashes, known, computing):
                continue
            tokens = row.tokens - known
            if taken and tokens > room:
                break
            room -= tokens
            computing.update(row.hashes[known // BLOCK :])
            request = row.request
            taken.append((row, _scoring(row, kept)))
            request.waiting.remove(row)
        return taken


def _scoring(row: _Row, kept: KeptPrefix | None) -> ScoringRow:
    weights = row.request.weights
    return ScoringRow(
        example=row.example,
        scale=row.request.scale,
        adapter=weights.adapter,
        scope=weights.scope,
        hashes=row.hashes,
        kept=kept,
    )


def _in_turns(requests: Sequence[_Request]) -> Iterator[_Row]:
    """A row of each request, then another of each."""
    lines = [iter(list(request.waiting)) for request in requests]
    while lines:
        remaining = []
        for line in lines:
            row = next(line, None)
            if row is not None:
                yield row
                remaining.append(line)
        lines = remaining


def _gains_by_waiting(hashes: Sequence[bytes], known: int, computing: set[bytes]) -> bool:
    """Whether a row of this very pass computes much of what this one begins with."""
    count = known // BLOCK
    while count < len(hashes) and hashes[count] in computing:
        count += 1
    return count * BLOCK - known >= LEAST_GAIN
