"""Who joins a decode batch when: first come, first served, as far as room and a pass's tokens allow.

Each turn is one pass, of prompts or of a new token each; where there is both to do they alternate, so that neither
those who wait nor those who are being written stand still. It does NOT know text or threads.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import islice

from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest, NewToken

#: Sequences that are written at a time, and prompt tokens that one pass takes at once.
MOST_SEQUENCES = 64
PREFILL_TOKENS = 2_048


class DecodeScheduler:
    """Requests in front of a batch."""

    def __init__(self, batch: DecodeBatch) -> None:
        self.batch = batch
        self._waiting: dict[Hashable, DecodeRequest] = {}
        self._joined_last = False

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or len(self.batch))

    def add(self, requests: Sequence[DecodeRequest]) -> None:
        """The batch can hold each of them, when it is alone."""
        self._waiting |= {request.id: request for request in requests}

    def abort(self, request_id: Hashable) -> None:
        """Forgets a request that waits, ends one that is being written."""
        self._waiting.pop(request_id, None)
        self.batch.remove(request_id)

    def clear(self) -> None:
        """Forgets all, in whatever state the batch is."""
        self._waiting.clear()
        self.batch.clear()

    def step(self) -> list[NewToken]:
        """One pass. Whoever reads its tokens drops the sequences that end with them."""
        admitted = [] if self._joined_last and len(self.batch) else self._admitted()
        self._joined_last = bool(admitted)
        if not admitted:
            return self.batch.step()
        for request in admitted:
            del self._waiting[request.id]
        return self.batch.join(admitted)

    def _admitted(self) -> list[DecodeRequest]:
        first = list(islice(self._waiting.values(), MOST_SEQUENCES - len(self.batch)))
        fitting = self.batch.fitting(first)
        tokens = 0
        admitted: list[DecodeRequest] = []
        for request in fitting:
            tokens += len(request.prompt)
            if admitted and tokens > PREFILL_TOKENS:
                break
            admitted.append(request)
        return admitted
