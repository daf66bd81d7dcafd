"""Grammars that texts must match: compiled by xgrammar for a tokenizer, and applied to logits as masks of tokens."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import xgrammar
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from xgrammar import CompiledGrammar, GrammarMatcher

from heft_engine.errors import RowError
from heft_engine.inference.compilation import Compilation, CompilationThreads
from heft_engine.runtime.transfers import to_device

#: Compiled grammars of one tokenizer.
CACHE_BYTES = 64 * 1024**2
#: Longest compilation that a request waits for, and longest time that it waits for those before it.
COMPILE_SECONDS = 10.0
QUEUE_SECONDS = 10.0
#: Whitespace characters between two parts of a JSON text at most: `{"a":1}` and `{"a": 1}`, but no run of blanks, which
#: small models write for ever where they may.
MAX_WHITESPACE = 1
#: A byte that no UTF-8 has.
_NO_TEXT = b"\xff"


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A grammar that a text must match, not compiled yet.

    source: a JSON schema or a structural tag of xgrammar as JSON text, or a grammar in EBNF.
    param: the request's field that asks for it, for error messages.
    """

    kind: Literal["json_schema", "structural_tag", "ebnf"]
    source: str
    param: str = "response_format"


class GrammarDeadEnd(RowError):
    """A text that no token of the vocabulary can continue as its grammar demands."""


class _GrammarCache:
    """The latest grammars that were asked for, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._grammars: OrderedDict[Constraint, CompiledGrammar] = OrderedDict()
        self.bytes = 0

    def get(self, constraint: Constraint) -> CompiledGrammar | None:
        grammar = self._grammars.get(constraint)
        if grammar is not None:
            self._grammars.move_to_end(constraint)
        return grammar

    def add(self, constraint: Constraint, grammar: CompiledGrammar) -> None:
        """Adds a grammar that is not there, and removes those that were not asked for for longest."""
        self._grammars[constraint] = grammar
        self.bytes += _kept_bytes(constraint, grammar)
        while self.bytes > self._max_bytes:
            self.bytes -= _kept_bytes(*self._grammars.popitem(last=False))


def _kept_bytes(constraint: Constraint, grammar: CompiledGrammar) -> int:
    return len(constraint.source) + int(grammar.memory_size_bytes)


class GrammarCompiler:
    """Compiles constraints for one tokenizer and keeps what it has compiled. Safe to use from many threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        eos_tokens: Collection[int],
        cache_bytes: int = CACHE_BYTES,
        seconds: float = COMPILE_SECONDS,
        queue_seconds: float = QUEUE_SECONDS,
    ) -> None:
        """`vocab_size` is the width of the logits, which may have columns that no token has."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_tokens = sorted(token for token in eos_tokens if token < vocab_size)
        self._seconds = seconds
        self._queue_seconds = queue_seconds
        self._vocabulary_lock = threading.Lock()
        self._compiler: xgrammar.GrammarCompiler | None = None
        self._lock = threading.Lock()
        self._cache = _GrammarCache(cache_bytes)
        self._compilations: dict[Constraint, Compilation[CompiledGrammar]] = {}

    def compile(self, constraint: Constraint) -> CompiledGrammar:
        """Returns a constraint's grammar: at once if it is kept, or else compiled on a thread of its own.

        Raises RowError when xgrammar refuses it, when it takes too long, and for a tokenizer without an end-of-text
        token, whose texts could not end with their grammar. Raises Overloaded when others take too long before it.
        """
        with self._lock:
            grammar = self._cache.get(constraint)
            if grammar is not None:
                return grammar
            compilation = self._joined(constraint)
        try:
            return compilation.result(queue_seconds=self._queue_seconds, seconds=self._seconds)
        except TimeoutError:
            raise RowError(
                f"{constraint.param}: its grammar was not compiled within {self._seconds:g} s: make the schema smaller",
                param=constraint.param,
            ) from None

    def _joined(self, constraint: Constraint) -> Compilation[CompiledGrammar]:
        """Returns the constraint's compilation, which is begun for the first request alone."""
        compilation = self._compilations.get(constraint)
        if compilation is None or not compilation.join():
            compilation = Compilation(partial(self._compile, constraint))
            self._compilations[constraint] = compilation
            compilation.future.add_done_callback(partial(self._keep, constraint, compilation))
            _compilation_threads().submit(compilation)
        return compilation

    def _keep(
        self,
        constraint: Constraint,
        compilation: Compilation[CompiledGrammar],
        future: Future[CompiledGrammar],
    ) -> None:
        with self._lock:
            if self._compilations.get(constraint) is compilation:
                del self._compilations[constraint]
            if not future.cancelled() and future.exception() is None:
                self._cache.add(constraint, future.result())

    def _compile(self, constraint: Constraint) -> CompiledGrammar:
        if not self._eos_tokens:
            raise RowError(
                f"{constraint.param}: this model's tokenizer has no end-of-text token, which must end the answer",
                param=constraint.param,
            )
        try:
            compiler = self._xgrammar_compiler()
            if constraint.kind == "json_schema":
                return compiler.compile_json_schema(
                    constraint.source, any_whitespace=True, max_whitespace_cnt=MAX_WHITESPACE
                )
            if constraint.kind == "structural_tag":
                return compiler.compile_structural_tag(self._with_token_ids(json.loads(constraint.source)))
            return compiler.compile_grammar(constraint.source)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise RowError(
                f"{constraint.param} can't be turned into a grammar: {reason}", param=constraint.param
            ) from error

    def _xgrammar_compiler(self) -> xgrammar.GrammarCompiler:
        """Returns the tokenizer's compiler, which reads the whole vocabulary once."""
        with self._vocabulary_lock:
            if self._compiler is None:
                self._compiler = xgrammar.GrammarCompiler(
                    self._vocabulary(), max_threads=1, cache_enabled=False
                )
            return self._compiler

    def _vocabulary(self) -> xgrammar.TokenizerInfo:
        """Returns the vocabulary as the bytes that its tokens are in a text.

        Special tokens are no text, whatever they are called: decoding drops them. They can't be left out, or a
        structural tag could not ask for them.
        """
        read = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._eos_tokens
        )
        special = set(self._tokenizer.all_special_ids)
        tokens = [
            _NO_TEXT + spelling if token in special else _without_controls(spelling)
            for token, spelling in enumerate(read.decoded_vocab)
        ]
        return xgrammar.TokenizerInfo(
            tokens,
            xgrammar.VocabType.RAW,
            vocab_size=self._vocab_size,
            stop_token_ids=self._eos_tokens,
            add_prefix_space=read.add_prefix_space,
        )

    def _with_token_ids(self, tag: Any) -> Any:
        """Returns a structural tag in which tokens have their ids in place of their names. Raises ValueError."""
        if isinstance(tag, list):
            return [self._with_token_ids(part) for part in tag]
        if not isinstance(tag, dict):
            return tag
        name = tag.get("token")
        if tag.get("type") != "token" or not isinstance(name, str):
            # Schemas are the user's, and name no tokens.
            return {
                key: part if key == "json_schema" else self._with_token_ids(part) for key, part in tag.items()
            }
        token = self._tokenizer.get_vocab().get(name)
        if token is None:
            raise ValueError(f"the tokenizer has no token {name}")
        return {**tag, "token": token}


