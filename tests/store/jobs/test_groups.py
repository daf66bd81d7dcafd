"""Groups of workers: places are taken once, the oldest group first, and end with the attempt."""

from __future__ import annotations

from typing import Any

import pytest

from store.db.states import JobState
from store.errors import LostFence
from store.jobs import endings, groups, leases
from store.jobs.fence import Claim
from store.jobs.groups import GroupShape, MemberFailures, Membership

SHAPE = GroupShape(nodes=3, processes=2)
SECRET = "s" * 64


def opened(bench: Any, shape: GroupShape = SHAPE) -> Claim:
    claim: Claim = bench.running()
    bench.do(groups.open_group, claim, shape=shape, rendezvous="host:1", secret=SECRET)
    return claim


def free_places(bench: Any, claim: Claim) -> int:
    state = bench.do(groups.start_when_ready, claim)
    assert not state.has_started
    return int(state.free_places)


def has_started(bench: Any, claim: Claim) -> bool:
    return bool(bench.do(groups.start_when_ready, claim).has_started)


def join(bench: Any, worker_id: str, shape: GroupShape = SHAPE) -> Membership | None:
    membership: Membership | None = bench.do(
        groups.join, worker_id=worker_id, shape=shape, lease_seconds=60.0
    )
    return membership


def ready(bench: Any, worker_id: str, shape: GroupShape = SHAPE) -> Membership:
    """Joins, with all that the member needs to train."""
    membership = join(bench, worker_id, shape)
    assert membership is not None
    bench.do(groups.set_ready, membership)
    return membership


def expire(bench: Any, node_rank: int) -> None:
    statement = (
        "UPDATE group_members SET lease_until = now() - interval '1 hour' WHERE node_rank = :node_rank"
    )
    bench.sql(statement, node_rank=node_rank)


def test_members_take_the_places_until_the_group_is_full_and_ready(bench: Any) -> None:
    claim = opened(bench)
    # The answer to the first call was lost.
    bench.do(groups.open_group, claim, shape=SHAPE, rendezvous="host:2", secret="another")
    assert free_places(bench, claim) == 2
    first = ready(bench, "worker-2")
    assert (first.node_rank, first.rendezvous, first.secret) == (1, "host:1", SECRET)
    assert (first.claim.attempt, first.claim.spec) == (claim.attempt, claim.spec)
    assert SECRET not in repr(first)
    assert not bench.do(groups.renew, first), "it waits for the others"
    assert free_places(bench, claim) == 1
    second = join(bench, "worker-3")
    assert second is not None
    assert second.node_rank == 2
    assert join(bench, "worker-4") is None, "all places are taken"
    assert free_places(bench, claim) == 0, "the second fetches its rows"
    bench.do(groups.set_ready, second)
    assert has_started(bench, claim)
    assert bench.do(groups.renew, first)
    bench.do(groups.leave, second)
    assert join(bench, "worker-4") is None, "nobody joins a group that has started"


def test_a_member_that_has_lost_its_place_is_not_ready(bench: Any) -> None:
    claim = opened(bench)
    member = join(bench, "worker-2")
    assert member is not None
    expire(bench, member.node_rank)
    assert free_places(bench, claim) == 2
    with pytest.raises(LostFence):
        bench.do(groups.set_ready, member)


def test_a_member_that_never_gets_ready_loses_its_place(bench: Any) -> None:
    claim = opened(bench)
    ready(bench, "worker-2")
    late = join(bench, "worker-3")
    assert late is not None
    set_joined = "UPDATE group_members SET joined_at = now() - interval '1 minute' * :minutes"
    bench.sql(set_joined, minutes=groups.READY_MINUTES - 1)
    assert free_places(bench, claim) == 0, "it may be fetching much"
    bench.sql(set_joined, minutes=groups.READY_MINUTES + 1)
    assert free_places(bench, claim) == 1, "the one that is ready may wait"
    with pytest.raises(LostFence):
        bench.do(groups.renew, late)
    ready(bench, "worker-4")
    assert has_started(bench, claim)


def test_the_secret_is_forgotten_when_the_group_has_started(bench: Any) -> None:
    claim = opened(bench)
    members = [ready(bench, worker) for worker in ("worker-2", "worker-3")]
    assert bench.sql("SELECT secret FROM groups") == [(SECRET,)]
    assert has_started(bench, claim)
    assert bench.sql("SELECT secret FROM groups") == [(None,)]
    assert has_started(bench, claim), "a repeated call needs it no more"
    assert all(bench.do(groups.renew, member) for member in members)


def test_a_group_of_an_older_version_which_has_no_secret_admits_nobody(bench: Any) -> None:
    opened(bench)
    bench.sql("UPDATE groups SET secret = NULL")
    assert join(bench, "worker-2") is None


def test_a_full_group_whose_members_are_not_ready_makes_no_other_give_way(bench: Any) -> None:
    older, younger = opened(bench), opened(bench)
    assert bench.do(groups.gives_way, younger)
    for worker in ("worker-2", "worker-3"):
        join(bench, worker)
    assert free_places(bench, older) == 0
    assert not bench.do(groups.gives_way, younger)


