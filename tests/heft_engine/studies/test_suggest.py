"""Suggested points: within the space, unique, reproducible, and better than random ones."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from heft_engine.config.search_space import Range, draw, point_key, size
from heft_engine.studies.suggest import Search, Trial, suggest

RATE = Range(low=1e-5, high=1e-1, log=True)
SPACE: dict[str, Any] = {"rank": [2, 4, 8], "rate": RATE, "layers": [[1, 2], "auto", None]}


def quality(point: dict[str, Any]) -> float:
    """A score that is best at rank 4, layers 1 and 2, and a rate of 1e-3."""
    return (point["rank"] == 4) + (point["layers"] == [1, 2]) - abs(math.log10(point["rate"]) + 3)


def searched(search: Search, *, at_a_time: int = 1) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < search.budget:
        for point in suggest(search, trials, at_a_time):
            trials.append(Trial(point=point, state="complete", value=quality(point)))
    return trials


def test_points_lie_in_the_space_and_are_never_the_same() -> None:
    whole = {"a": Range(low=1, high=4), "b": Range(low=1, high=1_000, log=True), "c": Range(low=0.0, high=1)}
    for search in (
        Search(space=SPACE | whole, budget=12),
        Search(space=SPACE | whole, budget=12, sampler="random"),
    ):
        points = [trial.point for trial in searched(search)]
        assert len({point_key(point) for point in points}) == 12
        for point in points:
            assert list(point) == list(search.space)
            assert point["a"] in (1, 2, 3, 4)
            assert isinstance(point["b"], int)
            assert 1 <= point["b"] <= 1_000
            assert 0 <= point["c"] <= 1


def test_the_same_past_gives_the_same_points_and_another_seed_others() -> None:
    past = searched(Search(space=SPACE, budget=12))
    for sampler in ("tpe", "random"):
        search = Search(space=SPACE, budget=40, sampler=sampler, seed=3)
        assert suggest(search, past, 3) == suggest(search, list(past), 3)
        assert suggest(search, past, 3)[:1] == suggest(search, past, 1)
        other = Search(space=SPACE, budget=40, sampler=sampler, seed=4)
        assert suggest(search, past, 3) != suggest(other, past, 3)


def test_a_space_that_has_been_tried_through_gives_no_more() -> None:
    space = {"rank": [2, 4, 8], "wide": [True, 1]}
    search = Search(space=space, budget=50)
    points = suggest(search, [], 50)
    assert len(points) == size(space) == 6
    tried = [Trial(point=point, state="failed") for point in points]
    assert suggest(search, tried, 1) == []
    assert suggest(search, tried[1:], 1) == [points[0]]


def test_the_planted_best_is_found() -> None:
    trials = searched(Search(space=SPACE, budget=40), at_a_time=2)
    best = max(trials, key=lambda trial: quality(trial.point)).point
    assert (best["rank"], best["layers"]) == (4, [1, 2])
    assert 3e-4 < best["rate"] < 3e-3
    late = [quality(trial.point) for trial in trials[20:]]
    at_random = [quality(draw(SPACE, Random(number))) for number in range(200)]
    assert sum(late) / len(late) > sum(at_random) / len(at_random) + 0.5


def test_failed_and_pruned_trials_do_not_mislead_the_sampler() -> None:
    past = searched(Search(space=SPACE, budget=12))
    bad = [Trial(point=past[0].point | {"rate": 0.05 + i / 100}, state="failed") for i in range(3)]
    pruned = [Trial(point=past[0].point | {"rate": 0.01 + i / 1000}, state="pruned") for i in range(3)]
    points = suggest(Search(space=SPACE, budget=40), [*past, *bad, *pruned], 4)
    assert len({point_key(point) for point in points}) == 4


def test_a_range_of_two_neighbouring_numbers_comes_to_its_end() -> None:
    """Its size counts as infinite, as for every range of floats."""
    low = 1e-3
    space = {"rate": Range(low=low, high=math.nextafter(low, 1))}
    tried = [
        Trial(point={"rate": rate}, state="complete", value=0.5) for rate in (low, math.nextafter(low, 1))
    ]
    assert size(space) == math.inf
    assert suggest(Search(space=space, budget=5, sampler="random"), tried, 1) == []