def _without_controls(spelling: bytes) -> bytes:
    """Leaves out a token with control characters other than newlines, which xgrammar allows within JSON strings of a
    limited length."""
    return b"" if any(byte < 0x20 and byte != 0x0A for byte in spelling) else spelling


def mask_tokens(logits: Tensor, matchers: Sequence[GrammarMatcher | None]) -> list[int]:
    """Sets logits (rows, vocabulary) of tokens that a row's grammar does not allow to -inf, in place.

    Rows without a matcher stay as they are. Returns the rows that no token is left for.
    """
    rows = [row for row, matcher in enumerate(matchers) if matcher is not None]
    if not rows:
        return []
    bitmask = xgrammar.allocate_token_bitmask(*logits.shape)
    for row in rows:
        matcher = matchers[row]
        assert matcher is not None
        matcher.fill_next_token_bitmask(bitmask, row)
    xgrammar.apply_token_bitmask_inplace(
        logits,
        to_device(bitmask, logits.device),
        vocab_size=logits.shape[1],
        indices=rows,
        backend=_mask_backend(logits.device.type),
    )
    is_dead = (bitmask[rows] == 0).all(dim=1).tolist()
    return [row for row, dead in zip(rows, is_dead, strict=True) if dead]


def _mask_backend(device_type: str) -> Literal["cpu", "torch_native"]:
    """Returns xgrammar's way to apply masks. Its Triton kernel runs on the current GPU, which may be another one."""
    return "cpu" if device_type == "cpu" else "torch_native"


@cache
def _compilation_threads() -> CompilationThreads:
    """Two threads: a large schema does not hold up small ones, and the processor stays free for passes."""
    return CompilationThreads(2)
