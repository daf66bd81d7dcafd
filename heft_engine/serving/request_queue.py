"""The scheduler of scoring requests: a queue, and the choice of rows for the next pass.

Models take turns, and on one model requests do, row by row, so that a large request does not hold up small ones. A row
whose prefix another row of the same pass computes is deferred once, and takes it from the prefix cache.

Not thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from heft_engine.data.encoding import Example
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.prefix_cache import BLOCK_TOKENS, MIN_PREFIX_TOKENS, PrefixCache, prefix_hashes
from heft_engine.inference.scoring import Scores, ScoringRow
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import packed_length


class Request:
    """Examples that one model scores. `future` gets the scores of all, and may be cancelled at any time."""

    def __init__(
        self,
        variant: ModelVariant,
        examples: Sequence[Example],
        *,
        scale: float,
        owner: Hashable,
        cached: bool,
    ) -> None:
        self.variant = variant
        self.rows = [
            ScoringRow(
                example=example,
                variant=variant,
                scale=scale,
                hashes=prefix_hashes(variant, example.prompt, scale=scale, owner=owner) if cached else (),
            )
            for example in examples
        ]
        self.arrived_at = time.monotonic()
        self.future: Future[list[Scores]] = Future()
        self.waiting = list(self.rows)
        self.deferred: set[ScoringRow] = set()
        self._scores: dict[ScoringRow, Scores] = {}

    def complete(self, row: ScoringRow, scores: Scores) -> None:
        """Takes a row's scores in; with the last ones the future is done."""
        self._scores[row] = scores
        if len(self._scores) == len(self.rows):
            with suppress(InvalidStateError):  # cancelled
                self.future.set_result([self._scores[row] for row in self.rows])

    def fail(self, error: BaseException) -> None:
        self.waiting.clear()
        with suppress(InvalidStateError):  # cancelled, or failed before
            self.future.set_exception(error)


@dataclass(kw_only=True)
class ScheduledBatch:
    """The rows of one pass with their requests. `tokens` are to be computed, `cached_tokens` are in the cache."""

    rows: list[tuple[Request, ScoringRow]] = field(default_factory=list)
    tokens: int = 0
    cached_tokens: int = 0


class RequestQueue:
    """Requests that are not done."""

    def __init__(self, cache: PrefixCache, token_budget: int) -> None:
        self._cache = cache
        self._token_budget = token_budget
        self._requests: list[Request] = []
        #: The number of each model's last pass.
        self._last_pass: WeakKeyDictionary[PackedLM, int] = WeakKeyDictionary()
        self._passes = 0

    def add(self, request: Request) -> None:
        self._requests.append(request)

    def waiting_rows(self) -> int:
        """Drops requests that are done, and returns the number of rows that wait."""
        self._requests = [request for request in self._requests if not request.future.done()]
        return sum(len(request.waiting) for request in self._requests)

    def fail(self, error: BaseException) -> None:
        """Ends all requests with `error`."""
        requests, self._requests = self._requests, []
        for request in requests:
            request.fail(error)

    def take(self) -> ScheduledBatch:
        """Removes and returns the rows of the next pass, all of one PackedLM."""
        requests = [request for request in self._requests if request.waiting and not request.future.done()]
        if not requests:
            return ScheduledBatch()
        # The model whose last pass is the longest ago; of new ones that of the first request.
        lm = min((request.variant.lm for request in requests), key=lambda lm: self._last_pass.get(lm, 0))
        self._passes += 1
        self._last_pass[lm] = self._passes
        return self._take_rows([request for request in requests if request.variant.lm is lm])

    def _take_rows(self, requests: Sequence[Request]) -> ScheduledBatch:
        batch = ScheduledBatch()
        computed: set[bytes] = set()  # blocks that rows of this pass compute
        for request, row in _round_robin(requests):
            prefix = row.cached_prefix = self._cache.find(row.hashes)
            cached_tokens = prefix.length if prefix is not None else 0
            # Once: what is computed meanwhile may not fit the cache.
            if row not in request.deferred and _gains_by_deferring(row.hashes, cached_tokens, computed):
                request.deferred.add(row)
                continue
            tokens = packed_length(row.example) - cached_tokens
            if batch.rows and batch.tokens + tokens > self._token_budget:
                break
            batch.rows.append((request, row))
            batch.tokens += tokens
            batch.cached_tokens += cached_tokens
            computed.update(row.hashes[cached_tokens // BLOCK_TOKENS :])
            request.waiting.remove(row)
        return batch


def _round_robin(requests: Sequence[Request]) -> Iterator[tuple[Request, ScoringRow]]:
    """Yields a waiting row of each request, then another of each, until none is left."""
    iterators = [(request, iter(list(request.waiting))) for request in requests]
    while iterators:
        remaining = []
        for request, rows in iterators:
            row = next(rows, None)
            if row is not None:
                yield request, row
                remaining.append((request, rows))
        iterators = remaining


def _gains_by_deferring(hashes: Sequence[bytes], cached_tokens: int, computed: set[bytes]) -> bool:
    """Returns True if much of a row's prefix is among the blocks that other rows of its pass compute."""
    cached_blocks = blocks = cached_tokens // BLOCK_TOKENS
    while blocks < len(hashes) and hashes[blocks] in computed:
        blocks += 1
    return (blocks - cached_blocks) * BLOCK_TOKENS >= MIN_PREFIX_TOKENS
