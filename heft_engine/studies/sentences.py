"""One plain sentence for each comparison, claiming no more than its numbers support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heft_engine.studies.arms import Arm
from heft_engine.studies.mcnemar import ModelComparison
from heft_engine.studies.over_tasks import TaskComparison
from heft_engine.studies.paired_seeds import MethodComparison

#: Smaller differences, in percentage points, are reported as none.
_MIN_POINTS = 0.05


@dataclass(frozen=True, kw_only=True)
class Significance:
    """A p-value after Holm's correction over a family of comparisons."""

    p_adjusted: float
    family: int
    significant: bool
    alpha: float  #: the strictest level that Holm's procedure applies to a member of the family


@dataclass(frozen=True, kw_only=True)
class RequiredSize:
    """Seeds and rows needed to detect the observed difference; None if no number suffices."""

    seeds: int | None
    rows: int | None


def of_methods(a: Arm, b: Arm, result: MethodComparison, test: Significance, required: RequiredSize) -> str:
    difference = _difference(a.name, b.name, result.difference, result.interval_95)
    seeds = f"{result.seeds} seeds{_missing(a, b)}"
    if test.significant:
        return f"{difference}: significant with {seeds} ({_p(test)})."
    correction, advice = _correction(result.interval_95, test), _advice(result, required)
    return f"{difference}: not significant with {seeds}{correction}; {advice}."


def of_models(a: Arm, b: Arm, seed: int, result: ModelComparison, test: Significance) -> str:
    names = f"the model of {a.name}", f"that of {b.name}"
    difference = _difference(*names, result.difference, result.interval_95)
    verdict = "significant" if test.significant else "not significant"
    reason = f"With one common seed{_missing(a, b)} only models can be compared, not methods"
    return f"{reason}: with seed {seed} {difference}: {verdict} on {result.rows:,} rows ({_p(test)}, {result.test})."


def without_common_seed(a: Arm, b: Arm) -> str:
    return f"{a.name} and {b.name} can't be compared: they have no common seed{_missing(a, b)}."


def with_different_rows(a: Arm, b: Arm) -> str:
    return f"{a.name} and {b.name} can't be compared: they were evaluated on different rows."


def over_tasks(a: str, b: str, result: TaskComparison, test: Significance) -> str:
    difference = (
        f"On average over {result.tasks} tasks, {_difference(a, b, result.difference, result.interval_95)}"
    )
    if test.significant:
        return f"{difference}: significant ({_p(test)})."
    return f"{difference}: not significant{_correction(result.interval_95, test)}."


def _difference(a: str, b: str, difference: float, interval: tuple[float, float]) -> str:
    """Names the better one first, so that the difference is positive."""
    if difference < 0:
        a, b, difference, interval = b, a, -difference, (-interval[1], -interval[0])
    interval_95 = f"95 % confidence interval {points(interval[0])} to {points(interval[1])}"
    if 100 * difference < _MIN_POINTS:
        return f"{a} and {b} differ by less than 0.1 points ({interval_95})"
    return f"{a} is {points(difference)} points above {b} ({interval_95})"


def points(share: float) -> str:
    """A share as percentage points with one decimal, and without a minus sign before zero."""
    text = f"{abs(100 * share):.1f}"
    return f"−{text}" if share < 0 and float(text) else text


def _missing(a: Arm, b: Arm) -> str:
    parts = [f"{arm.name} lacks {_seeds(arm.missing_seeds)}" for arm in (a, b) if arm.missing_seeds]
    return f" ({'; '.join(parts)})" if parts else ""


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _p(test: Significance) -> str:
    p = "p < 0.001" if test.p_adjusted < 0.001 else f"p = {test.p_adjusted:.3f}"
    return f"{p}, Holm-corrected for {test.family} comparisons" if test.family > 1 else p


def _correction(interval: tuple[float, float], test: Significance) -> str:
    """Explains why a difference is not significant although its interval excludes zero."""
    if test.family > 1 and not interval[0] <= 0 <= interval[1]:
        return f" after Holm's correction for {test.family} comparisons"
    return ""


def _advice(result: MethodComparison, required: RequiredSize) -> str:
    if abs(100 * result.difference) < _MIN_POINTS:
        return "there is no difference to detect"
    if required.seeds is not None:
        # The estimate can be met already, and the test have missed the difference by chance.
        return f"about {max(required.seeds, result.seeds + 1)} seeds would be needed"
    rows = "far more" if required.rows is None else f"about {_rounded_up(required.rows):,}"
    return f"no number of seeds would suffice with {result.rows:,} test rows, {rows} would be needed"


def _rounded_up(rows: int) -> int:
    """Rounds up to two significant digits."""
    scale: int = 10 ** max(0, len(str(rows)) - 2)
    return -(-rows // scale) * scale
