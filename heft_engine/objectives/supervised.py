"""Supervised fine-tuning: cross-entropy of the right answer's tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from heft_engine.config.train import SupervisedSettings
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.rows import Row
from heft_engine.model.loss import LossSums, cross_entropy, logits_bytes
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.objective import Objective


class SupervisedObjective(Objective):
    """Cross-entropy in nats, a mean over the supervised tokens of a step."""

    @classmethod
    def create(cls, settings: SupervisedSettings) -> SupervisedObjective:
        return cls()

    def examples(self, encoder: Encoder, rows: Sequence[Row]) -> list[Example]:
        return [example.supervised() for row in rows for example in encoder.encode(row)]

    def count(self, examples: Sequence[Example]) -> int:
        return sum(example.supervised_tokens for example in examples)

    def loss(self, lm: PackedLM, hidden: Tensor, examples: Sequence[Example]) -> LossSums:
        targets = [token for example in examples for token in example.answers[0]]
        return cross_entropy(lm, hidden, targets)

    def loss_bytes(self, lm: PackedLM, answer_tokens: int) -> int:
        return logits_bytes(lm, answer_tokens)
