"""Evaluation of a model on rows with known answers: the task's metrics with confidence intervals, and the mean loss.

Labels are scored (heft_engine.inference.scoring); text is generated greedily and compared (heft_engine.data.metrics).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from scipy.stats import binomtest

from heft_engine.config.metric_names import GRADED, MetricName
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.metrics import measure
from heft_engine.evaluation.row_values import mean_interval, pack_correctness, pack_graded
from heft_engine.inference.detokenizer import decode
from heft_engine.inference.greedy import eos_token_ids, generate
from heft_engine.inference.partition import TOKEN_BUDGET
from heft_engine.inference.scoring import Scores, score
from heft_engine.model.loss import supervised_loss
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import micro_batches
from heft_engine.runtime.out_of_memory import run_in_halves

#: For exact_match, tokens generated beyond the length of the reference.
EXTRA_NEW_TOKENS = 8
#: Rows from which packing the weights saves more time than it takes.
WORTH_PACKING = 32


@dataclass(frozen=True, kw_only=True)
class MetricMean:
    """The mean of a metric over rows and its confidence interval: Wilson's for 0 and 1, else `mean_interval`'s."""

    value: float
    interval_95: tuple[float, float]

    @staticmethod
    def of(name: MetricName, values: Sequence[float]) -> MetricMean:
        value = sum(values) / len(values)
        if name in GRADED:
            return MetricMean(value=value, interval_95=mean_interval(values))
        interval = binomtest(round(sum(values)), len(values)).proportion_ci(0.95, method="wilson")
        return MetricMean(value=value, interval_95=(float(interval.low), float(interval.high)))

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval_95": list(self.interval_95)}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of n rows; the first is the primary one.

    rows: the primary metric of each row. scores: of each row, if labels were scored.
    """

    n: int
    metrics: Mapping[MetricName, MetricMean]
    rows: tuple[float, ...] = field(repr=False)
    scores: tuple[Scores, ...] = field(default=(), repr=False)

    @staticmethod
    def of(
        values: Mapping[MetricName, Sequence[float]] | Sequence[bool], scores: Sequence[Scores] = ()
    ) -> Evaluation:
        """Makes an evaluation from each metric's values for the rows; a bare sequence is accuracy's."""
        by_name: Mapping[MetricName, Sequence[float]] = (
            values if isinstance(values, Mapping) else {"accuracy": [float(correct) for correct in values]}
        )
        primary = tuple(next(iter(by_name.values())))
        return Evaluation(
            n=len(primary),
            metrics={name: MetricMean.of(name, of_rows) for name, of_rows in by_name.items()},
            rows=primary,
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
        """The mean of the primary metric: the share of correct rows, unless it is graded."""
        return self.metrics[self.metric].value

    @property
    def interval_95(self) -> tuple[float, float]:
        return self.metrics[self.metric].interval_95

    @property
    def correct(self) -> int | None:
        """The number of correct rows; None for a graded metric."""
        return None if self.is_graded else round(sum(self.rows))

    def to_json(self) -> dict[str, Any]:
        """The evaluation without the values of single rows."""
        return {
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "interval_95": list(self.interval_95),
            "metric": self.metric,
            "metrics": {name: mean.to_json() for name, mean in self.metrics.items()},
        }

    def packed_rows(self) -> dict[str, str]:
        """The primary metric of each row, packed by heft_engine.evaluation.row_values: `right`, or graded `values`."""
        if self.is_graded:
            return {"values": pack_graded(self.rows)}
        return {"right": pack_correctness([row == 1 for row in self.rows])}


def evaluate(
    lm: PackedLM, encoder: Encoder, examples: Sequence[Example], *, max_new_tokens: int
) -> Evaluation:
    """Evaluates the task's metrics on examples with known answers."""
    if encoder.task.type != "text":
        with lm.packed() if len(examples) >= WORTH_PACKING else nullcontext():
            scores = score(lm, examples)
        correct = [row.best == example.gold for row, example in zip(scores, examples, strict=True)]
        return Evaluation.of(correct, scores)
    references = [example.labels[0] for example in examples]
    generated = _generated(lm, encoder, examples, references, max_new_tokens)
    return Evaluation.of({name: measure(name, generated, references) for name in encoder.task.metrics})


def _generated(
    lm: PackedLM,
    encoder: Encoder,
    examples: Sequence[Example],
    references: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Generates as serving does: the length limit does not depend on the reference, which would leak its length.

    Where exact_match is the only metric, it does, and generation ends as soon as the answer is wrong: neither can
    change the metric.
    """
    tokenizer = encoder.tokenizer
    exact = set(encoder.task.metrics) == {"exact_match"}

    def is_wrong(index: int, tokens: list[int]) -> bool:
        if not exact:
            return False
        # A character of several tokens decodes to a replacement character until its last token.
        beginning = decode(tokenizer, tokens).rstrip("\ufffd").strip()
        return not references[index].strip().startswith(beginning)

    budgets = [
        len(example.answers[0]) + EXTRA_NEW_TOKENS
        if exact
        else min(max_new_tokens, encoder.max_length - len(example.prompt))
        for example in examples
    ]
    eos_tokens = eos_token_ids(lm, encoder.chat)
    tokens = generate(lm, examples, eos_tokens=eos_tokens, max_new_tokens=budgets, should_stop=is_wrong)
    return [decode(tokenizer, answer) for answer in tokens]


@torch.inference_mode()
def mean_loss(lm: PackedLM, examples: Sequence[Example]) -> float:
    """Mean cross-entropy per supervised token (nats) of examples; infinite if it overflows."""
    total, tokens = 0.0, 0
    for micro_batch in micro_batches(examples, TOKEN_BUDGET):
        for loss, count in run_in_halves(partial(supervised_loss, lm), micro_batch, lm.device):
            total, tokens = total + float(loss), tokens + count
    return total / tokens if math.isfinite(total) else math.inf
