"""A small campaign with a fixed seed: every kind of process is killed, and nothing may come of it."""

from __future__ import annotations

import pytest
from campaign import run
from faults.kills import KILLED


@pytest.mark.timeout(400)
def test_nothing_is_lost_done_twice_or_left_behind() -> None:
    found = run(kills=len(KILLED), seed=4, users=3, real_share=0.0, others=0.25, keep=None)
    assert found["violations"] == {}
    assert set(found["kills"]) == set(KILLED)
    assert found["points"], "some were killed at named points"
    assert found["jobs"]["succeeded"] > 0
    assert found["models_checked"] > 0
