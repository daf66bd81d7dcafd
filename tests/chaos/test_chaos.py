"""A small campaign with a fixed seed, in which every kind of process is killed."""

from __future__ import annotations

import pytest
from campaign import run
from faults.kills import KILLED


@pytest.mark.timeout(400)
def test_nothing_is_lost_done_twice_or_left_behind() -> None:
    result = run(kills=len(KILLED), seed=4, users=3, real_share=0.0, others=0.25, keep=None)
    assert result["violations"] == {}
    assert set(result["kills"]) == set(KILLED)
    assert result["points"], "some were killed at named points"
    assert result["jobs"]["succeeded"] > 0
    assert result["models_checked"] > 0
