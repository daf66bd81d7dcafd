"""Results of stages: each owner's own, by key, as long as they are used and fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from store.errors import LostFence, Unavailable
from store.jobs import endings, stage_results
from store.jobs.fence import Claim
from store.storage import garbage
from store.storage.artifacts import Artifacts

OWNER = "team"
SHA = "0" * 64
BOOM = {"code": "x", "message": "m", "param": None}


@pytest.fixture
def artifacts(artifacts_url: str) -> Artifacts:
    return Artifacts(artifacts_url)


def add(bench, claim: Claim, key: str, *, size: int = 10, unused_days: float = 0.0) -> str:
    """A result of this attempt that was last used so many days ago; its storage key."""
    storage_key = f"jobs/{claim.job_id}/{claim.attempt}/result-{key}"
    values = {"key": key, "storage_key": storage_key, "manifest": {"state.json": SHA}, "size": size}
    bench.do(stage_results.add, claim, **values)
    used = "last_used_at = now() - :days * interval '1 day'"
    bench.sql(f"UPDATE stage_results SET {used} WHERE storage_key = :id", days=unused_days, id=storage_key)
    return storage_key


def found(bench, *keys: str, owner_id: str = OWNER) -> list[str]:
    return [row.storage_key for row in bench.do(stage_results.find, owner_id=owner_id, keys=keys)]


def standing(bench) -> set[str]:
    """The keys that have not been given up."""
    return {row.key for row in bench.sql("SELECT key FROM stage_results WHERE removed_at IS NULL")}


def test_found_by_their_owner_alone_up_to_the_first_that_is_missing(bench) -> None:
    claim = bench.running()
    a, b, _ = (add(bench, claim, key) for key in ("a", "b", "d"))
    assert found(bench, "a", "b", "c", "d") == [a, b]
    assert found(bench, "b", "a") == [b, a]
    assert found(bench, "x", "a") == []
    assert found(bench) == []
    assert found(bench, "a", owner_id="stranger") == []


def test_a_new_one_stands_in_place_of_an_older_of_the_same_owner(bench) -> None:
    old, new = (add(bench, bench.running(), "a") for _ in range(2))
    assert old != new
    assert found(bench, "a") == [new]
    bench.do(stage_results.remove, storage_key=new)
    assert found(bench, "a") == []


def test_an_attempt_that_is_over_adds_nothing(bench) -> None:
    claim = bench.running()
    bench.do(endings.finish_failed, claim, error=BOOM)
    with pytest.raises(LostFence):
        add(bench, claim, "a")
    assert found(bench, "a") == []


def test_what_is_not_used_is_given_up_and_use_makes_it_young(bench) -> None:
    claim = bench.running()
    for key, days in (("a", 29.9), ("b", 30.1), ("c", 45)):
        add(bench, claim, key, unused_days=days)
    found(bench, "c")
    bench.do(stage_results.expire, days=30, max_bytes=1_000)
    assert standing(bench) == {"a", "c"}
    bench.do(stage_results.expire, days=0, max_bytes=1_000)
    assert standing(bench) == set()


def test_beyond_the_budget_what_was_used_least_recently_is_given_up(bench) -> None:
    claim = bench.running()
    for age, key in enumerate("abcd"):
        add(bench, claim, key, size=100, unused_days=age)
    bench.do(stage_results.expire, days=30, max_bytes=300)
    assert standing(bench) == {"a", "b", "c"}
    found(bench, "c")
    bench.do(stage_results.expire, days=30, max_bytes=299)
    assert standing(bench) == {"a", "c"}


def test_bytes_go_first_and_then_the_row(
    bench, artifacts: Artifacts, artifacts_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = bench.running()
    gone, stays = add(bench, claim, "a"), add(bench, claim, "b")
    for key in (gone, stays):
        artifacts.put_stream(f"{key}/state.json", [b"x"])
    bench.do(stage_results.remove, storage_key=gone)

    def away(_prefix: str) -> None:
        raise Unavailable("the artifact storage does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(artifacts, "delete", away)
        with pytest.raises(Unavailable):
            garbage.collect(bench.factory, artifacts)
    assert len(bench.sql("SELECT * FROM stage_results")) == 2
    garbage.collect(bench.factory, artifacts)
    assert [row.storage_key for row in bench.sql("SELECT storage_key FROM stage_results")] == [stays]
    root = Path(artifacts_url.removeprefix("file://"))
    assert [path.relative_to(root).as_posix() for path in root.rglob("*.json")] == [f"{stays}/state.json"]


def test_the_end_of_an_attempt_takes_what_has_no_row_and_leaves_the_rest(bench, artifacts: Artifacts) -> None:
    claim = bench.running()
    named = add(bench, claim, "a")
    unnamed = f"jobs/{claim.job_id}/{claim.attempt}/result-b"
    for key in (named, unnamed):
        artifacts.put_stream(f"{key}/state.json", [b"x"])
    bench.do(endings.finish_failed, claim, error=BOOM)
    garbage.collect(bench.factory, artifacts, quiet_seconds=0)
    assert artifacts.children(named) == ["state.json"]
    assert artifacts.children(unnamed) == []
