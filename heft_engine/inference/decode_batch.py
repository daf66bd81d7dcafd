"""A decode batch: sequences are prefilled, decoded a token at a time in one flat pass, and removed, in any order.

Prompts are prefilled packed, each with its own scale of the interventions, which act on prompt tokens alone: decoding
costs what it costs the plain model. A decoding step packs the newest token of every sequence as a row of one token.
Products have fixed shapes and attention treats every sequence by itself, so a sequence's tokens do not depend on the
rest of the batch. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from xgrammar import CompiledGrammar, GrammarMatcher

from heft_engine.data.encoding import Example
from heft_engine.errors import EngineError, OutOfMemory
from heft_engine.inference.decode_attention import DecodeAttention
from heft_engine.inference.grammar import GrammarDeadEnd, mask_tokens
from heft_engine.inference.kv_cache import KVCache, Slot
from heft_engine.inference.partition import TOKEN_BUDGET
from heft_engine.inference.prompt_logprobs import prompt_logprobs
from heft_engine.inference.sampling import SampledToken, Sampler, SamplingParams
from heft_engine.model.layout import Layout, PackedRow, RowAdapter
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import micro_batches, pack
from heft_engine.runtime.out_of_memory import free_memory, is_out_of_memory, run_twice
from heft_engine.runtime.transfers import index_tensor

R = TypeVar("R", bound="DecodeRequest")
T = TypeVar("T")
GREEDY = SamplingParams()
_DEAD_END = "no token of this model can continue the text as its grammar demands: loosen the schema"
_TO_SAMPLE = "to choose the next token of this text: ask again while fewer texts are generated"


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One sequence to generate: at most `max_tokens` (at least 1) after `prompt`. Its `id` is unique."""

    id: Hashable
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = GREEDY
    scale: float = 1.0
    #: The unmerged adapter of the sequence's model.
    adapter: RowAdapter | None = None
    #: The text matches it, unless `max_tokens` end it earlier.
    grammar: CompiledGrammar | None = None
    #: The first token brings the prompt's own log-probabilities, with as many alternatives as `sampling` asks for.
    prompt_logprobs: bool = False

    @property
    def max_cached_tokens(self) -> int:
        """Most tokens in the key/value cache: the last token is never fed in."""
        return len(self.prompt) + self.max_tokens - 1


class PassOutOfMemory(RuntimeError):
    """A pass that ran out of memory. The batch is as it was before it."""


class _Sequence:
    slot: Slot

    def __init__(self, request: DecodeRequest) -> None:
        self.request = request
        self.sampler = Sampler(request.sampling)
        #: The state of the grammar after `generated`.
        self.matcher = GrammarMatcher(request.grammar) if request.grammar is not None else None
        self.generated: list[int] = []
        #: Of the prompt, from its prefill until the first token.
        self.prompt_tokens: tuple[SampledToken, ...] = ()

    def sample(self, logits: Tensor, likeliest: int, unmasked: Tensor | None) -> SampledToken:
        """Returns the next token for logits (vocabulary,), whose highest is that of `likeliest`."""
        if self.request.sampling.is_argmax:
            return SampledToken(token=likeliest)
        sampled = self.sampler.sample(logits, unmasked=unmasked)
        if not self.prompt_tokens:
            return sampled
        prompt, self.prompt_tokens = self.prompt_tokens, ()
        return replace(sampled, prompt=prompt)

    def append(self, token: int) -> None:
        """Takes in the next token. It must be one that the grammar allows."""
        if self.matcher is not None and not self.matcher.accept_token(token):
            raise RuntimeError(f"the grammar does not accept token {token}, which its mask allowed")
        self.generated.append(token)

    @property
    def computed(self) -> Example:
        """The prompt and, as its one answer, all tokens after it. The answer's last token is never fed in."""
        answers = ((*self.generated, 0),) if self.generated else ()
        return Example(prompt=self.request.prompt, answers=answers, labels=(), gold=None)

    def row(self, start: int) -> PackedRow:
        prompt = len(self.request.prompt)
        return PackedRow(start=start, prompt=prompt, branches=(1,), cached_tokens=prompt)


