"""Every state against all that can be done to it, and long random lives: only allowed steps are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import exc

from store.db.states import TERMINAL, TRANSITIONS, JobState, sources
from store.db.tables import Job
from store.errors import LostFence, WrongState
from store.jobs import endings, jobs, leases, reconcile
from store.jobs.fence import Claim
from store.jobs.transitions import NewEvent, move

OWNER = "team"
DEAD = {"code": "trainer_died", "message": "The training process ended without a word.", "param": None}

V, Q, R, P = JobState.VALIDATING_FILES, JobState.QUEUED, JobState.RUNNING, JobState.PAUSED
SUCCEEDED, FAILED, CANCELLED = JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED

#: What a user may ask, and where it leads at once; nothing listed: WrongState.
ASKED: dict[str, tuple[Callable[..., Any], dict[JobState, JobState]]] = {
    "cancel": (jobs.request_cancel, {V: CANCELLED, Q: CANCELLED, R: R, P: CANCELLED}),
    "pause": (jobs.request_pause, {V: P, Q: P, R: R, P: P}),
    "resume": (jobs.resume, {P: Q}),
}


@pytest.mark.parametrize("state", sorted(JobState))
@pytest.mark.parametrize("wish", ASKED)
def test_what_a_user_asks(bench, wish: str, state: JobState) -> None:
    ask, leads_to = ASKED[wish]
    job = bench.in_state(state)
    try:
        reached = bench.do(ask, owner_id=OWNER, job_id=job.id).state
    except WrongState:
        assert state not in leads_to
        assert bench.get(job.id).state == state
    else:
        assert reached == leads_to[state] == bench.get(job.id).state


def test_the_table_of_transitions_is_closed() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert {state for state, targets in TRANSITIONS.items() if not targets} == TERMINAL
    assert sources(JobState.RUNNING) == [JobState.QUEUED]
    assert set(sources(JobState.CANCELLED)) == set(JobState) - TERMINAL


@pytest.mark.parametrize("state", sorted(JobState))
def test_a_job_moves_along_the_table_and_no_other_way(bench, state: JobState) -> None:
    for target in JobState:
        job = bench.in_state(state)
        event = NewEvent(code="RESTARTED", message="moved")
        moved = bench.do(move, Job.id == job.id, target, event)
        assert (moved is not None) == (target in TRANSITIONS[state])
        changed = bench.get(job.id)
        assert changed.state == (target if moved else state)
        assert changed.event_seq == job.event_seq + (moved is not None)
        assert (changed.finished_at is not None) == (changed.state in TERMINAL)


class Life:
    """One job and whoever holds it. Anything is tried in any state; refusals are fine, corruption is not."""

    def __init__(self, bench: Any, *, is_running: bool) -> None:
        self.bench = bench
        self.claims: list[Claim] = [bench.running()] if is_running else []
        self.job_id = self.claims[0].job_id if is_running else bench.job().id
        self.step = 0

    def claim(self, purpose: str) -> None:
        claim = self.bench.do(leases.claim, job_id=self.job_id, worker_id="w", purpose=purpose)
        if claim is not None:
            self.claims.append(claim)

    def ask(self, wish: Callable[..., Any]) -> None:
        self.bench.do(wish, owner_id=OWNER, job_id=self.job_id)

    def write(self, which: int, write: Callable[..., Any], **values: Any) -> None:
        """A write of the latest attempt, or of one that was lost long ago."""
        if self.claims:
            self.bench.do(write, self.claims[which % len(self.claims)], **values)

    def checkpoint(self, which: int) -> None:
        self.step += 1
        if self.claims:
            self.bench.checkpoint(self.claims[which % len(self.claims)], self.step)

    def succeed(self, which: int) -> None:
        if self.claims:
            self.bench.succeed(self.claims[which % len(self.claims)])

    def lose(self) -> None:
        self.bench.expire(self.job_id)
        self.bench.do(reconcile.sweep, max_lost_leases=3)


#: −1 is the latest attempt; others are stale ones.
WHICH = st.sampled_from([-1, -1, -1, -2, 0])
OPERATIONS: st.SearchStrategy[Callable[[Life], None]] = st.one_of(
    st.just(lambda life: life.claim("prepare")),
    st.just(lambda life: life.claim("train")),
    st.just(lambda life: life.ask(jobs.request_cancel)),
    st.just(lambda life: life.ask(jobs.request_pause)),
    st.just(lambda life: life.ask(jobs.resume)),
    st.just(lambda life: life.lose()),
    WHICH.map(lambda which: lambda life: life.write(which, endings.finish_prepared, report={})),
    WHICH.map(lambda which: lambda life: life.write(which, leases.heartbeat)),
    WHICH.map(lambda which: lambda life: life.write(which, endings.release)),
    WHICH.map(lambda which: lambda life: life.write(which, endings.finish_paused)),
    WHICH.map(lambda which: lambda life: life.write(which, endings.finish_failed, error=DEAD)),
    WHICH.map(lambda which: lambda life: life.write(which, endings.finish_cancelled)),
    WHICH.map(
        lambda which: lambda life: life.write(which, endings.record_crash, error=DEAD, pause_seconds=0)
    ),
    WHICH.map(lambda which: lambda life: life.checkpoint(which)),
    WHICH.map(lambda which: lambda life: life.succeed(which)),
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(st.booleans(), st.lists(OPERATIONS, min_size=5, max_size=25))
def test_a_random_life_takes_only_allowed_steps(bench, is_running, operations) -> None:
    life = Life(bench, is_running=is_running)
    before = bench.get(life.job_id)
    for operation in operations:
        try:
            operation(life)
        except (WrongState, LostFence):
            refused = bench.get(life.job_id)
            assert (refused.state, refused.attempt, refused.event_seq) == (
                before.state,
                before.attempt,
                before.event_seq,
            )
            continue
        current = bench.get(life.job_id)
        assert current.state == before.state or JobState(current.state) in TRANSITIONS[JobState(before.state)]
        assert current.attempt >= before.attempt
        if before.state in TERMINAL:
            assert current.event_seq == before.event_seq
        is_claimed = current.lease_until is not None
        assert is_claimed == (current.worker_id is not None)
        assert is_claimed or current.state != R
        before = current
    assert [event.seq for event in bench.events(life.job_id)] == list(range(1, before.event_seq + 1))
    finals = [code for code in bench.codes(life.job_id) if code in ("SUCCEEDED", "FAILED", "CANCELLED")]
    assert finals == ([before.state.upper()] if before.state in TERMINAL else [])
    models = bench.sql("SELECT 1 FROM models WHERE job_id = :id", id=life.job_id)
    assert len(models) == (before.state == SUCCEEDED)


#: One column of each kind: who holds it, what came of it, what its user wants, what it is.
CHANGES = (
    "state = 'queued'",
    "attempt = attempt + 1",
    "event_seq = event_seq + 1",
    "lease_until = now()",
    "error = '{}'",
    "evaluation = '{}'",
    "fine_tuned_model = 'ft:mine'",
    "finished_at = now() + interval '1 s'",
    "cancel_requested_at = now()",
    "spec = '{}'",
    "owner_id = 'others'",
)


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_the_database_itself_refuses_to_change_a_job_that_has_ended(bench, state: JobState) -> None:
    job = bench.in_state(state)
    for change in CHANGES:
        with pytest.raises(exc.IntegrityError, match=f"has ended \\({state}\\)"):
            bench.sql(f"UPDATE jobs SET {change}")
    unchanged = bench.get(job.id)
    assert (unchanged.state, unchanged.attempt, unchanged.event_seq) == (state, job.attempt, job.event_seq)


def test_what_says_nothing_of_the_end_may_change(bench) -> None:
    job = bench.in_state(JobState.FAILED)
    bench.sql("UPDATE jobs SET cleanup_error = 'folder not removed', hinted_at = now()")
    assert bench.get(job.id).cleanup_error == "folder not removed"


def test_a_second_model_of_one_job_is_refused_by_the_database(bench) -> None:
    bench.in_state(JobState.SUCCEEDED)
    with pytest.raises(exc.IntegrityError, match="models_one_success"):
        bench.sql(
            "INSERT INTO models (id, owner_id, job_id, kind, base_model, storage_key, manifest, task)"
            " SELECT 'ft:second', owner_id, job_id, kind, base_model, storage_key, manifest, task FROM models"
        )


def test_an_unknown_state_is_refused_by_the_database(bench) -> None:
    bench.job()
    with pytest.raises(exc.IntegrityError, match="jobs_state"):
        bench.sql("UPDATE jobs SET state = 'lost'")
