"""Scoring: the float32 log-probability of each answer of each example, from packed forward passes.

Evaluation and serving share this path. Rows of one pass may have different adapters and scales, and continue cached
prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.errors import OutOfMemory
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.partition import in_row_order, partition, run_parts
from heft_engine.inference.prefix_cache import CachedPrefix, PrefixCache, PrefixWriter
from heft_engine.model.layout import RowAdapter
from heft_engine.model.loss import CHUNK
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import Batch, pack, packed_length
from heft_engine.runtime.out_of_memory import free_memory, is_out_of_memory
from heft_engine.runtime.transfers import index_tensor

#: Labels whose rows of the head are gathered at a time.
LABELS = 4_096
#: Numbers (n,), and of each the example and the answer to whose total it is added.
AnswerNumbers = tuple[list[tuple[int, int]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one example, answer by answer.

    totals: summed log-probability of the answer's tokens (natural logarithm). Where every answer is a single token, up
        to one constant a row: only their differences matter, and the softmax over the vocabulary is left out.
    means: totals divided by the number of tokens (length-normalised); reported, never used to decide.
    """

    totals: tuple[float, ...]
    means: tuple[float, ...]

    @property
    def best(self) -> int:
        """Index of the answer with the highest total, the first of equals."""
        return max(range(len(self.totals)), key=lambda i: self.totals[i])

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Softmax over the totals."""
        return self.probabilities_at(1.0)

    def probabilities_at(self, temperature: float) -> tuple[float, ...]:
        """Softmax over totals / temperature (heft_engine.evaluation.calibration)."""
        top = max(self.totals)
        weights = [math.exp((total - top) / temperature) for total in self.totals]
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(kw_only=True, eq=False)
class ScoringRow:
    """An example to score with one model.

    hashes: its prompt's block hashes (`prefix_cache.prefix_hashes`); empty where nothing may be cached.
    cached_prefix: the tokens that need not be computed.
    """

    example: Example
    variant: ModelVariant
    scale: float = 1.0
    hashes: Sequence[bytes] = ()
    cached_prefix: CachedPrefix | None = None

    @property
    def cached_tokens(self) -> int:
        return self.cached_prefix.length if self.cached_prefix is not None else 0

    @property
    def uncached_tokens(self) -> int:
        """Tokens to compute."""
        return packed_length(self.example) - self.cached_tokens


def score(lm: PackedLM, examples: Sequence[Example], *, scale: float = 1.0) -> list[Scores]:
    """Returns the scores of every example, in order, with the model's own weights and interventions."""
    variant = ModelVariant(lm=lm)
    return score_rows([ScoringRow(example=example, variant=variant, scale=scale) for example in examples])


def score_rows(rows: Sequence[ScoringRow], cache: PrefixCache | None = None) -> list[Scores]:
    """Returns the scores of every row, in order, and caches the rows' prefixes. All rows are of one PackedLM.

    Raises OutOfMemory if a row does not fit into memory alone.
    """
    scores: list[Scores] = []
    for outcome in score_or_fail_rows(rows, cache):
        if isinstance(outcome, OutOfMemory):
            raise outcome
        scores.append(outcome)
    return scores


@torch.inference_mode()
def score_or_fail_rows(
    rows: Sequence[ScoringRow], cache: PrefixCache | None = None
) -> list[Scores | OutOfMemory]:
    """Returns the scores of every row as `score_rows`, and an exception for a row that does not fit alone."""
    if not rows:
        return []
    # Rows that continue the same prefix stand side by side: attention takes them together.
    first: dict[CachedPrefix | None, int] = {}
    order = sorted(range(len(rows)), key=lambda index: first.setdefault(rows[index].cached_prefix, index))
    examples = [rows[index].example for index in order]
    cached_tokens = [rows[index].cached_tokens for index in order]
    lm = rows[0].variant.lm
    parts = [[order[place] for place in places] for places in partition(lm, examples, cached_tokens)]
    sinks = [_PrefixSink(cache, [rows[index] for index in part], lm.n_layers) for part in parts]
    outcomes = run_parts(lm, lambda sink: _score_or_halve(lm, sink), sinks)
    for sink in sinks:
        sink.commit()
    return in_row_order(parts, outcomes)


def _score_or_halve(lm: PackedLM, sink: _PrefixSink) -> list[Scores | OutOfMemory]:
    """Scores the rows of one part; in halves, which cache nothing, where memory runs out."""
    try:
        return list(_score_part(lm, sink))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler: the exception holds the tensors of the failed pass.
    sink.discard()
    free_memory(lm.device)
    rows = sink.rows
    if len(rows) == 1:
        tokens = rows[0].uncached_tokens
        return [OutOfMemory(f"the device has no memory for a row of {tokens} tokens: shorten it")]
    middle = len(rows) // 2
    halves = [_PrefixSink(None, half, lm.n_layers) for half in (rows[:middle], rows[middle:])]
    return [outcome for half in halves for outcome in _score_or_halve(lm, half)]