class DecodeBatch:
    """The running sequences of one model, whose keys and values stay within `budget_bytes`."""

    def __init__(self, lm: PackedLM, *, budget_bytes: int) -> None:
        self._lm = lm
        self._kv_cache = KVCache(lm, budget_bytes)
        self._sequences: dict[Hashable, _Sequence] = {}
        self._preempted: dict[Hashable, _Sequence] = {}
        self._failed: dict[Hashable, EngineError] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: Hashable) -> bool:
        return request_id in self._sequences

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the key/value cache now."""
        return self._kv_cache.allocated_bytes

    @property
    def budget_bytes(self) -> int:
        return self._kv_cache.budget_bytes

    def bytes_for(self, request: DecodeRequest) -> int:
        """Returns the bytes that a request reserves. With more than the budget it can never run."""
        return self._kv_cache.bytes_for(request.max_cached_tokens)

    def fitting(self, requests: Sequence[R]) -> list[R]:
        """Returns the first of these requests that fit the budget together."""
        free = self._kv_cache.budget_bytes - self._kv_cache.reserved_bytes
        fitting: list[R] = []
        for request in requests:
            free -= self.bytes_for(request)
            if free < 0:
                break
            fitting.append(request)
        return fitting

    @torch.inference_mode()
    def prefill(self, requests: Sequence[DecodeRequest]) -> dict[Hashable, SampledToken]:
        """Adds requests, prefills their prompts and returns the next token of each. They must be `fitting`.

        The next token is the first one; of a preempted sequence, whose tokens are computed again, the one after its
        last. If the pass fails, none has been added. Raises PassOutOfMemory.
        """
        sequences = [self._preempted.get(request.id) or _Sequence(request) for request in requests]
        allocated: list[_Sequence] = []
        try:
            logits = self._run(lambda: self._allocate_and_prefill(sequences, allocated))
        except BaseException:
            # Only now: while the pass's own exception lives, so do its tensors, and freeing a slot copies its chunk.
            for sequence in allocated:
                self._kv_cache.free(sequence.slot)
            raise
        for sequence in sequences:
            self._preempted.pop(sequence.request.id, None)
            self._sequences[sequence.request.id] = sequence
        return self._sample(sequences, logits)

    def _allocate_and_prefill(self, sequences: Sequence[_Sequence], allocated: list[_Sequence]) -> Tensor:
        """Returns the logits after the last token of each sequence, (sequences, vocabulary).

        Sequences that have got a slot are appended to `allocated`.
        """
        for sequence in sequences:
            tokens = len(sequence.request.prompt) + len(sequence.generated)
            sequence.slot = self._kv_cache.allocate(tokens, sequence.request.max_cached_tokens)
            allocated.append(sequence)
        return torch.cat([self._prefill(part) for part in _passes(sequences)])

    def prefill_tokens(self, request: DecodeRequest) -> int:
        """Returns the tokens that a prefill of a request computes: of a preempted one, those it has written, too."""
        preempted = self._preempted.get(request.id)
        return len(request.prompt) + (len(preempted.generated) if preempted is not None else 0)

    @torch.inference_mode()
    def preempt(self, count: int) -> list[DecodeRequest]:
        """Takes the newest sequences out of the batch and returns their requests, to be prefilled again."""
        preempted = list(self._sequences.items())[len(self._sequences) - count :]
        for request_id, sequence in preempted:
            del self._sequences[request_id]
            self._kv_cache.free(sequence.slot)
            self._preempted[request_id] = sequence
        return [sequence.request for _, sequence in preempted]

    @torch.inference_mode()
    def decode(self) -> dict[Hashable, SampledToken]:
        """Runs one pass and returns a new token for every sequence.

        Raises ValueError while a sequence with all of its tokens has not been removed, and PassOutOfMemory.
        """
        if not self._sequences:
            return {}
        complete = [
            s.request.id for s in self._sequences.values() if len(s.generated) >= s.request.max_tokens
        ]
        if complete:
            raise ValueError(f"these sequences have all of their tokens and must be removed: {complete}")
        sequences, logits = self._run(self._decode)
        for sequence in sequences:
            sequence.slot.length += 1
        return self._sample(sequences, logits)

    def _decode(self) -> tuple[list[_Sequence], Tensor]:
        """Returns the sequences in the order of their slots, and their logits (sequences, vocabulary)."""
        for sequence in self._sequences.values():
            self._kv_cache.grow(sequence.slot)
        chunks = list(self._kv_cache.chunks())
        by_slot = {id(sequence.slot): sequence for sequence in self._sequences.values()}
        sequences = [by_slot[id(slot)] for chunk in chunks for slot in chunk.slots]
        layout = Layout(
            rows=tuple(sequence.row(start) for start, sequence in enumerate(sequences)),
            decoding=DecodeAttention(chunks),
            adapters=_adapters(sequences),
        )
        device = self._lm.device
        ids = index_tensor([sequence.generated[-1] for sequence in sequences], device)[None]
        positions = index_tensor([sequence.slot.length for sequence in sequences], device)[None]
        with self._lm.inference_mode(one_token=True):
            states = self._lm.run_layers(self._lm.embed(ids), positions, layout, 0, self._lm.n_layers)
            logits = self._lm.logits(self._lm.finish(states)[0])
        return sequences, logits

    def _run(self, work: Callable[[], T]) -> T:
        """Returns what a pass returns. Raises PassOutOfMemory once the memory of a pass that failed has been freed."""
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        # Outside of the handler: the exception holds the tensors of the failed pass.
        free_memory(self._lm.device)
        raise PassOutOfMemory(f"a pass ran out of memory: {reason}")

    @torch.inference_mode()
    def remove(self, request_id: Hashable) -> None:
        """Removes a sequence between two passes and frees its slot. An unknown id is ignored."""
        self._preempted.pop(request_id, None)
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._kv_cache.free(sequence.slot)

    def take_failed(self) -> dict[Hashable, EngineError]:
        """Returns the sequences that passes since the last call have removed, with the errors that ended them."""
        failed, self._failed = self._failed, {}
        return failed

    def clear(self) -> None:
        """Removes every sequence and frees all memory, also after a pass that failed half-way."""
        self._sequences.clear()
        self._preempted.clear()
        self._failed.clear()
        self._kv_cache.clear()

    def _prefill(self, sequences: Sequence[_Sequence]) -> Tensor:
        """Returns the logits after the last token of each sequence, (sequences, vocabulary)."""
        batch = pack([sequence.computed for sequence in sequences])
        layout = replace(
            batch.layout,
            scales=tuple(sequence.request.scale for sequence in sequences),
            kv_sink=_SlotWriter([sequence.slot for sequence in sequences]),
            adapters=_adapters(sequences),
        )
        last_positions = [row.start + row.length - 1 for row in layout.rows]
        ids, positions = batch.inputs(self._lm.device)
        with self._lm.inference_mode():
            states = self._lm.run_layers(self._lm.embed(ids), positions, layout, 0, self._lm.n_layers)
            for sequence, row in zip(sequences, layout.rows, strict=True):
                self._read_prompt(sequence, states[0, row.start :])
        with self._lm.inference_mode(one_token=True):
            return self._lm.logits(self._lm.finish(states[:, index_tensor(last_positions, states.device)])[0])

    def _read_prompt(self, sequence: _Sequence, states: Tensor) -> None:
        """Computes the prompt's log-probabilities, if they are asked for, before the sequence's first token."""
        request, top = sequence.request, sequence.request.sampling.top_logprobs
        if request.prompt_logprobs and top is not None and not sequence.generated:
            sequence.prompt_tokens = prompt_logprobs(self._lm, states, request.prompt, top)

    def _sample(
        self, sequences: Sequence[_Sequence], logits: Tensor, unmasked: Sequence[Tensor | None] | None = None
    ) -> dict[Hashable, SampledToken]:
        """Returns the next token of each sequence, from logits (sequences, vocabulary), which it changes.

        unmasked: as `_own_logits`; None while nothing has been masked. Sequences whose grammar allows no token are
        removed, and those that there is no memory for even one by one.
        """
        device = self._lm.device
        try:
            if unmasked is None:
                unmasked = run_twice(lambda: _own_logits(sequences, logits), device, _TO_SAMPLE)
            matchers = [sequence.matcher for sequence in sequences]
            dead_ends = run_twice(lambda: mask_tokens(logits, matchers), device, _TO_SAMPLE)
            argmax = run_twice(lambda: logits.argmax(dim=-1).tolist(), device, _TO_SAMPLE)
        except OutOfMemory as error:
            if len(sequences) == 1:
                self._fail(sequences[0], error)
                return {}
            middle = len(sequences) // 2
            halves = slice(None, middle), slice(middle, None)
            parts = [(sequences[half], logits[half], unmasked and unmasked[half]) for half in halves]
            return {id: token for part in parts for id, token in self._sample(*part).items()}
        for row in dead_ends:
            self._fail(sequences[row], GrammarDeadEnd(_DEAD_END))
        tokens = {}
        for row, (sequence, likeliest) in enumerate(zip(sequences, argmax, strict=True)):
            if row in dead_ends:
                continue
            sample = partial(sequence.sample, logits[row], likeliest, unmasked[row])
            try:
                sampled = run_twice(sample, self._lm.device, _TO_SAMPLE)
            except OutOfMemory as error:
                self._fail(sequence, error)
                continue
            sequence.append(sampled.token)
            tokens[sequence.request.id] = sampled
        return tokens

    def _fail(self, sequence: _Sequence, error: EngineError) -> None:
        self.remove(sequence.request.id)
        self._failed[sequence.request.id] = error


def _own_logits(sequences: Sequence[_Sequence], logits: Tensor) -> list[Tensor | None]:
    """Returns copies of the logits that are going to be masked and whose log-probabilities are asked for.

    Those are the model's own, without the grammar. None for all other sequences.
    """
    return [
        row.clone()
        if sequence.matcher is not None and sequence.request.sampling.top_logprobs is not None
        else None
        for sequence, row in zip(sequences, logits, strict=True)
    ]


class _SlotWriter:
    """Writes a prefill's keys and values into the sequences' slots. Implements `layout.KVSink`."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots

    def write(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        self._slots[row].write(layer, keys[0], values[0])


def _adapters(sequences: Sequence[_Sequence]) -> tuple[RowAdapter | None, ...] | None:
    adapters = tuple(sequence.request.adapter for sequence in sequences)
    return adapters if any(adapter is not None for adapter in adapters) else None


def _passes(sequences: Sequence[_Sequence]) -> list[list[_Sequence]]:
    """Cuts sequences into passes of at most TOKEN_BUDGET tokens."""
    passes, start = [], 0
    for examples in micro_batches([sequence.computed for sequence in sequences], TOKEN_BUDGET):
        passes.append(list(sequences[start : start + len(examples)]))
        start += len(examples)
    return passes
