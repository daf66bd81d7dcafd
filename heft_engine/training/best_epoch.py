"""Early stopping of a stage: its best epoch by a metric of the validation rows, and when to look no further."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from heft_engine.config.train import EarlyStopping
from heft_engine.training.progress import Progress


@dataclass(kw_only=True)
class BestEpoch:
    """The best epoch so far: its parameters here, its figures in the stage's Progress. Without settings, none is."""

    settings: EarlyStopping | None
    parameters: dict[str, Tensor] = field(
        default_factory=dict
    )  #: by their names; empty before the first good epoch

    @property
    def needs_accuracy(self) -> bool:
        """True if epochs are compared by the share of right answers."""
        return self.settings is not None and self.settings.metric == "valid_accuracy"

    def end_epoch(self, progress: Progress, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keeps the parameters of an epoch that is the best so far; after `patience` others, finishes the stage."""
        if self.settings is None:
            return
        if self._is_best(progress, self.settings):
            progress.best_epoch, progress.bad_epochs = progress.epoch, 0
            progress.best_loss = progress.valid_loss
            progress.best_token_accuracy = progress.valid_token_accuracy
            progress.best_accuracy = progress.valid_accuracy
            self.parameters = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            return
        progress.bad_epochs += 1
        if progress.bad_epochs >= self.settings.patience:
            progress.finished = True

    def _is_best(self, progress: Progress, settings: EarlyStopping) -> bool:
        if settings.metric == "valid_loss" and progress.valid_loss is None:
            return False
        if not self.parameters:
            return True
        loss, best_loss = (
            math.inf if value is None else value for value in (progress.valid_loss, progress.best_loss)
        )
        if settings.metric == "valid_loss":
            return loss < best_loss
        values = (progress.valid_token_accuracy, progress.best_token_accuracy)
        if settings.metric == "valid_accuracy":
            values = (progress.valid_accuracy, progress.best_accuracy)
        accuracy, best_accuracy = (0.0 if value is None else value for value in values)
        return (accuracy, -loss) > (best_accuracy, -best_loss)

    def take(self, progress: Progress) -> dict[str, Tensor]:
        """Returns the parameters of the best epoch and sets the validation figures to its; empty without one."""
        if self.parameters:
            progress.valid_loss = progress.best_loss
            progress.valid_token_accuracy = progress.best_token_accuracy
            progress.valid_accuracy = progress.best_accuracy
        return self.parameters