def _score_part(lm: PackedLM, sink: _PrefixSink) -> list[Scores]:
    """Scores the rows of one part in one pass through the layers."""
    rows = sink.rows
    cached_tokens = [row.cached_tokens for row in rows]
    length = lm.backend.pass_length(sum(row.uncached_tokens for row in rows))
    batch = pack([row.example for row in rows], cached_tokens=cached_tokens, length=length)
    # One more row may fill the batch up to `length`.
    filler = (None,) * (len(batch.layout.rows) - len(rows))
    adapters: tuple[RowAdapter | None, ...] = tuple(row.variant.adapter for row in rows)
    prefixes: tuple[CachedPrefix | None, ...] = tuple(row.cached_prefix for row in rows)
    layout = replace(
        batch.layout,
        scales=tuple(row.scale for row in rows) + (0.0,) * len(filler),
        cached_prefixes=prefixes + filler if any(cached_tokens) else None,
        adapters=adapters + filler if any(adapter is not None for adapter in adapters) else None,
        kv_sink=sink if sink.is_needed else None,
    )
    return score_hidden(lm, batch, lm.hidden(replace(batch, layout=layout)))


class _PrefixSink:
    """The rows of one part, whose keys and values go into the cache. Implements `layout.KVSink`."""

    def __init__(self, cache: PrefixCache | None, rows: Sequence[ScoringRow], layers: int) -> None:
        self.rows = rows
        self._cache = cache
        self._layers = layers
        self._writers: dict[int, PrefixWriter | None] = {}

    @property
    def is_needed(self) -> bool:
        return self._cache is not None and any(row.hashes for row in self.rows)

    def write(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        if row >= len(self.rows) or self._cache is None:
            return  # the filler
        if row not in self._writers:
            scored = self.rows[row]
            self._writers[row] = self._cache.reserve(
                scored.variant.scope, scored.hashes, scored.cached_prefix, keys, self._layers
            )
        writer = self._writers[row]
        if writer is not None:
            writer.write(layer, keys, values)

    def discard(self) -> None:
        """Frees what a failed pass has written."""
        self._writers.clear()

    def commit(self) -> None:
        """Caches what was written, after a pass that has succeeded."""
        for writer in self._writers.values():
            if writer is not None:
                writer.commit()


def score_hidden(lm: PackedLM, batch: Batch, hidden: Tensor) -> list[Scores]:
    """Returns the scores of a batch's examples from its last hidden states (T, hidden).

    All numbers come from the device at once: each transfer makes the host wait for the GPU.
    """
    answers: list[tuple[int, int]] = []  # of each number, its example and answer
    numbers: list[Tensor] = []
    for part in (_label_logits(lm, batch, hidden), _token_log_probabilities(lm, batch, hidden)):
        for part_answers, part_numbers in part:
            answers += part_answers
            numbers.append(part_numbers)
    totals = [[0.0] * len(example.answers) for example in batch.examples]
    for (example, answer), number in zip(answers, torch.cat(numbers).tolist(), strict=True):
        totals[example][answer] += number
    return [
        Scores(
            totals=tuple(row_totals),
            means=tuple(
                total / len(answer) for total, answer in zip(row_totals, example.answers, strict=True)
            ),
        )
        for example, row_totals in zip(batch.examples, totals, strict=True)
    ]


def _label_logits(lm: PackedLM, batch: Batch, hidden: Tensor) -> Iterator[AnswerNumbers]:
    """Yields the logits of answers of one token: their differences are those of the log-probabilities."""
    by_answers: dict[int, list[int]] = {}
    for index, example in enumerate(batch.examples):
        if _is_single_token(example):
            by_answers.setdefault(len(example.answers), []).append(index)
    for count, indices in by_answers.items():
        per_product = max(1, LABELS // count)
        for start in range(0, len(indices), per_product):
            part = indices[start : start + per_product]
            positions = index_tensor([batch.reads[index][0][0] for index in part], hidden.device)
            labels = [answer[0] for index in part for answer in batch.examples[index].answers]
            tokens = index_tensor(labels, hidden.device).view(len(part), count)
            answers = [(index, answer) for index in part for answer in range(count)]
            yield answers, lm.label_logits(hidden[positions], tokens).flatten()


def _token_log_probabilities(lm: PackedLM, batch: Batch, hidden: Tensor) -> Iterator[AnswerNumbers]:
    """Yields the log-probabilities of the tokens of longer answers."""
    for indices in _head_products(lm, batch):
        positions: list[int] = []
        answers: list[tuple[int, int]] = []
        rows: list[int] = []
        tokens: list[int] = []
        for index in indices:
            # The first read of every branch is the prompt's last position: computed once.
            first, reads = len(positions), batch.reads[index]
            positions += sorted({position for read in reads for position in read})
            row_of = {position: row for row, position in enumerate(positions[first:], first)}
            for answer, (read, answer_tokens) in enumerate(
                zip(reads, batch.examples[index].answers, strict=True)
            ):
                answers += [(index, answer)] * len(read)
                rows += [row_of[position] for position in read]
                tokens += answer_tokens
        logits = lm.exact_logits(hidden[index_tensor(positions, hidden.device)])
        log_probabilities = torch.log_softmax(logits, dim=-1)
        yield (
            answers,
            log_probabilities[index_tensor(rows, logits.device), index_tensor(tokens, logits.device)],
        )


def _head_products(lm: PackedLM, batch: Batch) -> Iterator[list[int]]:
    """Yields the examples of each product with the head: one where a row's bits must not depend on the others."""
    indices: list[int] = []
    positions = 0
    for index, example in enumerate(batch.examples):
        if _is_single_token(example):
            continue
        reads = len({position for read in batch.reads[index] for position in read})
        if indices and (lm.backend.is_batch_invariant or positions + reads > CHUNK):
            yield indices
            indices, positions = [], 0
        indices.append(index)
        positions += reads
    if indices:
        yield indices


def _is_single_token(example: Example) -> bool:
    return all(len(answer) == 1 for answer in example.answers)
