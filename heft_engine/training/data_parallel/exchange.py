"""The exchanges of a training loop with those of the other ranks. A single process exchanges nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heft_engine.runtime.distributed import Ranks, fingerprint
from heft_engine.training.schedule import derived_seed


@dataclass(kw_only=True)
class Exchange:
    """One stage's exchanges: gradients, losses, requests to stop, and proofs that all ranks train the same weights."""

    ranks: Ranks
    seed: int  #: the run's
    stage_index: int
    stop_requested: Callable[[], bool]  #: returns True once this rank was asked to stop
    _stop_agreed: bool = False  #: all ranks know that one of them was

    def begin_step(self, step: int) -> None:
        """Gives each rank dropout masks of its own, which follow from the step: a resumed run draws the same."""
        if self.ranks.size > 1:
            torch.manual_seed(derived_seed(self.seed, self.stage_index, step, self.ranks.rank))

    def sum_gradients(self, parameters: Mapping[str, nn.Parameter], sums: Tensor) -> tuple[float, float]:
        """Replaces the gradients by their sums over all ranks. Returns the total loss and correct tokens.

        sums: (2,), this rank's loss and correct tokens. A request to stop travels with them.
        """
        stop = self.ranks.size > 1 and self.stop_requested()
        step = self.ranks.sum_gradients(list(parameters.values()), sums, stop=stop)
        self._stop_agreed = step.stop
        loss, correct = step.sums
        return loss, correct

    def sum(self, sums: Tensor) -> tuple[float, float]:
        """Returns the total loss and correct tokens of all ranks."""
        loss, correct = self.ranks.sum(sums)
        return loss, correct

    def from_first(self, measure: Callable[[], float | None]) -> float | None:
        """Returns what `measure` returns on rank 0, which alone calls it."""
        if not self.ranks.is_first:
            received: float | None = self.ranks.receive()
            return received
        value = measure()
        self.ranks.send(value)
        return value

    def should_stop(self) -> bool:
        """Returns True on all ranks after the same step: the first whose gradients come after a request."""
        return self.stop_requested() if self.ranks.size == 1 else self._stop_agreed

    def check_same(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises TrainingError (ranks_differ) unless every rank has the same parameters, bit for bit."""
        if self.ranks.size > 1:
            self.ranks.check_same("the trained parameters", fingerprint(parameters))
