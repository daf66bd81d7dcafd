"""How right a model's answers are by the task's metrics, with intervals, and the losses that training steers by.

Labels are scored (heft_engine.inference.scoring), text is generated and compared (heft_engine.data.metrics). It
does NOT know stages
or events.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import binomtest

from heft_engine.config.metric_names import GRADED, MetricName
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.metrics import measure
from heft_engine.evaluation.row_values import mean_interval, pack_correctness, pack_graded
from heft_engine.inference.detokenizer import decode
from heft_engine.inference.greedy import eos_token_ids, generate
from heft_engine.inference.scoring import TOKEN_BUDGET, Scores, score
from heft_engine.model.loss import cross_entropy
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import micro_batches, pack

#: What must be written word for word is generated up to this many tokens beyond its own length.
EXTRA_NEW_TOKENS = 8
#: Rows from which packing the weights takes less time than it saves.
WORTH_PACKING = 32


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One metric over the rows: 0 or 1 each, or any value between for a graded one. The interval is of its mean."""

    value: float
    interval_95: tuple[float, float]

    @staticmethod
    def of(name: MetricName, values: Sequence[float]) -> Measured:
        value = sum(values) / len(values)
        if name in GRADED:
            return Measured(value=value, interval_95=mean_interval(values))
        interval = binomtest(round(sum(values)), len(values)).proportion_ci(0.95, method="wilson")
        return Measured(value=value, interval_95=(float(interval.low), float(interval.high)))

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval_95": list(self.interval_95)}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """n rows by each of a task's metrics, the one that counts first.

    rows: that one's values, row by row. scores: the rows' own, in order, where labels were scored.
    """

    n: int
    metrics: Mapping[MetricName, Measured]
    rows: tuple[float, ...] = field(repr=False)
    scores: tuple[Scores, ...] = field(default=(), repr=False)

    @staticmethod
    def of(
        values: Mapping[MetricName, Sequence[float]] | Sequence[bool], scores: Sequence[Scores] = ()
    ) -> Evaluation:
        """From values row by row, by metric; a bare sequence is accuracy's."""
        by_name: Mapping[MetricName, Sequence[float]] = (
            values if isinstance(values, Mapping) else {"accuracy": [float(one) for one in values]}
        )
        rows = tuple(next(iter(by_name.values())))
        return Evaluation(
            n=len(rows),
            metrics={name: Measured.of(name, found) for name, found in by_name.items()},
            rows=rows,
            scores=tuple(scores),
        )

    @property
    def metric(self) -> MetricName:
        return next(iter(self.metrics))

    @property
    def is_graded(self) -> bool:
        return self.metric in GRADED

    @property
    def accuracy(self) -> float:
        """The mean of the metric that counts: the share of right rows, unless that is graded."""
        return self.metrics[self.metric].value

    @property
    def interval_95(self) -> tuple[float, float]:
        return self.metrics[self.metric].interval_95

    @property
    def correct(self) -> int | None:
        """Rows that are right; None where they are more or less so."""
        return None if self.is_graded else round(sum(self.rows))

    def to_json(self) -> dict[str, Any]:
        """For people: without the single rows."""
        return {
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "interval_95": list(self.interval_95),
            "metric": self.metric,
            "metrics": {name: found.to_json() for name, found in self.metrics.items()},
        }

    def packed_rows(self) -> dict[str, str]:
        """Row by row, as heft_engine.evaluation.row_values packs it: `right`, or `values` of a graded metric."""
        if self.is_graded:
            return {"values": pack_graded(self.rows)}
        return {"right": pack_correctness([row == 1 for row in self.rows])}


def evaluate(
    lm: PackedLM, encoder: Encoder, examples: Sequence[Example], *, max_new_tokens: int
) -> Evaluation:
    """The task's metrics over rows whose answers are known: labels by score, text as it is written greedily."""
    if encoder.task.type != "text":
        with lm.packed() if len(examples) >= WORTH_PACKING else nullcontext():
            scores = score(lm, examples)
        right = [one.best == example.gold for one, example in zip(scores, examples, strict=True)]
        return Evaluation.of(right, scores)
    wanted = [example.labels[0] for example in examples]
    written = _written(lm, encoder, examples, wanted, max_new_tokens)
    return Evaluation.of({name: measure(name, written, wanted) for name in encoder.task.metrics})


def _written(
    lm: PackedLM, encoder: Encoder, examples: Sequence[Example], wanted: Sequence[str], most: int
) -> list[str]:
    """What the model writes, as serving would write it: a limit from the right answer would give that away.

    Where it must be right word for word, it is ended as soon as it can't be any more, and its limit gives nothing away.
    """
    tokenizer = encoder.tokenizer
    exact = set(encoder.task.metrics) == {"exact_match"}

    def is_wrong(index: int, tokens: list[int]) -> bool:
        if not exact:
            return False
        # A character of several tokens is a replacement character until the last of them.
        begun = decode(tokenizer, tokens).rstrip("\ufffd").strip()
        return not wanted[index].strip().startswith(begun)

    budgets = [
        len(example.answers[0]) + EXTRA_NEW_TOKENS
        if exact
        else min(most, encoder.max_length - len(example.prompt))
        for example in examples
    ]
    ends = eos_token_ids(lm, tokenizer)
    tokens = generate(lm, examples, ends=ends, max_new_tokens=budgets, is_enough=is_wrong)
    return [decode(tokenizer, one) for one in tokens]


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
