"""Jobs over HTTP: lists, cancel, pause and resume, and the job object."""

from __future__ import annotations

import re

import httpx
import pytest
from api_calls import JOBS, MINIMAL, create, hint, refusal, running

from store.db.session import SessionFactory, transaction
from store.jobs import endings, jobs, leases
from store.settings import StoreSettings


class TestLists:
    def test_jobs_are_listed_newest_first_in_pages(self, client: httpx.Client) -> None:
        ids = [create(client)["id"] for _ in range(5)]

        first = client.get(JOBS, params={"limit": 3}).json()
        second = client.get(JOBS, params={"limit": 3, "after": first["data"][-1]["id"]}).json()

        assert [job["id"] for job in first["data"] + second["data"]] == ids[::-1]
        assert (first["has_more"], second["has_more"]) == (True, False)

    def test_metadata_filters(self, client: httpx.Client) -> None:
        ours = create(client, metadata={"team": "a", "run": "1"})["id"]
        create(client, metadata={"team": "a", "run": "2"})
        create(client, metadata={"team": ""})

        def list_ids(**filters: str) -> list[str]:
            params = {f"metadata[{key}]": value for key, value in filters.items()}
            return [job["id"] for job in client.get(JOBS, params=params).json()["data"]]

        assert list_ids(team="a", run="1") == [ours]
        assert len(list_ids(team="a")) == 2
        assert len(list_ids(team="")) == 1
        assert list_ids(team="b") == []

    @pytest.mark.parametrize(("query", "param"), [("limit=101", "limit"), ("after=ftjob-none", "after")])
    def test_an_invalid_list_query_is_refused(self, client: httpx.Client, query: str, param: str) -> None:
        assert refusal(client.get(f"{JOBS}?{query}")) == (400, param)

    @pytest.mark.parametrize(
        ("fields", "reuse"), [({}, True), ({"reuse": True}, True), ({"reuse": False}, False)]
    )
    def test_equal_stages_are_reused_unless_a_job_disables_it(
        self, client: httpx.Client, fields: dict[str, bool], reuse: bool
    ) -> None:
        job = create(client, **fields)
        assert job["reuse"] is reuse
        assert client.get(f"{JOBS}/{job['id']}").json()["reuse"] is reuse

    def test_reuse_must_be_a_boolean(self, client: httpx.Client) -> None:
        assert refusal(client.post(JOBS, json=MINIMAL | {"reuse": "lora"})) == (400, "reuse")


class TestOwners:
    def test_another_owners_job_is_not_found(self, client: httpx.Client, stranger: httpx.Client) -> None:
        job_id = create(client)["id"]

        assert stranger.get(JOBS).json()["data"] == []
        answers = [
            stranger.get(f"{JOBS}/{job_id}"),
            stranger.get(f"{JOBS}/{job_id}/events"),
            stranger.get(f"{JOBS}/{job_id}/events?stream=true"),
            stranger.get(f"{JOBS}/{job_id}/checkpoints"),
            *(stranger.post(f"{JOBS}/{job_id}/{wish}") for wish in ("cancel", "pause", "resume")),
        ]
        assert {refusal(answer) for answer in answers} == {(404, "fine_tuning_job_id")}
        assert client.get(f"{JOBS}/{job_id}").json()["status"] == "validating_files"


class TestWishes:
    def test_pause_resume_cancel_of_a_waiting_job(
        self, client: httpx.Client, settings: StoreSettings
    ) -> None:
        job_id = create(client)["id"]

        assert client.post(f"{JOBS}/{job_id}/pause").json()["status"] == "paused"
        assert client.post(f"{JOBS}/{job_id}/resume").json()["status"] == "validating_files"
        assert client.post(f"{JOBS}/{job_id}/cancel").json()["status"] == "cancelled"

        codes = [event["data"]["code"] for event in client.get(f"{JOBS}/{job_id}/events").json()["data"]]
        assert codes == ["CANCELLED", "RESUMED", "PAUSED", "CREATED"]
        for _ in ("created", "resumed"):
            assert hint(settings, "prepare", job_id) == "heft.prepare"

    def test_a_finished_job_can_not_be_cancelled_or_paused(self, client: httpx.Client) -> None:
        job_id = create(client)["id"]
        client.post(f"{JOBS}/{job_id}/cancel")
        for wish in ("cancel", "pause", "resume"):
            answer = client.post(f"{JOBS}/{job_id}/{wish}")
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (
                400,
                "invalid_request_error",
                "job_ended",
            )

    def test_a_running_job_gets_the_request(self, client: httpx.Client, sessions: SessionFactory) -> None:
        claim = running(client, sessions)
        assert client.post(f"{JOBS}/{claim.job_id}/cancel").json()["status"] == "running"
        with transaction(sessions) as session:
            assert leases.heartbeat(session, claim).cancel


