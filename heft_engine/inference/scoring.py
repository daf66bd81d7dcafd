"""Scores: the float32 log-probability of each answer of each example, from one packed forward pass.

Final evaluation and serving share this path, so their scores have the same bits. It does NOT know rows or metrics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import Batch, micro_batches, pack, packed_length
from heft_engine.runtime import parallel

#: Tokens that one scoring pass takes at once: in all, and in a lane, whose activations stay in its processor's cache.
TOKEN_BUDGET = 4_096
LANE_TOKENS = 2_048

P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one example, answer by answer.

    totals: summed log-probability of the answer's tokens (natural logarithm). Up to one constant a row where every
        answer is a single token: only their differences matter, and the vocabulary is left out.
    means: totals divided by the number of tokens (length-normalised); reported, never decides.
    """

    totals: tuple[float, ...]
    means: tuple[float, ...]

    @property
    def best(self) -> int:
        """The answer with the highest total; the first of equals. This decides."""
        return max(range(len(self.totals)), key=lambda i: self.totals[i])

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Softmax over the totals: how the answers share the probability that falls on any of them."""
        return self.probabilities_at(1.0)

    def probabilities_at(self, temperature: float) -> tuple[float, ...]:
        """Softmax over totals / temperature (heft_engine.evaluation.calibration)."""
        top = max(self.totals)
        weights = [math.exp((total - top) / temperature) for total in self.totals]
        return tuple(weight / sum(weights) for weight in weights)


@torch.inference_mode()
def score(lm: PackedLM, examples: Sequence[Example], *, scale: float = 1.0) -> list[Scores]:
    """Scores of every example, in order. Bits of a row don't depend on the rows beside it."""
    parts = pieces(lm, examples)
    found = in_lanes(lm, lambda rows: _score(lm, [examples[row] for row in rows], scale), parts)
    return in_order(parts, found)


def pieces(
    lm: PackedLM, examples: Sequence[Example], skipped: Sequence[int] | None = None
) -> list[list[int]]:
    """The rows that are scored in one go each, beside other such pieces where there are lanes.

    `skipped`: tokens that need not be computed; neighbours may share these, and stay together.
    """
    sizes = [packed_length(example) for example in examples]
    count = parallel.count(lm.device)
    if count > 1:
        left = [size - skip for size, skip in zip(sizes, skipped or [0] * len(sizes), strict=True)]
        share_out = parallel.cut if skipped is not None and any(skipped) else parallel.deal
        return share_out(left, parallel.pieces(left, count, LANE_TOKENS))
    ends = list(itertools.accumulate(len(part) for part in micro_batches(examples, TOKEN_BUDGET)))
    return [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]


def in_order(parts: Sequence[Sequence[int]], found: Sequence[Sequence[R]]) -> list[R]:
    """What was found for each piece's rows, in the order of all rows."""
    by_row = {
        row: one for rows, each in zip(parts, found, strict=True) for row, one in zip(rows, each, strict=True)
    }
    return [by_row[row] for row in range(len(by_row))]


def in_lanes(lm: PackedLM, work: Callable[[P], R], parts: Sequence[P]) -> list[R]:
    """What `work` makes of each part, in order, where a row's bits don't depend on its neighbours."""

    def job(part: P) -> R:
        # On this thread everything is as it must be already.
        with torch.inference_mode(), lm.answering() if parallel.is_lane() else nullcontext():
            return work(part)

    with lm.answering() as is_alike:
        return parallel.run([partial(job, part) for part in parts], lm.device, alone=is_alike)


def _score(lm: PackedLM, examples: Sequence[Example], scale: float) -> list[Scores]:
    length = lm.fixed_shapes().whole(sum(map(packed_length, examples)))
    batch = pack(examples, scale=scale, length=length)
    return score_hidden(lm, batch, lm.hidden(batch))


def score_hidden(lm: PackedLM, batch: Batch, hidden: Tensor) -> list[Scores]:
    """Scores from last hidden states (T, hidden)."""
    single = [all(len(answer) == 1 for answer in example.answers) for example in batch.examples]
    results: list[Scores] = []
    for index, example in enumerate(batch.examples):
        reads = batch.reads[index]
        totals = (
            _single(lm, example, hidden[reads[0][0]])
            if single[index]
            else _branches(lm, example, reads, hidden)
        )
        means = tuple(total / len(answer) for total, answer in zip(totals, example.answers, strict=True))
        results.append(Scores(totals=totals, means=means))
    return results


def _single(lm: PackedLM, example: Example, hidden: Tensor) -> tuple[float, ...]:
    tokens = torch.tensor([[answer[0] for answer in example.answers]], device=hidden.device)
    return tuple(lm.label_logits(hidden[None], tokens)[0].tolist())


def _branches(
    lm: PackedLM, example: Example, reads: tuple[tuple[int, ...], ...], hidden: Tensor
) -> tuple[float, ...]:
    # The first read of every branch is the prompt's last position: computed once.
    positions = sorted({position for read in reads for position in read})
    log_probabilities = torch.log_softmax(lm.exact_logits(hidden[positions]), dim=-1)
    where = {position: i for i, position in enumerate(positions)}
    return tuple(
        sum(float(log_probabilities[where[p], token]) for p, token in zip(read, answer, strict=True))
        for read, answer in zip(reads, example.answers, strict=True)
    )
