"""Continuous batching: requests join a decode batch first come, first served, as far as memory and tokens allow.

A step is one forward pass, a prefill or a decoding of one token for every sequence. Where both are due they alternate,
so that neither waiting nor running requests starve.

A prefill that runs out of memory is run again with fewer requests, and a decoding step without the newest sequences,
whose tokens are computed again later. Those left out wait until a sequence has left the batch; a prompt that did not
fit by itself waits until as many bytes of keys and values have been freed as it needs, or until it is alone.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from itertools import islice

from heft_engine.errors import EngineError, OutOfMemory
from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest, PassOutOfMemory
from heft_engine.inference.sampling import SampledToken

#: Most sequences that run at a time, and most prompt tokens of one prefill.
MAX_SEQUENCES = 64
MAX_PREFILL_TOKENS = 2_048


class SequenceOutOfMemory(OutOfMemory):
    """A sequence that the device has no memory for, even while no other one runs."""

    def __init__(self, request: DecodeRequest) -> None:
        super().__init__(
            f"the device has no memory for a prompt of {len(request.prompt)} tokens and the text after it: shorten the "
            "prompt, or ask for fewer max_tokens"
        )
        self.request_id = request.id


class DecodeScheduler:
    """A decode batch with the requests that wait to join it."""

    def __init__(self, batch: DecodeBatch) -> None:
        self.batch = batch
        self._waiting: dict[Hashable, DecodeRequest] = {}
        self._prefilled_last = False
        #: The number of sequences at which memory ran out.
        self._full_at: int | None = None
        #: Bytes of keys and values above which a prompt that ran out of memory by itself is not tried again.
        self._tried_below: dict[Hashable, int] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or len(self.batch))

    def add(self, requests: Sequence[DecodeRequest]) -> None:
        """Queues requests. Each must fit the batch's budget by itself (`DecodeBatch.bytes_for`)."""
        self._waiting |= {request.id: request for request in requests}

    def abort(self, request_id: Hashable) -> None:
        """Removes a request, waiting or running. An unknown id is ignored."""
        self._waiting.pop(request_id, None)
        self._tried_below.pop(request_id, None)
        self.batch.remove(request_id)

    def take_failed(self) -> dict[Hashable, EngineError]:
        """Returns the requests that ended in an error since the last call. They have been removed."""
        return self.batch.take_failed()

    def clear(self) -> None:
        """Removes all requests, also after a pass that failed half-way."""
        self._waiting.clear()
        self._tried_below.clear()
        self.batch.clear()

    def step(self) -> dict[Hashable, SampledToken]:
        """Runs one pass and returns the new token of each sequence in it. The caller aborts those that have ended.

        Raises SequenceOutOfMemory, and removes its request, for a sequence that does not fit into memory alone.
        """
        admitted = [] if self._prefilled_last and len(self.batch) else self._admit()
        tokens = self._prefill(admitted)
        self._prefilled_last = bool(tokens)
        return tokens or self._decode()

    def _prefill(self, requests: list[DecodeRequest]) -> dict[Hashable, SampledToken]:
        """Prefills the first requests that there is memory for, and returns their tokens: none if there is for none."""
        while requests:
            try:
                tokens = self.batch.prefill(requests)
            except PassOutOfMemory:
                if len(requests) == 1 and not len(self.batch):
                    self.abort(requests[0].id)
                    raise SequenceOutOfMemory(requests[0]) from None
                if len(requests) == 1:
                    bytes_left = self.batch.allocated_bytes - self.batch.bytes_for(requests[0])
                    self._tried_below[requests[0].id] = bytes_left
                requests = requests[: len(requests) // 2]
                self._full_at = len(self.batch) + len(requests)
            else:
                for request in requests:
                    del self._waiting[request.id]
                    self._tried_below.pop(request.id, None)
                return tokens
        return {}

    def _decode(self) -> dict[Hashable, SampledToken]:
        """Decodes as many sequences as there is memory for; the newest of the others become the first to wait."""
        while len(self.batch):
            try:
                return self.batch.decode()
            except PassOutOfMemory:
                is_alone = len(self.batch) == 1
                preempted = self.batch.preempt(-(-len(self.batch) // 2))
                if is_alone:
                    self.abort(preempted[0].id)
                    raise SequenceOutOfMemory(preempted[0]) from None
                self._waiting = {request.id: request for request in preempted} | self._waiting
                self._full_at = len(self.batch)
        return {}

    def _admit(self) -> list[DecodeRequest]:
        if self._full_at is not None:
            if len(self.batch) >= self._full_at:
                return []
            self._full_at = None
        head = next(iter(self._waiting), None)
        if len(self.batch) and self.batch.allocated_bytes > self._tried_below.get(head, sys.maxsize):
            return []
        first = list(islice(self._waiting.values(), MAX_SEQUENCES - len(self.batch)))
        tokens = 0
        admitted: list[DecodeRequest] = []
        for request in self.batch.fitting(first):
            tokens += self.batch.prefill_tokens(request)
            if admitted and tokens > MAX_PREFILL_TOKENS:
                break
            admitted.append(request)
        return admitted