class TestWhatARunShows:
    def test_resolved_settings_replace_auto(self, client: httpx.Client, sessions: SessionFactory) -> None:
        claim = running(client, sessions)
        stages = [
            {"type": "lora", "learning_rate": 5e-4, "target_modules": ["q_proj", "v_proj"]},
            {"type": "reft", "learning_rate": 2e-3, "layers": [14]},
        ]
        resolved = {"stages": stages, "dtype": "float32", "max_length": 2048, "task": {"type": "yes_no"}}
        with transaction(sessions) as session:
            leases.record_event(
                session,
                claim,
                code="STAGE_STARTED",
                message="Stage lora.",
                stage="lora",
                progress={"percent": 50, "eta_seconds": 30, "updated_at": 1_000},
                metrics={"lora": {"loss": 0.5}},
                resolved=resolved,
            )

        job = client.get(f"{JOBS}/{claim.job_id}").json()

        heft = job["method"]["heft"]
        assert (heft["lora"]["learning_rate"], heft["lora"]["rank"]) == (5e-4, 8)
        assert heft["lora"]["target_modules"] == ["q_proj", "v_proj"]
        assert heft["reft"]["layers"] == [14]
        assert (job["dtype"], job["max_length"], job["task"]["type"]) == ("float32", 2048, "yes_no")
        assert (job["status"], job["stage"], job["estimated_finish"]) == ("running", "lora", 1_030)
        assert job["metrics"] == {"lora": {"loss": 0.5}}

    def test_checkpoints_are_listed_with_first_and_last_id(
        self, client: httpx.Client, sessions: SessionFactory, owner: str
    ) -> None:
        claim = running(client, sessions, suffix="boolq")
        saved = [("lora", "step"), ("lora", "stage"), ("reft", "epoch"), ("reft", "stage")]
        for index, (stage, kind) in enumerate(saved):
            with transaction(sessions) as session:
                leases.record_checkpoint(
                    session,
                    claim,
                    step=10 * (index + 1),
                    stage=stage,
                    stage_index=int(stage == "reft"),
                    kind=kind,  # type: ignore[arg-type]
                    storage_key=f"jobs/{claim.job_id}/1/{stage}-{kind}",
                    manifest={"bundle/heft.json": "0" * 64},
                    metrics={"train_loss": 0.25, "valid_loss": 0.5 - index * (kind == "epoch")},
                )

        page = client.get(f"{JOBS}/{claim.job_id}/checkpoints").json()

        assert [item["step_number"] for item in page["data"]] == [40, 30, 20]
        assert [item["best"] for item in page["data"]] == [False, True, False]
        assert page["data"][1]["fine_tuned_model_checkpoint"].endswith(":ckpt-step-30")
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][2]["id"])
        model_ids = [item["fine_tuned_model_checkpoint"] for item in page["data"]]
        last = page["data"][2]
        assert last["object"] == "fine_tuning.job.checkpoint"
        assert last["metrics"] == {"step": 20, "train_loss": 0.25, "valid_loss": 0.5}
        assert re.fullmatch(
            rf"ft:smollm2-135m:{owner}:boolq:\w{{8}}:ckpt-lora", last["fine_tuned_model_checkpoint"]
        )
        assert client.get(f"/v1/models/{last['fine_tuned_model_checkpoint']}").json()["kind"] == "checkpoint"
        page = client.get(f"{JOBS}/{claim.job_id}/checkpoints?limit=1").json()
        assert (len(page["data"]), page["has_more"]) == (1, True)

        client.delete(f"/v1/models/{model_ids[1]}")
        page = client.get(f"{JOBS}/{claim.job_id}/checkpoints").json()
        assert [item["step_number"] for item in page["data"]] == [40, 20]
        assert [item["best"] for item in page["data"]] == [True, False], "of equal ones the later"

    def test_a_failed_job_says_what_to_change(self, client: httpx.Client, sessions: SessionFactory) -> None:
        claim = running(client, sessions)
        error = {"code": "out_of_memory", "message": "A batch of 4 would fit.", "param": "batch_size"}
        with transaction(sessions) as session:
            endings.finish_failed(session, claim, error=error)

        job = client.get(f"{JOBS}/{claim.job_id}").json()

        assert (job["status"], job["error"]) == ("failed", error)
        assert isinstance(job["finished_at"], int)

    def test_events_are_listed_newest_first_in_pages(self, client: httpx.Client) -> None:
        job_id = create(client)["id"]
        for wish in ("pause", "resume", "cancel"):
            client.post(f"{JOBS}/{job_id}/{wish}")

        first = client.get(f"{JOBS}/{job_id}/events?limit=2").json()
        second = client.get(f"{JOBS}/{job_id}/events?limit=2&after={first['data'][-1]['id']}").json()

        codes = [event["data"]["code"] for event in first["data"] + second["data"]]
        assert codes == ["CANCELLED", "RESUMED", "PAUSED", "CREATED"]
        event = first["data"][0]
        assert (event["object"], event["level"], event["type"]) == (
            "fine_tuning.job.event",
            "info",
            "message",
        )


def test_the_openai_packages_jobs_work(client: httpx.Client, sessions: SessionFactory, owner: str) -> None:
    """The store has the job that the API created, with the caller as its owner."""
    job_id = create(client, metadata={"k": "v"})["id"]
    with transaction(sessions) as session:
        job = jobs.get(session, owner_id=owner, job_id=job_id)
    assert job.metadata_ == {"k": "v"}


def test_a_dry_run_is_a_job_that_is_listed_apart(client: httpx.Client) -> None:
    real, dry = create(client), create(client, dry_run=True)
    assert (real["dry_run"], dry["dry_run"], dry["estimate"], dry["status"]) == (
        False,
        True,
        None,
        "validating_files",
    )
    assert [job["id"] for job in client.get(JOBS).json()["data"]] == [real["id"]]
    assert [job["id"] for job in client.get(JOBS, params={"dry_run": True}).json()["data"]] == [dry["id"]]
    assert client.get(f"{JOBS}/{dry['id']}").json() == dry
