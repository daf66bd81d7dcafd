"""Continuous batching: requests join a decode batch first come, first served, as far as memory and tokens allow.

A step is one forward pass, a prefill or a decoding of one token for every sequence. Where both are due they alternate,
so that neither waiting nor running requests starve. Where a prefill runs out of memory, fewer requests are admitted and
the others go on waiting, until a sequence has left the batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import islice

from heft_engine.errors import OutOfMemory
from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest
from heft_engine.inference.sampling import SampledToken
from heft_engine.runtime.out_of_memory import free_memory, is_out_of_memory

#: Most sequences that run at a time, and most prompt tokens of one prefill.
MAX_SEQUENCES = 64
MAX_PREFILL_TOKENS = 2_048


class PromptOutOfMemory(OutOfMemory):
    """A prompt that the device has no memory for, even while no other sequence runs."""

    def __init__(self, request: DecodeRequest) -> None:
        super().__init__(f"the device has no memory for a prompt of {len(request.prompt)} tokens: shorten it")
        self.request_id = request.id


class DecodeScheduler:
    """A decode batch with the requests that wait to join it."""

    def __init__(self, batch: DecodeBatch) -> None:
        self.batch = batch
        self._waiting: dict[Hashable, DecodeRequest] = {}
        self._prefilled_last = False
        #: The number of sequences at which memory ran out.
        self._full_at: int | None = None

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
        """Runs one pass and returns the new token of each sequence in it. The caller aborts those that have ended.

        Raises PromptOutOfMemory, and removes its request, for a prompt that does not fit into memory alone.
        """
        admitted = [] if self._prefilled_last and len(self.batch) else self._admit()
        tokens = self._prefill(admitted)
        self._prefilled_last = bool(tokens)
        return tokens or self.batch.decode()

    def _prefill(self, requests: list[DecodeRequest]) -> dict[Hashable, SampledToken]:
        """Prefills the first requests that there is memory for, and returns their tokens: none if there is for none."""
        while requests:
            try:
                tokens = self.batch.prefill(requests)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                for request in requests:
                    del self._waiting[request.id]
                return tokens
            free_memory(self.batch.device)
            if len(requests) == 1 and not len(self.batch):
                self.abort(requests[0].id)
                raise PromptOutOfMemory(requests[0])
            requests = requests[: len(requests) // 2]
            self._full_at = len(self.batch) + len(requests)
        return {}

    def _admit(self) -> list[DecodeRequest]:
        if self._full_at is not None:
            if len(self.batch) >= self._full_at:
                return []
            self._full_at = None
        first = list(islice(self._waiting.values(), MAX_SEQUENCES - len(self.batch)))
        tokens = 0
        admitted: list[DecodeRequest] = []
        for request in self.batch.fitting(first):
            tokens += len(request.prompt)
            if admitted and tokens > MAX_PREFILL_TOKENS:
                break
            admitted.append(request)
        return admitted
