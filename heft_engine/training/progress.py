"""The position of a stage in its training, and how it runs its passes: what a checkpoint carries beside tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

#: Tokens of one micro-batch, at most: larger ones are no faster. Bits of the gradient's sum depend on it, so
#: checkpoints carry it.
TOKEN_BUDGET = 1_536
#: A running mean of the loss this many times its lowest value, and more than 1 nat above it, is called divergence.
DIVERGED = 2.0


@dataclass(kw_only=True)
class Progress:
    """The position of a stage in its training; JSON values only, because checkpoints carry it."""

    epoch: int = 0
    step: int = 0  #: optimizer steps of this stage
    tokens: int = 0
    seconds: float = 0.0
    epoch_loss: float = 0.0  #: summed loss of the epoch so far
    epoch_correct: float = 0.0  #: tokens of the epoch so far that were predicted
    epoch_tokens: int = 0  #: the objective's count of the epoch so far
    loss: float | None = None  #: of the last step
    token_accuracy: float | None = None
    valid_loss: float | None = None  #: of the last epoch; None without validation rows, or if it is infinite
    valid_token_accuracy: float | None = None
    valid_accuracy: float | None = None  #: share of right answers, where early stopping goes by it
    running: float | None = None  #: exponential mean of the step losses
    lowest: float | None = None
    warned: bool = False
    overflows: int = 0  #: steps of this stage that were taken again, with a lower loss scale
    best_loss: float | None = None
    best_token_accuracy: float | None = None
    best_accuracy: float | None = None
    best_epoch: int | None = None  #: from 1, with early stopping
    bad_epochs: int = 0
    #: How passes run. Decided when the stage starts, because it changes rounding.
    token_budget: int = TOKEN_BUDGET
    compiled: bool = False
    checkpointing: bool = False
    finished: bool = False
    #: How training and validation rows are cached. Decided when the stage starts, because it changes rounding.
    cache: dict[str, Any] | None = None
    validation_cache: dict[str, Any] | None = None

    def add_step(self, loss: float, correct: float, count: int, *, tokens: int, seconds: float) -> None:
        """Counts one optimizer step. loss, correct: sums over its `count` of the objective. tokens: of its rows."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.loss, self.token_accuracy = loss / count, correct / count
        self.epoch_loss += loss
        self.epoch_correct += correct
        self.epoch_tokens += count

    def begins_to_diverge(self, loss: float) -> bool:
        """Takes in the loss of a step. Returns True the first time that its running mean has risen too far."""
        self.running = loss if self.running is None else 0.9 * self.running + 0.1 * loss
        self.lowest = min(self.running, self.lowest if self.lowest is not None else math.inf)
        if self.warned or self.running <= max(DIVERGED * self.lowest, self.lowest + 1):
            return False
        self.warned = True
        return True

    @property
    def losses(self) -> dict[str, float]:
        """The latest losses (nats a token) and token accuracies by OpenAI's names, and valid_accuracy, as far as
        they are known.

        Validation is always on all validation rows, so the names with and without `full` have the same values.
        """
        values = {
            "train_loss": self.loss,
            "train_mean_token_accuracy": self.token_accuracy,
            "valid_loss": self.valid_loss,
            "valid_mean_token_accuracy": self.valid_token_accuracy,
            "full_valid_loss": self.valid_loss,
            "full_valid_mean_token_accuracy": self.valid_token_accuracy,
            "valid_accuracy": self.valid_accuracy,
        }
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Progress:
        """Returns the progress in a checkpoint; values that only other versions know are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
