"""What is compared: which rows each run of each arm got right, or how right. It does NOT know where that comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heft_engine.evaluation.row_values import Correctness, GradedValues


@dataclass(frozen=True, kw_only=True, eq=False)
class RowValues:
    """One run: its seed, and row by row whether it was right, or by how much (0 to 1) where its metric is graded.

    `rows_sha256` says which rows, in which order.
    """

    seed: int
    right: Correctness | GradedValues
    rows_sha256: str = ""

    @property
    def is_graded(self) -> bool:
        return self.right.dtype != np.bool_

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """A method as it was run: the seeds that were asked for, and the outcomes there are (a run may have failed).

    Where methods are run on several tasks, each with each is an arm, `method` on `task`.
    """

    name: str
    seeds: Sequence[int]
    outcomes: Sequence[RowValues]
    task: str | None = None
    method: str | None = None

    @property
    def by_seed(self) -> dict[int, RowValues]:
        return {outcome.seed: outcome for outcome in self.outcomes}

    @property
    def missing(self) -> list[int]:
        """Seeds that were asked for and have no outcome."""
        return [seed for seed in self.seeds if seed not in self.by_seed]


def paired(a: Arm, b: Arm) -> tuple[list[int], NDArray[np.float64] | None]:
    """The seeds that both arms have, and a's rows minus b's, (seeds, rows); None if no seed is shared.

    Of right and wrong they are -1, 0 and 1. Raises ValueError where the two were measured on different rows: nothing is
    paired then.
    """
    ours, theirs = a.by_seed, b.by_seed
    shared = [seed for seed in a.seeds if seed in ours and seed in theirs]
    if not shared:
        return [], None
    pairs = [(ours[seed], theirs[seed]) for seed in shared]
    kinds = {(one.rows_sha256, len(one.right)) for pair in pairs for one in pair}
    if len(kinds) > 1:
        raise ValueError("measured on different rows")
    return shared, np.stack([one.right.astype(float) - other.right.astype(float) for one, other in pairs])