def test_a_start_whose_answer_was_lost_is_repeated_after_a_member_has_gone(bench: Any) -> None:
    claim = opened(bench)
    for worker in ("worker-2", "worker-3"):
        ready(bench, worker)
    assert has_started(bench, claim)
    expire(bench, 1)
    assert has_started(bench, claim)
    assert bench.do(groups.has_lost_member, claim), "which is how the loss is noticed"


def test_a_worker_that_was_restarted_takes_its_own_place_again(bench: Any) -> None:
    claim = opened(bench)
    assert join(bench, "worker-2") is not None
    again = join(bench, "worker-2")
    assert again is not None
    assert again.node_rank == 1
    assert free_places(bench, claim) == 1


def test_the_cause_of_a_failure_comes_before_its_consequences(bench: Any) -> None:
    claim = opened(bench)
    members = [ready(bench, worker) for worker in ("worker-2", "worker-3")]
    assert has_started(bench, claim)
    for member, code in zip(members, ("rank_lost", "out_of_memory"), strict=True):
        assert bench.do(groups.is_training, member)
        assert not bench.do(groups.member_failures, claim).have_all_ended
        bench.do(groups.fail, member, error={"code": code, "message": "m", "param": None})
    failures = bench.do(groups.member_failures, claim)
    assert failures.error["code"] == "out_of_memory"
    assert failures.have_all_ended
    bench.succeed(claim)
    assert not bench.do(groups.is_training, members[0]), "nobody asks why a member of an ended attempt ended"


@pytest.mark.parametrize("shape", [GroupShape(nodes=2, processes=2), GroupShape(nodes=3, processes=1)])
def test_workers_of_another_shape_do_not_join(bench: Any, shape: GroupShape) -> None:
    opened(bench)
    assert join(bench, "worker-2", shape) is None


def test_a_place_that_was_left_or_has_expired_is_free_again(bench: Any) -> None:
    claim = opened(bench)
    first, second = join(bench, "worker-2"), join(bench, "worker-3")
    assert first is not None
    assert second is not None
    bench.do(groups.leave, first)
    expire(bench, second.node_rank)
    assert free_places(bench, claim) == 2
    with pytest.raises(LostFence):
        bench.do(groups.renew, second)
    third = join(bench, "worker-4")
    assert third is not None
    assert third.node_rank == 1


def test_the_oldest_group_comes_first_and_the_others_give_way(bench: Any) -> None:
    older, younger = opened(bench), opened(bench)
    assert bench.do(groups.gives_way, younger)
    assert not bench.do(groups.gives_way, older)
    joined = [ready(bench, f"worker-{number}") for number in (2, 3, 4)]
    assert [member.claim.job_id for member in joined] == [older.job_id] * 2 + [younger.job_id]
    assert has_started(bench, older)
    assert not bench.do(groups.gives_way, younger), "the older one has started"


def test_a_group_ends_with_its_attempt(bench: Any) -> None:
    claim = opened(bench)
    member = join(bench, "worker-2")
    assert member is not None
    bench.do(endings.release, claim)
    assert bench.get(claim.job_id).state == JobState.QUEUED
    with pytest.raises(LostFence):
        bench.do(groups.renew, member)
    assert join(bench, "worker-3") is None
    with pytest.raises(LostFence):
        bench.do(groups.start_when_ready, claim)


def test_a_group_whose_worker_is_lost_or_whose_job_is_cancelled_is_not_joined(bench: Any) -> None:
    claim = opened(bench)
    bench.expire(claim.job_id)
    assert join(bench, "worker-2") is None
    cancelled = opened(bench)
    bench.sql("UPDATE jobs SET cancel_requested_at = now() WHERE id = :id", id=cancelled.job_id)
    assert join(bench, "worker-2") is None


@pytest.mark.parametrize("how", ["expired", "failed", "left"])
def test_a_lost_member_of_a_started_group_is_noticed(bench: Any, how: str) -> None:
    claim = opened(bench, GroupShape(nodes=2, processes=2))
    member = ready(bench, "worker-2", GroupShape(nodes=2, processes=2))
    assert has_started(bench, claim)
    assert not bench.do(groups.has_lost_member, claim)
    error = {"code": "model_not_found", "message": "no", "param": "model"}
    match how:
        case "expired":
            expire(bench, 1)
        case "failed":
            bench.do(groups.fail, member, error=error)
        case "left":
            bench.do(groups.leave, member)
    assert bench.do(groups.has_lost_member, claim) == (how != "left")
    failures = bench.do(groups.member_failures, claim)
    assert failures == MemberFailures(error=error if how == "failed" else None, have_all_ended=True)


def test_a_member_can_not_write_to_the_job(bench: Any) -> None:
    opened(bench)
    member = join(bench, "worker-2")
    assert member is not None
    with pytest.raises(LostFence):
        bench.do(leases.heartbeat, member.claim)
