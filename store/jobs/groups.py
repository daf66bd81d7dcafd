"""Groups of workers that train one job together.

The worker that has claimed a job opens a group for its attempt, and is machine 0 of it. Others join, each as a machine
of its own, until the group is full. It starts when all of them have the rows; nobody joins any more. The job has one
lease, its claim's. A member has a lease on its place, which machine 0 watches, and writes nothing to the job.

Members join the group that was opened first, and a group that is not full gives way to one opened before it. So workers
that have claimed two jobs at a time don't wait for each other.

A group has a secret, made for this attempt, by which the processes of its machines admit each other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import ColumnElement, ScalarSelect, and_, delete, exists, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from heft_engine.errors import RankLost
from store.db.session import seconds
from store.db.states import JobState
from store.db.tables import Group, GroupMember, Job
from store.errors import LostFence
from store.jobs.fence import Claim, lock
from store.jobs.spec import TrainingSpec

log = logging.getLogger(__name__)

#: Longest time from a member's joining until it has its rows and the model to go on from: 18 GB at 10 MB/s. One that
#: takes longer, as a worker of a version that never says that it is ready, would make the others wait for ever.
READY_MINUTES = 30


@dataclass(frozen=True, kw_only=True)
class GroupShape:
    """Machines of a group, and processes on each: workers of equal shape train together."""

    nodes: int
    processes: int


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A worker's place in a group. `claim` is read only: the job's fence names the worker of machine 0."""

    claim: Claim
    node_rank: int
    rendezvous: str
    secret: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class MemberFailures:
    """Failures of a group's members so far.

    error: {code, message, param} of one, a cause before those that only lost a process; None: nobody has said any.
    have_all_ended: none has a lease any more, so none will say more.
    """

    error: dict[str, Any] | None
    have_all_ended: bool


#: The error of a member whose worker was asked to stop, and whose processes did not end by themselves in time.
WORKER_STOPPED = {"code": "worker_stopped", "message": "Its worker was asked to stop.", "param": None}


@dataclass(frozen=True, kw_only=True)
class GroupState:
    """A group as machine 0 sees it. free_places: of members that have not joined."""

    free_places: int
    has_started: bool


def open_group(session: Session, claim: Claim, *, shape: GroupShape, rendezvous: str, secret: str) -> None:
    """Opens a group for a claimed job. rendezvous: host:port of this machine, which listens. Raises LostFence."""
    lock(session, claim)
    values = {
        "job_id": claim.job_id,
        "attempt": claim.attempt,
        "nodes": shape.nodes,
        "processes": shape.processes,
        "rendezvous": rendezvous,
        "secret": secret,
    }
    # This call may be repeated, when the answer to the first COMMIT was lost.
    session.execute(insert(Group).values(values).on_conflict_do_nothing())


def start_when_ready(session: Session, claim: Claim) -> GroupState:
    """Starts the group of a claimed job if it is full and all members are ready. Raises LostFence."""
    lock(session, claim)
    group = session.scalars(select(Group).where(_is_group_of(claim)).with_for_update()).one()
    if group.started_at is not None:
        # This call is repeated: the answer to the first COMMIT was lost.
        return GroupState(free_places=0, has_started=True)
    _remove_expired(session, group)
    _remove_late(session, group)
    ready_at = session.scalars(select(GroupMember.ready_at).where(*_members_of(group))).all()
    free_places = group.nodes - 1 - len(ready_at)
    has_started = free_places == 0 and None not in ready_at
    if has_started:
        # Nobody joins any more, and machine 0 and the members know the secret.
        session.execute(update(Group).where(_is_group_of(claim)).values(started_at=func.now(), secret=None))
    return GroupState(free_places=free_places, has_started=has_started)


def gives_way(session: Session, claim: Claim) -> bool:
    """Returns True if a group of the same shape, opened before this claim's, still lacks members."""
    group = session.scalars(select(Group).where(_is_group_of(claim))).one()
    query = (
        select(Group.job_id)
        .join(Job, Job.id == Group.job_id)
        .where(_is_open(group.nodes, group.processes), _n_members() < Group.nodes - 1)
    )
    earlier = or_(
        Group.opened_at < group.opened_at,
        and_(Group.opened_at == group.opened_at, Group.job_id < group.job_id),
    )
    return session.scalar(query.where(earlier).limit(1)) is not None


