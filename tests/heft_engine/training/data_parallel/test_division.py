"""Rows among ranks: each row once, about as many tokens for each rank."""

from __future__ import annotations

import random

import pytest

from heft_engine.training.data_parallel.division import Division, balanced

RNG = random.Random(0)
LENGTHS = [RNG.randint(5, 400) for _ in range(200)]
STEP = RNG.sample(range(200), 32)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_every_row_of_a_step_has_one_rank_that_holds_it(ranks: int, fixed: bool) -> None:
    division = Division(LENGTHS, ranks, fixed)
    shares = division.of(STEP)
    assert len(shares) == ranks
    assert sorted(row for share in shares for row in share) == sorted(STEP)
    for rank, share in enumerate(shares):
        assert set(share) <= set(division.held(rank))
        assert share == [row for row in STEP if row in set(share)] or not fixed


def test_a_step_is_balanced_by_tokens_unless_rows_stay_with_their_rank() -> None:
    def tokens(fixed: bool) -> list[int]:
        return [sum(LENGTHS[row] for row in share) for share in Division(LENGTHS, 4, fixed).of(STEP)]

    assert max(tokens(False)) < 1.05 * sum(tokens(False)) / 4
    assert max(tokens(True)) > max(tokens(False))


def test_rows_that_stay_with_a_rank_are_balanced_over_the_whole_stage() -> None:
    division = Division(LENGTHS, 8, True)
    held = [division.held(rank) for rank in range(8)]
    assert sorted(row for rows in held for row in rows) == list(range(200))
    totals = [sum(LENGTHS[row] for row in rows) for rows in held]
    assert max(totals) < 1.05 * sum(totals) / 8
    assert [len(division.of(range(200))[rank]) for rank in range(8)] == list(map(len, held))


def test_one_rank_runs_a_step_in_its_order() -> None:
    assert Division(LENGTHS, 1, False).of(STEP) == [STEP]
    assert Division(LENGTHS, 1, True).held(0) == list(range(200))


def test_more_shares_than_weights_leave_empty_ones_and_the_first_has_the_heaviest() -> None:
    assert balanced([3, 9, 5], 5) == [[1], [2], [0], [], []]
