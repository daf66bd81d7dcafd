"""The user's side of jobs: create, read, list, cancel, pause, resume; owners never see each other."""

from __future__ import annotations

import pytest

from store.db.states import TERMINAL, JobState
from store.db.tables import Job
from store.errors import InvalidRequest, LostFence, NotFound, WrongState
from store.jobs import endings, jobs, leases

OWNER = "team"


def test_a_new_job_waits_for_its_files_to_be_checked(bench) -> None:
    job = bench.job(metadata={"run": "7"})
    assert job.state == JobState.VALIDATING_FILES
    assert job.metadata_ == {"run": "7"}
    assert job.spec["training_file"] == "sample:passages"
    assert job.spec["reuse"] is True
    assert job.created_at is not None
    assert bench.codes(job.id) == ["CREATED"]


def test_a_job_given_an_id_keeps_it(bench) -> None:
    job = bench.do(jobs.create, owner_id=OWNER, spec=bench.spec, job_id="ftjob-mine")
    assert bench.do(jobs.get, owner_id=OWNER, job_id="ftjob-mine").id == job.id == "ftjob-mine"


@pytest.mark.parametrize("field", ["training_file", "validation_file", "test_file"])
@pytest.mark.parametrize("why", ["unknown", "foreign", "deleted", "result"])
def test_a_job_needs_files_of_its_owner(bench, field: str, why: str) -> None:
    from store.storage import files

    file_id = {
        "unknown": lambda: "file-unknown",
        "foreign": lambda: bench.file(owner_id="others"),
        "deleted": bench.file,
        "result": lambda: bench.file(purpose=files.RESULTS_PURPOSE),
    }[why]()
    if why == "deleted":
        bench.do(files.delete, owner_id=OWNER, file_id=file_id)
    spec = bench.spec.model_copy(update={"training_file": bench.file(), field: file_id})
    with pytest.raises(InvalidRequest) as refused:
        bench.do(jobs.create, owner_id=OWNER, spec=spec)
    assert refused.value.param == field
    assert bench.do(jobs.list_page, owner_id=OWNER).items == []


@pytest.mark.parametrize(
    "ask",
    [
        jobs.get,
        jobs.request_cancel,
        jobs.request_pause,
        jobs.resume,
        jobs.list_events,
        jobs.list_checkpoints,
    ],
)
@pytest.mark.parametrize("job_id", ["foreign", "ftjob-unknown"])
def test_another_owners_job_is_not_found(bench, ask, job_id: str) -> None:
    foreign = bench.job(owner_id="others")
    requested_id = foreign.id if job_id == "foreign" else job_id
    with pytest.raises(NotFound) as refused:
        bench.do(ask, owner_id=OWNER, job_id=requested_id)
    assert refused.value.code is None
    assert bench.get(foreign.id).state == JobState.VALIDATING_FILES


def test_events_of_another_owners_job_are_not_found(bench) -> None:
    with pytest.raises(NotFound):
        bench.do(jobs.events_after, owner_id=OWNER, job_id=bench.job(owner_id="others").id, seq=0)


def test_pages_are_newest_first_and_miss_nothing(bench) -> None:
    job_ids = [bench.job().id for _ in range(5)]
    bench.job(owner_id="others")
    bench.sql("UPDATE jobs SET created_at = '2026-01-01'")  # all at once: the id decides
    seen: list[str] = []
    page = bench.do(jobs.list_page, owner_id=OWNER, limit=2)
    while True:
        seen += [job.id for job in page.items]
        if not page.has_more:
            break
        bench.job()  # a newer one does not shift the pages that follow
        page = bench.do(jobs.list_page, owner_id=OWNER, limit=2, after=seen[-1])
    assert seen == sorted(job_ids, reverse=True)


def test_a_page_after_an_unknown_or_foreign_job_is_refused(bench) -> None:
    for cursor in ("ftjob-unknown", bench.job(owner_id="others").id):
        with pytest.raises(InvalidRequest) as refused:
            bench.do(jobs.list_page, owner_id=OWNER, after=cursor)
        assert refused.value.param == "after"


def test_jobs_are_found_by_their_metadata(bench) -> None:
    both = bench.job(metadata={"team": "a", "run": "1"})
    first = bench.job(metadata={"team": "a"})
    bench.job(metadata={"team": "b"})

    def ids(**metadata: str) -> list[str]:
        return [job.id for job in bench.do(jobs.list_page, owner_id=OWNER, metadata=metadata).items]

    assert ids(team="a") == [first.id, both.id]
    assert ids(team="a", run="1") == [both.id]
    assert ids(team="c") == []


