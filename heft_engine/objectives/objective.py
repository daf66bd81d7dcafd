"""The interface of everything that a stage can be trained for. heft_engine.objectives.registry lists what there is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.rows import Row
from heft_engine.model.loss import LossSums
from heft_engine.model.packed_lm import PackedLM


class Objective(ABC):
    """A loss over the answers of encoded rows.

    The loss of an optimizer step is the sum of `loss` over its micro-batches divided by `count` of all its examples,
    however the step was cut. Validation takes the same mean over the validation rows.
    """

    @classmethod
    @abstractmethod
    def create(cls, settings: Any) -> Self:
        """Returns the objective of a stage. `settings`: the stage's `objective`."""

    @abstractmethod
    def examples(self, encoder: Encoder, rows: Sequence[Row]) -> list[Example]:
        """Returns the examples to train on: prompts, with the answers whose tokens the loss needs.

        Raises RowError for rows that this objective can't be trained on.
        """

    @abstractmethod
    def count(self, examples: Sequence[Example]) -> int:
        """Returns the number of tokens that the sums of these examples are divided by."""

    @abstractmethod
    def loss(self, lm: PackedLM, hidden: Tensor, examples: Sequence[Example]) -> LossSums:
        """Returns the summed loss of a micro-batch, differentiable in `hidden`, and its correct tokens.

        hidden: (answer tokens, hidden), the last hidden states that predict the tokens of each example's answers, in
        their order.
        """

    @abstractmethod
    def loss_bytes(self, lm: PackedLM, answer_tokens: int) -> int:
        """Returns the memory that `loss` takes at most, beside hidden states, for so many answer tokens."""

    def report(self) -> dict[str, float]:
        """Returns figures beside the loss, reported at the end of each epoch."""
        return {}

    def buffers(self) -> dict[str, Tensor]:
        """Returns tensors that a checkpoint must restore, bit for bit, in place."""
        return {}
