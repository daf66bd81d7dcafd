"""What a model gets right, with an interval, and the losses that training steers by.

Labels are scored (heft_engine.scoring), text is generated and compared. It does NOT know stages or events.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from scipy.stats import binomtest

from heft_engine.encoding import Encoder, Example
from heft_engine.generation import generate
from heft_engine.model import PackedLM
from heft_engine.packing import micro_batches, pack
from heft_engine.row_outcomes import pack_rows
from heft_engine.scoring import TOKEN_BUDGET, Scores, score
from heft_engine.supervised import cross_entropy

#: Answers to text prompts are generated up to this many tokens beyond the right one's length.
EXTRA_NEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """n rows, how many were right, and accuracy's 95 % Wilson score interval.

    scores: the rows' own, in order, where labels were scored; not part of the record.
    """

    n: int
    correct: int
    accuracy: float
    interval_95: tuple[float, float]
    metric: str
    right: str  #: row by row (heft_engine.row_outcomes)
    scores: tuple[Scores, ...] = field(default=(), repr=False)

    @staticmethod
    def of(right: Sequence[bool], metric: str, scores: Sequence[Scores] = ()) -> Evaluation:
        n, correct = len(right), sum(right)
        interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
        low, high = float(interval.low), float(interval.high)
        return Evaluation(
            n=n,
            correct=correct,
            accuracy=correct / n,
            interval_95=(low, high),
            metric=metric,
            right=pack_rows(right),
            scores=tuple(scores),
        )

    def to_json(self) -> dict[str, Any]:
        """For people: without the single rows."""
        record = {**asdict(replace(self, scores=())), "interval_95": list(self.interval_95)}
        del record["scores"], record["right"]
        return record


def evaluate(lm: PackedLM, encoder: Encoder, examples: Sequence[Example]) -> Evaluation:
    """Accuracy over rows whose answers are known: labels by score, text by exact match of the stripped answer."""
    if encoder.task.type != "text":
        scores = score(lm, examples)
        right = [one.best == example.gold for one, example in zip(scores, examples, strict=True)]
        return Evaluation.of(right, "accuracy", scores)
    budgets = [len(example.answers[0]) + EXTRA_NEW_TOKENS for example in examples]
    eos = encoder.tokenizer.eos_token_id
    written = generate(lm, examples, eos=eos, max_new_tokens=budgets)
    right = [
        str(encoder.tokenizer.decode(tokens)).strip() == example.labels[0].strip()
        for tokens, example in zip(written, examples, strict=True)
    ]
    return Evaluation.of(right, "exact_match")


def supervised_loss(
    lm: PackedLM, examples: Sequence[Example], length: int | None = None
) -> tuple[torch.Tensor, int]:
    """Sum of the cross-entropy over all supervised tokens of packed examples, and their number.

    `length`: the tokens that the pass is filled up to.
    """
    batch = pack(examples, length=length)
    positions, targets = batch.supervised()
    hidden = lm.hidden(batch)
    at = torch.tensor(positions, device=hidden.device)
    return cross_entropy(lm, hidden[at], targets), len(targets)


@torch.inference_mode()
def mean_loss(lm: PackedLM, examples: Sequence[Example]) -> float:
    """Cross-entropy per supervised token (nats) over supervised examples; infinite where it overflows."""
    total, tokens = 0.0, 0
    for part in micro_batches(examples, TOKEN_BUDGET):
        loss, count = supervised_loss(lm, part)
        total, tokens = total + float(loss), tokens + count
    return total / tokens if math.isfinite(total) else math.inf
