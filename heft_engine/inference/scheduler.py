"""Continuous batching: requests join a decode batch first come, first served, as far as memory and tokens allow.

A step is one forward pass, a prefill or a decoding of one token for every sequence. Where both are due they alternate,
so that neither waiting nor running requests starve.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import islice

from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest
from heft_engine.inference.sampling import SampledToken

#: Most sequences that run at a time, and most prompt tokens of one prefill.
MAX_SEQUENCES = 64
MAX_PREFILL_TOKENS = 2_048


class DecodeScheduler:
    """A decode batch with the requests that wait to join it."""

    def __init__(self, batch: DecodeBatch) -> None:
        self.batch = batch
        self._waiting: dict[Hashable, DecodeRequest] = {}
        self._prefilled_last = False

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or len(self.batch))

    def add(self, requests: Sequence[DecodeRequest]) -> None:
        """Queues requests. Each must fit the batch's budget by itself (`DecodeBatch.bytes_for`)."""
        self._waiting |= {request.id: request for request in requests}

    def abort(self, request_id: Hashable) -> None:
        """Removes a request, waiting or running. An unknown id is ignored."""
        self._waiting.pop(request_id, None)
        self.batch.remove(request_id)

    def clear(self) -> None:
        """Removes all requests, also after a pass that failed half-way."""
        self._waiting.clear()
        self.batch.clear()

    def step(self) -> dict[Hashable, SampledToken]:
        """Runs one pass and returns the new token of each sequence in it. The caller aborts those that have ended."""
        admitted = [] if self._prefilled_last and len(self.batch) else self._admit()
        self._prefilled_last = bool(admitted)
        if not admitted:
            return self.batch.decode()
        for request in admitted:
            del self._waiting[request.id]
        return self.batch.prefill(admitted)

    def _admit(self) -> list[DecodeRequest]:
        first = list(islice(self._waiting.values(), MAX_SEQUENCES - len(self.batch)))
        tokens = 0
        admitted: list[DecodeRequest] = []
        for request in self.batch.fitting(first):
            tokens += len(request.prompt)
            if admitted and tokens > MAX_PREFILL_TOKENS:
                break
            admitted.append(request)
        return admitted