def join(session: Session, *, worker_id: str, shape: GroupShape, lease_seconds: float) -> Membership | None:
    """Takes a place in the group of this shape that was opened first; None when no group lacks members."""
    n_others = _n_members(GroupMember.worker_id != worker_id)
    query = (
        select(Group, Job)
        .join(Job, Job.id == Group.job_id)
        .where(_is_open(shape.nodes, shape.processes), n_others < Group.nodes - 1)
        .order_by(Group.opened_at, Group.job_id)
        .limit(1)
        .with_for_update(of=Group)
    )
    row = session.execute(query).first()
    if row is None:
        return None
    group, job = row
    # Of an earlier process of this worker, which is dead.
    of_group = and_(GroupMember.job_id == group.job_id, GroupMember.attempt == group.attempt)
    session.execute(delete(GroupMember).where(of_group, GroupMember.worker_id == worker_id))
    _remove_expired(session, group)
    free = sorted(set(range(1, group.nodes)) - _taken(session, group))
    if not free:
        return None  # another worker was faster; the next hint brings this one back
    session.add(
        GroupMember(
            job_id=group.job_id,
            attempt=group.attempt,
            node_rank=free[0],
            worker_id=worker_id,
            lease_until=func.now() + seconds(lease_seconds),
        )
    )
    session.flush()
    claim = _claim_of_member(job, worker_id, lease_seconds)
    return Membership(
        claim=claim, node_rank=free[0], rendezvous=group.rendezvous, secret=cast(str, group.secret)
    )


def _claim_of_member(job: Job, worker_id: str, lease_seconds: float) -> Claim:
    return Claim(
        job_id=job.id,
        owner_id=job.owner_id,
        worker_id=worker_id,
        purpose="train",
        attempt=job.attempt,
        lease_seconds=lease_seconds,
        spec=TrainingSpec.model_validate(job.spec),
        checkpoints=(),
        validation=job.validation,
    )


def set_ready(session: Session, membership: Membership) -> None:
    """Says that a member has all that it needs to train. Raises LostFence if its place is no longer its own."""
    statement = (
        update(GroupMember)
        .where(_is_place_of(membership))
        .values(ready_at=func.now())
        .returning(GroupMember.node_rank)
    )
    if session.scalar(statement) is None:
        raise LostFence(
            f"place {membership.node_rank} of {membership.claim.job_id} was given to another worker"
        )


def renew(session: Session, membership: Membership) -> bool:
    """Renews a member's lease. Returns whether the group has started. Raises LostFence once the attempt is over."""
    claim = membership.claim
    is_current = exists().where(
        Job.id == GroupMember.job_id, Job.attempt == GroupMember.attempt, Job.state == JobState.RUNNING
    )
    statement = (
        update(GroupMember)
        .where(_is_place_of(membership), is_current)
        .values(lease_until=func.now() + seconds(claim.lease_seconds))
        .returning(GroupMember.node_rank)
    )
    if session.scalar(statement) is None:
        raise LostFence(f"the group of attempt {claim.attempt} of {claim.job_id} is over")
    return session.scalar(select(Group.started_at).where(_is_group_of(claim))) is not None


def is_training(session: Session, membership: Membership) -> bool:
    """Returns whether a member's group has started and its attempt still runs. Locks the group, so that it stays so."""
    is_current = and_(Job.attempt == Group.attempt, Job.state == JobState.RUNNING)
    group = select(Group).join(Job, Job.id == Group.job_id).where(_is_group_of(membership.claim), is_current)
    row = session.scalars(group.with_for_update(of=Group)).one_or_none()
    return row is not None and row.started_at is not None


def leave(session: Session, membership: Membership) -> None:
    """Gives up a member's place."""
    session.execute(delete(GroupMember).where(_is_place_of(membership)))


