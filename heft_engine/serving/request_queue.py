"""Requests that wait for a pass, and which of their rows the next one takes.

Models take turns, and on one model requests do, row by row, so that a large one does not hold up small ones. A row
whose beginning another row of the same pass computes waits once and takes it from the prefix cache. It does NOT know
threads: `add` and `drop_done` may be called from any, `take` from the one that runs the passes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from heft_engine.data.encoding import Example
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.prefix_cache import BLOCK, LEAST_GAIN, CachedPrefix, PrefixCache, chain, reach
from heft_engine.inference.scoring import Scores
from heft_engine.inference.scoring_pass import ScoringRow
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import packed_length


@dataclass(eq=False)
class WaitingRow:
    request: Request
    index: int
    example: Example
    hashes: list[bytes]
    #: Tokens to compute if nothing is kept.
    tokens: int
    has_waited: bool = False


@dataclass(eq=False)
class Request:
    """Rows of one model that are answered together. Its future may be cancelled at any time."""

    variant: ModelVariant
    scale: float
    future: Future[list[Scores]] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    waiting: list[WaitingRow] = field(default_factory=list)
    scores: dict[int, Scores] = field(default_factory=dict)
    rows: int = 0

    @staticmethod
    def of(
        variant: ModelVariant, examples: Sequence[Example], *, scale: float, owner: Hashable, keeps: bool
    ) -> Request:
        """`keeps`: whether beginnings of its prompts may be kept, for `owner` alone."""
        request = Request(variant=variant, scale=scale, rows=len(examples))
        for index, example in enumerate(examples):
            hashes: list[bytes] = []
            if keeps and variant.scope is not None:
                end, depends = reach(variant.interventions, len(example.prompt), scale)
                hashes = chain((owner, variant.scope, depends), example.prompt, end)
            request.waiting.append(WaitingRow(request, index, example, hashes, packed_length(example)))
        return request

    def fail(self, fault: BaseException) -> None:
        self.waiting.clear()
        with suppress(InvalidStateError):  # it was cancelled, or has been told
            self.future.set_exception(fault)

    def take(self, row: WaitingRow, scores: Scores) -> None:
        self.scores[row.index] = scores
        if len(self.scores) == self.rows:
            with suppress(InvalidStateError):
                self.future.set_result([self.scores[index] for index in range(self.rows)])


class WaitingRows:
    """All requests that wait."""

    def __init__(self, cache: PrefixCache, token_budget: int) -> None:
        self._cache = cache
        self._token_budget = token_budget
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        #: When each model had its last pass, counted in passes.
        self._served: WeakKeyDictionary[PackedLM, int] = WeakKeyDictionary()
        self._passes = 0

    def __bool__(self) -> bool:
        with self._lock:
            return bool(self._requests)

    @property
    def count(self) -> int:
        """Rows that wait."""
        with self._lock:
            return sum(len(request.waiting) for request in self._requests)

    def add(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)

    def fail(self, fault: BaseException) -> None:
        """Tells everybody who waits."""
        with self._lock:
            requests, self._requests = self._requests, []
        for request in requests:
            request.fail(fault)

    def drop_done(self) -> None:
        """Forgets requests that are answered, or cancelled."""
        with self._lock:
            self._requests = [request for request in self._requests if not request.future.done()]

    def take(self) -> list[tuple[WaitingRow, ScoringRow]]:
        """Rows of one model for the next pass, taken from their requests."""
        self.drop_done()
        with self._lock:
            wanted = [request for request in self._requests if request.waiting]
        if not wanted:
            return []
        # Of those that have waited through as many passes, the one that was asked first.
        lm = min((request.variant.lm for request in wanted), key=lambda lm: self._served.get(lm, 0))
        self._passes += 1
        self._served[lm] = self._passes
        return self._packed([request for request in wanted if request.variant.lm is lm])

    def _packed(self, requests: Sequence[Request]) -> list[tuple[WaitingRow, ScoringRow]]:
        taken: list[tuple[WaitingRow, ScoringRow]] = []
        room = self._token_budget
        computing: set[bytes] = set()
        for row in _in_turns(requests):
            kept = self._cache.find(row.hashes)
            known = kept.length if kept is not None else 0
            # Once: what is computed meanwhile may have found no room.
            if not row.has_waited and _gains_by_waiting(row.hashes, known, computing):
                row.has_waited = True
                continue
            tokens = row.tokens - known
            if taken and tokens > room:
                break
            room -= tokens
            computing.update(row.hashes[known // BLOCK :])
            taken.append((row, _scoring(row, kept)))
            row.request.waiting.remove(row)
        return taken


def _scoring(row: WaitingRow, kept: CachedPrefix | None) -> ScoringRow:
    variant = row.request.variant
    return ScoringRow(
        example=row.example,
        scale=row.request.scale,
        adapter=variant.adapter,
        scope=variant.scope,
        hashes=row.hashes,
        kept=kept,
    )


def _in_turns(requests: Sequence[Request]) -> Iterator[WaitingRow]:
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
