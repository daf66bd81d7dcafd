"""One plain sentence for each comparison, claiming what its numbers do and no more. It does NOT compute them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heft_engine.studies.arms import Arm
from heft_engine.studies.mcnemar import ModelComparison
from heft_engine.studies.over_tasks import TaskComparison
from heft_engine.studies.paired_seeds import MethodComparison

#: Differences under this many points are shown as none.
_SMALLEST = 0.05


@dataclass(frozen=True, kw_only=True)
class Judged:
    """p after Holm's correction, over how many comparisons, and what was concluded."""

    p_adjusted: float
    family: int
    separable: bool
    alpha: float  #: what a single one of the family must stay under, at worst


@dataclass(frozen=True, kw_only=True)
class Needed:
    """What would tell a difference of the size seen apart; None: nothing would."""

    seeds: int | None
    rows: int | None


def of_methods(a: Arm, b: Arm, found: MethodComparison, judged: Judged, needed: Needed) -> str:
    told = _difference(a.name, b.name, found.difference, found.interval_95)
    seeds = f"{found.seeds} seeds{_missing(a, b)}"
    if judged.separable:
        return f"{told}: separable with {seeds} ({_p(judged)})."
    return f"{told}: not separable with {seeds}{_but(found.interval_95, judged)}; {_needed(found, needed)}."


def of_models(a: Arm, b: Arm, seed: int, found: ModelComparison, judged: Judged) -> str:
    names = f"the model of {a.name}", f"that of {b.name}"
    told = _difference(*names, found.difference, found.interval_95)
    verdict = "separable" if judged.separable else "not separable"
    why = f"With one seed in common{_missing(a, b)} only models can be compared, not methods"
    return f"{why}: with seed {seed} {told}: {verdict} on {found.rows:,} rows ({_p(judged)}, {found.test})."


def of_nothing(a: Arm, b: Arm) -> str:
    return f"{a.name} and {b.name} have no seed in common{_missing(a, b)}: nothing can be compared."


def of_other_rows(a: Arm, b: Arm) -> str:
    return f"{a.name} and {b.name} were measured on different rows: nothing can be compared."


def over_tasks(a: str, b: str, found: TaskComparison, judged: Judged) -> str:
    told = _difference(a, b, found.difference, found.interval_95)
    tasks = f"{found.tasks} tasks"
    if judged.separable:
        return f"On average over these {tasks}, {told}: separable with {tasks} ({_p(judged)})."
    return (
        f"On average over these {tasks}, {told}: not separable with {tasks}{_but(found.interval_95, judged)}."
    )


def _difference(a: str, b: str, difference: float, interval: tuple[float, float]) -> str:
    """The better one first, so that what is read is what the sign says."""
    if difference < 0:
        a, b, difference, interval = b, a, -difference, (-interval[1], -interval[0])
    between = f"95 % interval {points(interval[0])} to {points(interval[1])}"
    if 100 * difference < _SMALLEST:
        return f"{a} and {b} differ by less than 0.1 points, {between}"
    return f"{a} is {points(difference)} points above {b}, {between}"


def points(share: float) -> str:
    """A share as percentage points with one decimal; no minus before a zero."""
    text = f"{abs(100 * share):.1f}"
    return f"−{text}" if share < 0 and float(text) else text


def _missing(a: Arm, b: Arm) -> str:
    parts = [f"{arm.name} lacks {_seeds(arm.missing)}" for arm in (a, b) if arm.missing]
    return f" ({'; '.join(parts)})" if parts else ""


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _p(judged: Judged) -> str:
    p = "p < 0.001" if judged.p_adjusted < 0.001 else f"p = {judged.p_adjusted:.3f}"
    return f"{p} after Holm's correction over {judged.family} comparisons" if judged.family > 1 else p


def _but(interval: tuple[float, float], judged: Judged) -> str:
    """Why an interval without zero is not enough."""
    if judged.family > 1 and not interval[0] <= 0 <= interval[1]:
        return f" once {judged.family} comparisons are corrected for"
    return ""


def _needed(found: MethodComparison, needed: Needed) -> str:
    if abs(100 * found.difference) < _SMALLEST:
        return "there is no difference to look for"
    if needed.seeds is not None:
        # The judgement at hand may fall short by chance where the estimate says that it should not.
        return f"about {max(needed.seeds, found.seeds + 1)} would be needed"
    more = "far more" if needed.rows is None else f"about {_rounded(needed.rows):,}"
    return f"no number of seeds would be enough on {found.rows:,} test rows, {more} would be needed"


def _rounded(rows: int) -> int:
    """Two digits: it is an estimate."""
    scale: int = 10 ** max(0, len(str(rows)) - 2)
    return -(-rows // scale) * scale
