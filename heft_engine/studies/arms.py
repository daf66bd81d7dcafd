"""Arms of a study: the value of every test row, for each seed of a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heft_engine.evaluation.row_values import Correctness, GradedValues


@dataclass(frozen=True, kw_only=True, eq=False)
class RowValues:
    """The values of a run's test rows: right or wrong, or a graded metric from 0 to 1.

    `rows_sha256` identifies the rows and their order.
    """

    seed: int
    values: Correctness | GradedValues
    rows_sha256: str = ""

    @property
    def is_graded(self) -> bool:
        return bool(self.values.dtype != np.bool_)

    @property
    def accuracy(self) -> float:
        return float(self.values.mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """A method with its planned seeds and its runs so far; some runs may have failed.

    In a study of several tasks an arm is one `method` on one `task`.
    """

    name: str
    seeds: Sequence[int]
    runs: Sequence[RowValues]
    task: str | None = None
    method: str | None = None

    @property
    def by_seed(self) -> dict[int, RowValues]:
        return {run.seed: run for run in self.runs}

    @property
    def missing_seeds(self) -> list[int]:
        """Planned seeds without a run."""
        return [seed for seed in self.seeds if seed not in self.by_seed]


def paired_differences(a: Arm, b: Arm) -> tuple[list[int], NDArray[np.float64] | None]:
    """Returns the common seeds and a's row values minus b's, (seeds, rows); None without a common seed.

    Differences of right and wrong are -1, 0 and 1. Raises ValueError if the arms were evaluated on different rows.
    """
    runs_a, runs_b = a.by_seed, b.by_seed
    seeds = [seed for seed in a.seeds if seed in runs_a and seed in runs_b]
    if not seeds:
        return [], None
    pairs = [(runs_a[seed], runs_b[seed]) for seed in seeds]
    row_sets = {(run.rows_sha256, len(run.values)) for pair in pairs for run in pair}
    if len(row_sets) > 1:
        raise ValueError("the arms were evaluated on different rows")
    return seeds, np.stack([of_a.values.astype(float) - of_b.values.astype(float) for of_a, of_b in pairs])
