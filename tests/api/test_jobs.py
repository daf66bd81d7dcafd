"""Jobs over HTTP: what is taken, what is refused by name, and what the job object shows."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from kombu import Connection

from store import jobs, leases
from store.database import SessionFactory, transaction
from store.fence import Claim
from store.settings import StoreSettings

JOBS = "/v1/fine_tuning/jobs"
MINIMAL: dict[str, Any] = {"model": "smollm2-135m", "training_file": "sample:passages"}


def create(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    answer = client.post(JOBS, json=MINIMAL | changes)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["param"]


def claim(sessions: SessionFactory, job_id: str, purpose: str) -> Claim:
    with transaction(sessions) as session:
        held = leases.claim(session, job_id=job_id, worker_id="worker-1", purpose=purpose)  # type: ignore[arg-type]
    assert held is not None
    return held


def running(client: httpx.Client, sessions: SessionFactory, **changes: Any) -> Claim:
    """A job that a worker trains on."""
    job_id = create(client, **changes)["id"]
    with transaction(sessions) as session:
        leases.finish_prepared(session, claim(sessions, job_id, "prepare"), report={"rows": 3})
    return claim(sessions, job_id, "train")


def hint(settings: StoreSettings, queue_name: str, job_id: str) -> str:
    """The task of the next message about this job; those about others are taken and forgotten."""
    with Connection(settings.redis_url) as broker, broker.SimpleQueue(queue_name, no_ack=True) as queue:
        while True:
            message = queue.get(timeout=10)
            if message.payload[0] == [job_id]:
                return str(message.headers["task"])


class TestCreate:
    def test_the_defaults_are_the_papers(self, client: httpx.Client, owner: str) -> None:
        job = create(client)

        assert job["id"].startswith("ftjob-")
        assert job["object"] == "fine_tuning.job"
        assert job["status"] == "validating_files"
        assert job["organization_id"] == owner
        assert (job["result_files"], job["integrations"], job["metadata"]) == ([], [], {})
        assert job["method"]["type"] == "heft"
        heft = job["method"]["heft"]
        assert (heft["lora"]["rank"], heft["lora"]["alpha"], heft["reft"]["rank"]) == (8, 32, 4)
        assert (heft["reft"]["layers"], heft["reft"]["positions"]) == ("auto", "l1")
        assert job["hyperparameters"] == {
            "n_epochs": 3,
            "batch_size": 16,
            "learning_rate_multiplier": 1.0,
        }
        for empty in ("error", "finished_at", "fine_tuned_model", "stage", "evaluation", "parity"):
            assert job[empty] is None
        assert client.get(f"{JOBS}/{job['id']}").json() == job

    def test_a_random_seed_is_chosen_where_none_is_given(self, client: httpx.Client) -> None:
        seeds = {create(client)["seed"] for _ in range(3)} | {create(client, seed=None)["seed"]}
        assert len(seeds) == 4
        assert create(client, seed=7)["seed"] == 7

    @pytest.mark.parametrize(
        "sent",
        [
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}},
            {"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": 2}},
            {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}, "method": None},
        ],
    )
    def test_what_an_openai_caller_sends_works_as_it_is(
        self, client: httpx.Client, sent: dict[str, Any]
    ) -> None:
        nulls = {"integrations": None, "suffix": None, "validation_file": None, "metadata": None}
        job = create(client, **sent, **nulls)

        assert job["hyperparameters"]["n_epochs"] == 2
        assert job["method"]["type"] == "supervised"
        assert job["method"]["supervised"]["hyperparameters"]["n_epochs"] == 2
        assert {stage["n_epochs"] for stage in job["method"]["heft"].values()} == {2}

    @pytest.mark.parametrize(
        "method",
        [
            {"type": "lora", "lora": {"rank": 2, "layers": [3, 4]}},
            {"type": "reft", "reft": {"layers": 3}},
            {"type": "heft_reversed", "heft_reversed": {"lora": {"rank": 2}}},
            {"type": "heft_interleaved"},
            {"type": "recipe", "recipe": {"stages": [{"type": "lora", "rank": 2}, {"type": "reft"}]}},
        ],
    )
    def test_every_method_is_shown_under_its_own_name(
        self, client: httpx.Client, method: dict[str, Any]
    ) -> None:
        shown = create(client, method=method)["method"]
        assert set(shown) == {"type", method["type"]}
        assert shown["type"] == method["type"]

    def test_a_hint_goes_to_the_workers(self, client: httpx.Client, settings: StoreSettings) -> None:
        job = create(client)
        assert hint(settings, "prepare", job["id"]) == "heft.prepare"

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"model": None}, "model"),
            ({"training_file": None}, "training_file"),
            ({"model": "/etc/passwd"}, "model"),
            ({"model": "../secrets"}, "model"),
            ({"model": "a/../b"}, "model"),
            ({"model": "file:///etc/passwd"}, "model"),
            ({"model": "~root"}, "model"),
            ({"model": "model\0"}, "model"),
            ({"model": "half \ud800"}, "model"),
            ({"model": 3}, "model"),
            ({"training_file": "/etc/passwd"}, "training_file"),
            ({"training_file": "file-none"}, "training_file"),
            ({"validation_file": "file-none"}, "validation_file"),
            ({"trainingfile": "x"}, "trainingfile"),
            ({"seed": -1}, "seed"),
            ({"seed": 2**63}, "seed"),
            ({"seed": 1e400}, "seed"),
            ({"suffix": "a b"}, "suffix"),
            ({"suffix": "x" * 65}, "suffix"),
            ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
            ({"metadata": {"k": 1}}, "metadata.k"),
            ({"metadata": {"k": "\0"}}, "metadata.k"),
            ({"metadata": {"k": "v" * 513}}, "metadata.k"),
            ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
            ({"task": {"type": "poetry"}}, "task.type"),
            ({"task": {"type": "yes_no", "labels": ["a", "b"]}}, "task"),
            ({"method": {"type": "dpo"}}, "method.type"),
            ({"method": {"type": "lora", "reft": {}}}, "method"),
            ({"method": {"type": "heft", "heft": {"lora": {"rank": 0}}}}, "method.heft.lora.rank"),
            ({"method": {"type": "heft", "heft": {"lora": {"rnk": 8}}}}, "method.heft.lora.rnk"),
            (
                {"method": {"type": "heft", "heft": {"reft": {"positions": "x"}}}},
                "method.heft.reft.positions",
            ),
            ({"method": {"type": "reft", "reft": {"layers": [-1]}}}, "method.reft.layers[0]"),
            ({"method": {"type": "recipe"}}, "method"),
            (
                {"method": {"type": "recipe", "recipe": {"stages": [{"type": "lora", "alpha": 0}]}}},
                "method.recipe.stages[0].alpha",
            ),
            ({"method": {"type": "heft"}, "hyperparameters": {"n_epochs": 2}}, None),
            ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ],
    )
    def test_what_can_not_be_is_refused_by_name(
        self, client: httpx.Client, changes: dict[str, Any], param: str | None
    ) -> None:
        body = {name: value for name, value in (MINIMAL | changes).items() if value is not None}
        answer = client.post(JOBS, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert refusal(answer) == (422, param)
        assert client.get(JOBS).json()["data"] == []

    def test_a_strangers_file_is_no_file(self, client: httpx.Client, stranger: httpx.Client) -> None:
        theirs = stranger.post(
            "/v1/files", files={"file": ("rows.jsonl", b"{}\n")}, data={"purpose": "fine-tune"}
        )
        answer = client.post(JOBS, json=MINIMAL | {"training_file": theirs.json()["id"]})
        assert refusal(answer) == (422, "training_file")


class TestIdempotency:
    KEY = {"Idempotency-Key": "once"}  # noqa: RUF012

    def test_eight_at_once_make_one_job(self, client: httpx.Client) -> None:
        with ThreadPoolExecutor(8) as threads:
            answers = list(
                threads.map(lambda _: client.post(JOBS, json=MINIMAL, headers=self.KEY).json(), range(8))
            )
        assert answers == [answers[0]] * 8
        assert len(client.get(JOBS).json()["data"]) == 1

    def test_the_order_of_keys_makes_no_other_body(self, client: httpx.Client) -> None:
        first = client.post(JOBS, json=MINIMAL, headers=self.KEY).json()
        again = client.post(JOBS, json=dict(reversed(MINIMAL.items())), headers=self.KEY).json()
        assert again["id"] == first["id"]

    def test_another_body_under_the_same_key_is_refused(self, client: httpx.Client) -> None:
        client.post(JOBS, json=MINIMAL, headers=self.KEY)
        answer = client.post(JOBS, json=MINIMAL | {"seed": 2}, headers=self.KEY)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
        assert len(client.get(JOBS).json()["data"]) == 1

    def test_a_refused_request_does_not_use_the_key_up(self, client: httpx.Client) -> None:
        refused = client.post(JOBS, json=MINIMAL | {"training_file": "file-none"}, headers=self.KEY)
        assert refused.status_code == 422
        assert client.post(JOBS, json=MINIMAL, headers=self.KEY).status_code == 200

    def test_a_key_too_long_is_refused(self, client: httpx.Client) -> None:
        answer = client.post(JOBS, json=MINIMAL, headers={"Idempotency-Key": "k" * 256})
        assert refusal(answer) == (422, "Idempotency-Key")


class TestLists:
    def test_pages_newest_first(self, client: httpx.Client) -> None:
        ids = [create(client)["id"] for _ in range(5)]

        first = client.get(JOBS, params={"limit": 3}).json()
        second = client.get(JOBS, params={"limit": 3, "after": first["data"][-1]["id"]}).json()

        assert [job["id"] for job in first["data"] + second["data"]] == ids[::-1]
        assert (first["has_more"], second["has_more"]) == (True, False)

    def test_metadata_filters(self, client: httpx.Client) -> None:
        ours = create(client, metadata={"team": "a", "run": "1"})["id"]
        create(client, metadata={"team": "a", "run": "2"})
        create(client, metadata={"team": ""})

        def found(**filters: str) -> list[str]:
            params = {f"metadata[{key}]": value for key, value in filters.items()}
            return [job["id"] for job in client.get(JOBS, params=params).json()["data"]]

        assert found(team="a", run="1") == [ours]
        assert len(found(team="a")) == 2
        assert len(found(team="")) == 1
        assert found(team="b") == []

    @pytest.mark.parametrize(("query", "param"), [("limit=101", "limit"), ("after=ftjob-none", "after")])
    def test_a_list_that_can_not_be_is_refused(self, client: httpx.Client, query: str, param: str) -> None:
        assert refusal(client.get(f"{JOBS}?{query}")) == (422, param)


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

    def test_what_has_ended_takes_no_wishes(self, client: httpx.Client) -> None:
        job_id = create(client)["id"]
        client.post(f"{JOBS}/{job_id}/cancel")
        for wish in ("cancel", "pause", "resume"):
            answer = client.post(f"{JOBS}/{job_id}/{wish}")
            assert answer.status_code == 409
            assert answer.headers["x-should-retry"] == "false"
            assert answer.json()["error"]["type"] == "conflict_error"

    def test_a_running_job_is_told(self, client: httpx.Client, sessions: SessionFactory) -> None:
        held = running(client, sessions)
        assert client.post(f"{JOBS}/{held.job_id}/cancel").json()["status"] == "running"
        with transaction(sessions) as session:
            assert leases.heartbeat(session, held).cancel


class TestWhatARunShows:
    def test_resolved_settings_replace_auto(self, client: httpx.Client, sessions: SessionFactory) -> None:
        held = running(client, sessions)
        stages = [
            {"type": "lora", "learning_rate": 5e-4, "target_modules": ["q_proj", "v_proj"]},
            {"type": "reft", "learning_rate": 2e-3, "layers": [14]},
        ]
        resolved = {"stages": stages, "dtype": "float32", "max_length": 2048, "task": {"type": "yes_no"}}
        with transaction(sessions) as session:
            leases.record_event(
                session,
                held,
                code="STAGE_STARTED",
                message="Stage lora.",
                stage="lora",
                progress={"percent": 50, "eta_seconds": 30, "updated_at": 1_000},
                metrics={"lora": {"loss": 0.5}},
                resolved=resolved,
            )

        job = client.get(f"{JOBS}/{held.job_id}").json()

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
        held = running(client, sessions, suffix="boolq")
        for index, (stage, kind) in enumerate([("lora", "step"), ("lora", "stage"), ("reft", "stage")]):
            with transaction(sessions) as session:
                leases.record_checkpoint(
                    session,
                    held,
                    step=10 * (index + 1),
                    stage=stage,
                    stage_index=int(stage == "reft"),
                    kind=kind,  # type: ignore[arg-type]
                    storage_key=f"jobs/{held.job_id}/1/{stage}-{kind}",
                    manifest={"bundle/heft.json": "0" * 64},
                    metrics={"train_loss": 0.25},
                )

        page = client.get(f"{JOBS}/{held.job_id}/checkpoints").json()

        assert [item["step_number"] for item in page["data"]] == [30, 20]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][1]["id"])
        last = page["data"][1]
        assert last["object"] == "fine_tuning.job.checkpoint"
        assert last["metrics"] == {"step": 20, "train_loss": 0.25}
        assert re.fullmatch(
            rf"ft:smollm2-135m:{owner}:boolq:\w{{8}}:ckpt-lora", last["fine_tuned_model_checkpoint"]
        )
        assert client.get(f"/v1/models/{last['fine_tuned_model_checkpoint']}").json()["kind"] == "checkpoint"
        one = client.get(f"{JOBS}/{held.job_id}/checkpoints?limit=1").json()
        assert (len(one["data"]), one["has_more"]) == (1, True)

    def test_a_failed_job_says_what_to_change(self, client: httpx.Client, sessions: SessionFactory) -> None:
        held = running(client, sessions)
        error = {"code": "out_of_memory", "message": "A batch of 4 would fit.", "param": "batch_size"}
        with transaction(sessions) as session:
            leases.finish_failed(session, held, error=error)

        job = client.get(f"{JOBS}/{held.job_id}").json()

        assert (job["status"], job["error"]) == ("failed", error)
        assert isinstance(job["finished_at"], int)

    def test_events_are_listed_latest_first_and_turn_pages(self, client: httpx.Client) -> None:
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


def test_the_jobs_module_is_used_through_the_api_alone(
    client: httpx.Client, sessions: SessionFactory, owner: str
) -> None:
    """What the API created is what the store holds, with the caller as its owner."""
    job_id = create(client, metadata={"k": "v"})["id"]
    with transaction(sessions) as session:
        job = jobs.get(session, owner_id=owner, job_id=job_id)
    assert job.metadata_ == {"k": "v"}
