"""Scores: the float32 log-probability of each answer of each example, from one packed forward pass.

Final evaluation and serving share this path, so their scores have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.inference.partition import in_row_order, partition, run_parts
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import Batch, pack, packed_length


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
    parts = partition(lm, examples)
    scores = run_parts(lm, lambda rows: _score(lm, [examples[row] for row in rows], scale), parts)
    return in_row_order(parts, scores)


def _score(lm: PackedLM, examples: Sequence[Example], scale: float) -> list[Scores]:
    length = lm.backend.pass_length(sum(map(packed_length, examples)))
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
