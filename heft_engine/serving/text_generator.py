"""Text for many requests at once: tokens from a decode batch become pieces of text, told as soon as they are certain.

Requests come and go from any thread; one thread at a time takes turns (`turn`), each of which is one pass for all. It
does NOT know rows, templates or who runs the turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from heft_engine.errors import RowError
from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest, NewToken
from heft_engine.inference.detokenizer import Detokenizer, Vocabulary
from heft_engine.inference.greedy import eos_token_ids
from heft_engine.inference.sampling import SampledToken
from heft_engine.inference.scheduler import DecodeScheduler
from heft_engine.inference.stop_strings import Stops
from heft_engine.model.packed_lm import PackedLM

#: stop: the model ended its answer, or a stop string came. length: `max_tokens` were written.
Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class TextRequest(DecodeRequest):
    """A prompt and how its text is to be written. `stop`: strings that end it and are not told."""

    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """One token with its log-probability, and the likeliest ones in its place. `offset`: characters before it."""

    spelling: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    offset: int


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """The next of one text. `tokens` only where log-probabilities were asked for; `written` counts all so far."""

    text: str
    tokens: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    written: int = 0


#: Told a request's id and its next piece; or, once and last, why there will be no more.
Listener = Callable[[Any, TextDelta | Exception], None]


class _Writer:
    """One text. Ends with `finish`."""

    def __init__(
        self,
        request: TextRequest,
        listener: Listener,
        tokenizer: PreTrainedTokenizerBase,
        eos: frozenset[int],
    ) -> None:
        self.request = request
        self.listener = listener
        self._eos = eos
        self._vocabulary = Vocabulary(tokenizer)
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = Stops(request.stop)
        self._written = 0
        self._certain = 0  #: characters that the detokenizer has given
        self._told = 0
        self._held: list[TokenLogprobs] = []

    def take(self, choice: SampledToken) -> TextDelta:
        """What is to be told after one more token."""
        if choice.token in self._eos:
            return self._end("stop", self._detokenizer.flush())
        self._written += 1
        if choice.logprob is not None:
            self._held.append(self._with_logprobs(choice, choice.logprob))
        text = self._detokenizer.push(choice.token)
        if self._written >= self.request.max_tokens:
            return self._end("length", text + self._detokenizer.flush())
        told = self._push(text)
        return self._piece(told, "stop" if self._stops.is_hit else None)

    def _push(self, text: str) -> str:
        self._certain += len(text)
        return self._stops.push(text)

    def _end(self, finish: Finish, text: str) -> TextDelta:
        told = self._push(text)
        if self._stops.is_hit:
            return self._piece(told, "stop")
        told += self._stops.flush()
        self._told += len(told)
        return TextDelta(text=told, tokens=tuple(self._held), finish=finish, written=self._written)

    def _piece(self, told: str, finish: Finish | None) -> TextDelta:
        self._told += len(told)
        ready = [token for token in self._held if token.offset < self._told]
        self._held = self._held[len(ready) :]
        return TextDelta(text=told, tokens=tuple(ready), finish=finish, written=self._written)

    def _with_logprobs(self, choice: SampledToken, logprob: float) -> TokenLogprobs:
        return TokenLogprobs(
            spelling=self._vocabulary.bytes_of(choice.token),
            logprob=logprob,
            top=tuple((self._vocabulary.bytes_of(token), value) for token, value in choice.top),
            offset=self._certain,
        )


class TextGenerator:
    """Writes texts with one model. `budget_bytes` is for keys and values; who does not fit waits."""

    def __init__(self, lm: PackedLM, tokenizer: PreTrainedTokenizerBase, *, budget_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._lm = lm
        self._batch = DecodeBatch(lm, budget_bytes=budget_bytes)
        self._scheduler = DecodeScheduler(self._batch)
        self._lock = threading.Lock()
        self._arrived: list[_Writer] = []
        self._cancelled: set[Hashable] = set()
        self._writers: dict[Hashable, _Writer] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a turn would do something."""
        with self._lock:
            return bool(self._arrived or self._cancelled or self._writers)

    @property
    def memory_bytes(self) -> int:
        """What keys and values hold."""
        return self._batch.allocated_bytes

    def submit(self, requests: Sequence[TextRequest], listener: Listener) -> None:
        """Takes requests in; their text goes to `listener`, called by whoever takes turns.

        Raises RowError, and takes none, when the keys and values of one would never have room.
        """
        for request in requests:
            needed = self._batch.bytes_for(request)
            if needed > self._batch.budget_bytes:
                raise RowError(
                    f"{request.kept_tokens} tokens need {needed:,} bytes of keys and values, and there are "
                    f"{self._batch.budget_bytes:,}: ask for fewer max_tokens",
                    param="max_tokens",
                )
        ends = eos_token_ids(self._lm, self._tokenizer)
        writers = [_Writer(request, listener, self._tokenizer, ends) for request in requests]
        with self._lock:
            self._arrived += writers

    def cancel(self, request_id: Hashable) -> None:
        """Lets a text go before the next pass; its listener hears no more. One that has ended is none."""
        with self._lock:
            self._cancelled.add(request_id)

    def step(self) -> None:
        """One pass. When it fails, everyone who waits is told why, and all are let go."""
        self._take_in()
        try:
            for new in self._scheduler.step():
                self._tell(new)
        except Exception as fault:
            self._end_all(fault)
            raise

    def fail(self, fault: Exception) -> None:
        """Tells everyone who waits that there will be no more turns."""
        self._take_in()
        self._end_all(fault)

    def _end_all(self, fault: Exception) -> None:
        with self._lock:
            writers, self._writers = list(self._writers.values()), {}
        # A pass that failed half-way may have left its slots in any state.
        self._scheduler.clear()
        for writer in writers:
            writer.listener(writer.request.id, fault)

    def _take_in(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, set()
            wanted = [writer for writer in arrived if writer.request.id not in cancelled]
            self._writers |= {writer.request.id: writer for writer in wanted}
        self._scheduler.add([writer.request for writer in wanted])
        for request_id in cancelled:
            self._let_go(request_id)

    def _tell(self, new: NewToken) -> None:
        writer = self._writers[new.id]
        piece = writer.take(new.choice)
        if piece.finish is not None:
            self._let_go(new.id)
        if piece.text or piece.tokens or piece.finish is not None:
            writer.listener(new.id, piece)

    def _let_go(self, request_id: Hashable) -> None:
        self._scheduler.abort(request_id)
        with self._lock:
            self._writers.pop(request_id, None)