def test_events_are_listed_latest_first_and_streamed_in_order(bench) -> None:
    job_id = bench.running().job_id
    latest = bench.do(jobs.list_events, owner_id=OWNER, job_id=job_id, limit=2)
    assert [event.seq for event in latest.items] == [3, 2]
    assert latest.has_more
    rest = bench.do(jobs.list_events, owner_id=OWNER, job_id=job_id, after=latest.items[-1].id)
    assert [event.seq for event in rest.items] == [1]
    assert not rest.has_more
    stream = bench.do(jobs.events_after, owner_id=OWNER, job_id=job_id, seq=1)
    assert [(event.seq, event.data["code"]) for event in stream] == [
        (2, "VALIDATION_COMPLETE"),
        (3, "QUEUED"),
    ]
    with pytest.raises(InvalidRequest) as refused:
        bench.do(jobs.list_events, owner_id=OWNER, job_id=job_id, after="ftevent-unknown")
    assert refused.value.param == "after"


@pytest.mark.parametrize("state", [JobState.VALIDATING_FILES, JobState.QUEUED, JobState.PAUSED])
def test_cancel_of_a_job_at_rest_is_immediate(bench, state: JobState) -> None:
    job = bench.do(jobs.request_cancel, owner_id=OWNER, job_id=bench.in_state(state).id)
    assert job.state == JobState.CANCELLED
    assert job.finished_at is not None
    assert bench.codes(job.id)[-1] == "CANCELLED"


def test_cancel_of_a_running_job_is_a_wish_that_may_be_repeated(bench) -> None:
    claim = bench.running()
    first = bench.do(jobs.request_cancel, owner_id=OWNER, job_id=claim.job_id)
    again = bench.do(jobs.request_cancel, owner_id=OWNER, job_id=claim.job_id)
    assert first.state == again.state == JobState.RUNNING
    assert first.cancel_requested_at == again.cancel_requested_at is not None
    assert bench.do(leases.read_stop_request, claim).cancel
    with pytest.raises(WrongState):
        bench.do(jobs.request_pause, owner_id=OWNER, job_id=claim.job_id)


@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize("ask", [jobs.request_cancel, jobs.request_pause, jobs.resume])
def test_nothing_can_be_asked_of_a_job_that_has_ended(bench, state: JobState, ask) -> None:
    job = bench.in_state(state)
    with pytest.raises(WrongState) as refused:
        bench.do(ask, owner_id=OWNER, job_id=job.id)
    assert refused.value.code == "job_ended"
    assert bench.get(job.id).event_seq == job.event_seq


def test_a_job_paused_while_its_files_are_checked_goes_back_there(bench) -> None:
    claim = bench.claim(bench.job().id)
    paused = bench.do(jobs.request_pause, owner_id=OWNER, job_id=claim.job_id)
    assert paused.state == JobState.PAUSED
    assert bench.outcomes(claim.job_id) == ["paused"]
    with pytest.raises(LostFence):
        bench.do(endings.finish_prepared, claim, report={})
    resumed = bench.do(jobs.resume, owner_id=OWNER, job_id=claim.job_id)
    assert resumed.state == JobState.VALIDATING_FILES
    assert bench.codes(claim.job_id) == ["CREATED", "PAUSED", "RESUMED"]
    assert bench.claim(claim.job_id).attempt == 2


def test_a_queued_job_is_paused_at_once_and_goes_back_to_the_queue(bench) -> None:
    job = bench.queued()
    for _ in range(2):  # asking again is fine
        assert bench.do(jobs.request_pause, owner_id=OWNER, job_id=job.id).state == JobState.PAUSED
    assert bench.do(jobs.resume, owner_id=OWNER, job_id=job.id).state == JobState.QUEUED
    assert bench.codes(job.id)[-2:] == ["PAUSED", "RESUMED"]


@pytest.mark.parametrize("state", [JobState.VALIDATING_FILES, JobState.QUEUED, JobState.RUNNING])
def test_only_a_paused_job_resumes(bench, state: JobState) -> None:
    job = bench.in_state(state)
    with pytest.raises(WrongState) as refused:
        bench.do(jobs.resume, owner_id=OWNER, job_id=job.id)
    assert refused.value.code == "wrong_state"


def test_checkpoints_listed_are_those_that_can_be_asked(bench) -> None:
    claim = bench.running()
    bench.checkpoint(claim, 5)
    bench.checkpoint(claim, 10, "stage")
    bench.checkpoint(claim, 20, "stage", stage="reft", stage_index=1)
    page = bench.do(jobs.list_checkpoints, owner_id=OWNER, job_id=claim.job_id, limit=1)
    assert [(row.step, row.stage) for row in page.items] == [(20, "reft")]
    rest = bench.do(jobs.list_checkpoints, owner_id=OWNER, job_id=claim.job_id, after=page.items[0].id)
    assert [row.model_id for row in rest.items] == [
        f"ft:smollm2-135m:team:boolq:{claim.job_id[-8:]}:ckpt-lora"
    ]
    assert not rest.has_more


def test_a_row_is_a_record_and_refuses_to_be_changed(bench) -> None:
    job = bench.job()

    def meddle(session) -> None:
        session.get_one(Job, job.id).state = JobState.SUCCEEDED

    with pytest.raises(RuntimeError, match="read-only"):
        bench.do(meddle)
    assert bench.get(job.id).state == JobState.VALIDATING_FILES