def fail(session: Session, membership: Membership, *, error: Mapping[str, Any] | None) -> None:
    """Ends the lease of a member whose processes have failed, so that machine 0 notices. error: what they said."""
    values = {"lease_until": func.now() - seconds(1), "error": None if error is None else dict(error)}
    session.execute(update(GroupMember).where(_is_place_of(membership)).values(values))


def member_failures(session: Session, claim: Claim) -> MemberFailures:
    """Returns what members of a claimed job's group have failed with."""
    is_member = and_(GroupMember.job_id == claim.job_id, GroupMember.attempt == claim.attempt)
    query = select(GroupMember.error).where(is_member, GroupMember.error.is_not(None))
    is_consequence = GroupMember.error["code"].as_string() == RankLost.code
    error = session.scalar(query.order_by(is_consequence, GroupMember.node_rank).limit(1))
    alive = select(GroupMember.node_rank).where(is_member, GroupMember.lease_until >= func.now())
    return MemberFailures(error=error, have_all_ended=session.scalar(alive.limit(1)) is None)


def has_lost_member(session: Session, claim: Claim) -> bool:
    """Returns True if a member of a group that has started has not renewed its lease."""
    query = select(GroupMember.node_rank).join(
        Group, and_(Group.job_id == GroupMember.job_id, Group.attempt == GroupMember.attempt)
    )
    is_lost = and_(Group.started_at.is_not(None), GroupMember.lease_until < func.now())
    return session.scalar(query.where(_is_group_of(claim), is_lost).limit(1)) is not None


def _is_group_of(claim: Claim) -> ColumnElement[bool]:
    return and_(Group.job_id == claim.job_id, Group.attempt == claim.attempt)


def _is_place_of(membership: Membership) -> ColumnElement[bool]:
    return and_(
        GroupMember.job_id == membership.claim.job_id,
        GroupMember.attempt == membership.claim.attempt,
        GroupMember.node_rank == membership.node_rank,
        GroupMember.worker_id == membership.claim.worker_id,
    )


def _is_open(nodes: int, processes: int) -> ColumnElement[bool]:
    """Returns the condition under which a group of this shape has not started; of a row of Group and its Job."""
    return and_(
        Group.secret.is_not(None),  # a group that an older version has opened admits nobody
        Group.nodes == nodes,
        Group.processes == processes,
        Group.started_at.is_(None),
        Group.attempt == Job.attempt,
        Job.state == JobState.RUNNING,
        Job.lease_until > func.now(),
        Job.cancel_requested_at.is_(None),
        Job.pause_requested_at.is_(None),
    )


def _n_members(*conditions: ColumnElement[bool]) -> ScalarSelect[int]:
    """Returns how many places of a row of Group are taken, by members that fulfil the conditions."""
    is_taken = and_(
        GroupMember.job_id == Group.job_id,
        GroupMember.attempt == Group.attempt,
        GroupMember.lease_until >= func.now(),
    )
    return select(func.count()).where(is_taken, *conditions).scalar_subquery()


def _remove_expired(session: Session, group: Group) -> None:
    expired = and_(*_members_of(group), GroupMember.lease_until < func.now())
    session.execute(delete(GroupMember).where(expired))


def _remove_late(session: Session, group: Group) -> None:
    """Removes the members that are not ready so long after they have joined. Their next renewal raises LostFence."""
    is_late = and_(
        *_members_of(group),
        GroupMember.ready_at.is_(None),
        GroupMember.joined_at < func.now() - seconds(60 * READY_MINUTES),
    )
    for worker_id in session.scalars(delete(GroupMember).where(is_late).returning(GroupMember.worker_id)):
        log.warning(
            "worker %s was not ready to train %s within %d minutes, and gives up its place. Has it the same version?",
            worker_id,
            group.job_id,
            READY_MINUTES,
        )


def _taken(session: Session, group: Group) -> set[int]:
    return set(session.scalars(select(GroupMember.node_rank).where(*_members_of(group))))


def _members_of(group: Group) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return GroupMember.job_id == group.job_id, GroupMember.attempt == group.attempt
