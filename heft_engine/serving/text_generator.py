"""Streamed text for many requests at once: sampled tokens become text deltas as soon as their text is certain.

Requests are submitted and cancelled from any thread; one thread at a time calls `step`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from xgrammar import CompiledGrammar

from heft_engine.data.chat_template import ChatTemplate
from heft_engine.errors import RowError
from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest
from heft_engine.inference.detokenizer import Detokenizer, Vocabulary
from heft_engine.inference.grammar import Constraint, GrammarCompiler
from heft_engine.inference.greedy import eos_token_ids
from heft_engine.inference.sampling import SampledToken
from heft_engine.inference.scheduler import DecodeScheduler, SequenceOutOfMemory
from heft_engine.inference.stop_strings import StopStringFilter
from heft_engine.model.packed_lm import PackedLM

#: stop: an EOS token or a stop string. length: `max_tokens` were generated.
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class TextRequest(DecodeRequest):
    """A prompt and how to continue it.

    stop: strings that end the text and are left out.
    constraint: the text matches it, unless `max_tokens` or a stop string end it earlier. It becomes the `grammar`.
    visible_tokens: special tokens that are a part of the text.
    echo: the prompt's text, which comes before the text. echo_only: nothing comes after it.
    """

    stop: tuple[str, ...] = ()
    echo: str | None = None
    echo_only: bool = False
    constraint: Constraint | None = None
    visible_tokens: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """A token's log-probability and those of its likeliest alternatives. `text_offset`: characters before it.

    logprob: None for a prompt's first token.
    """

    token_bytes: bytes
    logprob: float | None
    top_logprobs: tuple[tuple[bytes, float], ...]
    text_offset: int


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """The next part of a text. `tokens` is empty without `top_logprobs`; `completion_tokens` counts all so far."""

    text: str
    tokens: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    completion_tokens: int = 0


#: Called with a request's id and its next delta; or, as the last call, with the exception that ended it.
OnDelta = Callable[[Any, TextDelta | Exception], None]


class TextGenerator:
    """Generates texts with one model. Requests wait while their keys and values don't fit `budget_bytes`."""

    def __init__(self, lm: PackedLM, tokenizer: PreTrainedTokenizerBase, *, budget_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._chat = ChatTemplate(tokenizer)
        self._lm = lm
        self._batch = DecodeBatch(lm, budget_bytes=budget_bytes)
        self._scheduler = DecodeScheduler(self._batch)
        self._lock = threading.Lock()
        self._submitted: list[_TextStream] = []
        self._cancelled: set[Hashable] = set()
        self._streams: dict[Hashable, _TextStream] = {}
        self._grammar_compiler: GrammarCompiler | None = None

    @property
    def is_busy(self) -> bool:
        """Returns True if `step` has work to do."""
        with self._lock:
            return bool(self._submitted or self._cancelled or self._streams)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the key/value cache now."""
        return self._batch.allocated_bytes

    def submit(self, requests: Sequence[TextRequest], on_delta: OnDelta) -> None:
        """Compiles constraints and queues requests; `on_delta` is called from within `step`.

        Raises RowError, and queues none, when one does not fit the key/value cache or has a constraint that can't be
        compiled.
        """
        for request in requests:
            needed = self._batch.bytes_for(request)
            if needed > self._batch.budget_bytes:
                raise RowError(
                    f"{request.max_cached_tokens} tokens need {needed:,} bytes of keys and values, and there are "
                    f"{self._batch.budget_bytes:,}: ask for fewer max_tokens",
                    param="max_tokens",
                )
        eos_tokens = eos_token_ids(self._lm, self._chat)
        streams = [
            _TextStream(request, on_delta, self._tokenizer, eos_tokens)
            for request in self._with_grammars(requests, eos_tokens)
        ]
        with self._lock:
            self._submitted += streams

    def _with_grammars(
        self, requests: Sequence[TextRequest], eos_tokens: frozenset[int]
    ) -> Iterator[TextRequest]:
        """Yields the requests with the grammars of their constraints. Raises RowError."""
        grammars: dict[Constraint, CompiledGrammar] = {}
        for request in requests:
            constraint = request.constraint
            if constraint is None:
                yield request
                continue
            if constraint not in grammars:
                grammars[constraint] = self._compiler(eos_tokens).compile(constraint)
            yield replace(request, grammar=grammars[constraint])

    def _compiler(self, eos_tokens: frozenset[int]) -> GrammarCompiler:
        with self._lock:
            if self._grammar_compiler is None:
                self._grammar_compiler = GrammarCompiler(
                    self._tokenizer, vocab_size=self._lm.vocab_size, eos_tokens=eos_tokens
                )
            return self._grammar_compiler

    def cancel(self, request_id: Hashable) -> None:
        """Removes a request before the next pass, without a further delta. An unknown id is ignored."""
        with self._lock:
            self._cancelled.add(request_id)

    def step(self) -> None:
        """Runs one pass. If it raises, every request has been told and removed.

        A sequence that does not fit into memory alone ends its own request only.
        """
        self._take_submitted()
        try:
            for request_id, token in self._next_tokens().items():
                stream = self._streams[request_id]
                delta = stream.append(token)
                if delta.finish_reason is not None:
                    self._remove(request_id)
                if delta.text or delta.tokens or delta.finish_reason is not None:
                    stream.on_delta(request_id, delta)
            for request_id, failure in self._scheduler.take_failed().items():
                self._fail(request_id, failure)
        except Exception as error:
            self._fail_all(error)
            raise

    def _next_tokens(self) -> dict[Hashable, SampledToken]:
        try:
            return self._scheduler.step()
        except SequenceOutOfMemory as error:
            self._fail(error.request_id, error)
            return {}

    def _fail(self, request_id: Hashable, error: Exception) -> None:
        """Ends one request with `error`."""
        stream = self._streams[request_id]
        self._remove(request_id)
        stream.on_delta(request_id, error)

    def fail(self, error: Exception) -> None:
        """Ends every request with `error`: no step will follow."""
        self._take_submitted()
        self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            streams, self._streams = self._streams, {}
        # A pass that failed half-way may have left its slots in any state.
        self._scheduler.clear()
        for request_id, stream in streams.items():
            stream.on_delta(request_id, error)

    def _take_submitted(self) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            submitted = [stream for stream in self._submitted if stream.request.id not in cancelled]
            self._submitted = []
            self._streams |= {stream.request.id: stream for stream in submitted}
        self._scheduler.add([stream.request for stream in submitted])
        for request_id in cancelled:
            self._remove(request_id)

    def _remove(self, request_id: Hashable) -> None:
        self._scheduler.abort(request_id)
        with self._lock:
            self._streams.pop(request_id, None)


class _TextStream:
    """Turns one request's tokens into deltas: detokenised, cut at stop strings."""

    def __init__(
        self,
        request: TextRequest,
        on_delta: OnDelta,
        tokenizer: PreTrainedTokenizerBase,
        eos_tokens: frozenset[int],
    ) -> None:
        self.request = request
        self.on_delta = on_delta
        self._eos_tokens = eos_tokens
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._detokenizer = Detokenizer(tokenizer, request.visible_tokens)
        self._stop_strings = StopStringFilter(request.stop)
        self._completion_tokens = 0
        self._echo = request.echo  #: not emitted yet
        self._decoded_characters = self._emitted_characters = len(request.echo or "")
        self._pending: list[TokenLogprobs] = []  #: tokens whose text is not emitted yet

    def append(self, sampled: SampledToken) -> TextDelta:
        """Returns what one more token adds to the text; the last delta has a finish reason."""
        if self._echo is None:
            return self._append(sampled)
        echo, self._echo = self._echo, None
        delta = (
            TextDelta(text="", finish_reason="length") if self.request.echo_only else self._append(sampled)
        )
        prompt = self._prompt_logprobs(echo, sampled.prompt) if self.request.prompt_logprobs else ()
        return replace(delta, text=echo + delta.text, tokens=(*prompt, *delta.tokens))

    def _append(self, sampled: SampledToken) -> TextDelta:
        if sampled.token in self._eos_tokens:
            return self._finish("stop", self._detokenizer.flush())
        self._completion_tokens += 1
        if sampled.logprob is not None:
            self._pending.append(self._logprobs(sampled, sampled.logprob, self._decoded_characters))
        text = self._detokenizer.push(sampled.token)
        if self._completion_tokens >= self.request.max_tokens:
            return self._finish("length", text + self._detokenizer.flush())
        text = self._filter(text)
        return self._delta(text, "stop" if self._stop_strings.is_matched else None)

    def _finish(self, reason: FinishReason, text: str) -> TextDelta:
        text = self._filter(text)
        if self._stop_strings.is_matched:
            return self._delta(text, "stop")
        delta = self._delta(text + self._stop_strings.flush(), reason)
        # The last tokens may have no text of their own.
        return replace(delta, tokens=(*delta.tokens, *self._pending))

    def _filter(self, text: str) -> str:
        self._decoded_characters += len(text)
        return self._stop_strings.push(text)

    def _delta(self, text: str, reason: FinishReason | None) -> TextDelta:
        self._emitted_characters += len(text)
        tokens = [token for token in self._pending if token.text_offset < self._emitted_characters]
        self._pending = self._pending[len(tokens) :]
        return TextDelta(
            text=text,
            tokens=tuple(tokens),
            finish_reason=reason,
            completion_tokens=self._completion_tokens,
        )

    def _prompt_logprobs(self, echo: str, following: Sequence[SampledToken]) -> Iterator[TokenLogprobs]:
        """Yields the log-probabilities of the prompt's tokens; its first one has none."""
        detokenizer = Detokenizer(self._tokenizer)
        offset = 0
        for sampled in (SampledToken(token=self.request.prompt[0]), *following):
            yield self._logprobs(sampled, sampled.logprob, min(offset, len(echo)))
            offset += len(detokenizer.push(sampled.token))

    def _logprobs(self, sampled: SampledToken, logprob: float | None, offset: int) -> TokenLogprobs:
        bytes_of = self._vocabulary.bytes_of
        return TokenLogprobs(
            token_bytes=bytes_of(sampled.token),
            logprob=logprob,
            top_logprobs=tuple((bytes_of(token), value) for token, value in sampled.top_logprobs),
            text_offset=offset,
        )
