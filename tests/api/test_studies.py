"""Studies over HTTP: create, retrieve, refuse, cancel and estimate."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from api_calls import JOBS, refusal

from store.db.session import SessionFactory, transaction
from store.jobs import endings, leases
from store.studies import studies, verdicts

STUDIES = "/v1/studies"
BODY: dict[str, Any] = {
    "name": "ranks",
    "model": "smollm2-135m",
    "training_file": "sample:passages",
    "test_file": "sample:passages:test",
    "seeds": [1, 2],
    "arms": [{"name": "heft"}, {"name": "rank 2", "set": {"reft.rank": 2}}],
}

SPACE = {"reft.rank": [2, 4], "reft.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}
SEARCH: dict[str, Any] = {
    "arms": None,
    "validation_file": "sample:passages:validation",
    "search": {"space": SPACE, "budget": 5},
}
_FILES = {"training_file": "sample:passages", "test_file": "sample:passages:test"}
TASKS: dict[str, Any] = {
    "arms": None,
    "preset": "cross_task",
    "training_file": None,
    "test_file": None,
    "tasks": [{"name": "boolq", **_FILES}, {"name": "sst2", **_FILES, "task": {"type": "yes_no"}}],
}


def create(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    answer = client.post(STUDIES, json={**BODY, **changes})
    assert answer.status_code == 200, answer.text
    return answer.json()


def end_all(sessions: SessionFactory, study_id: str) -> None:
    """Plays the workers: each job ends with one more correct row than the one before, and the study is compared."""
    with transaction(sessions) as session:
        runs = studies.runs_of(session, study_id)
    for number, run in enumerate(runs):
        with transaction(sessions) as session:
            claim = leases.claim(session, job_id=run.job.id, worker_id="w", purpose="prepare")
            assert claim is not None
            endings.finish_prepared(session, claim, report={})
        with transaction(sessions) as session:
            claim = leases.claim(session, job_id=run.job.id, worker_id="w", purpose="train")
            assert claim is not None
            packed = ["AA==", "gA==", "wA==", "4A=="][number]
            stage = {"stage": "reft", "stage_index": 1}
            outcomes = {
                "n": 4,
                "metric": "rouge_l",
                "rows_sha256": "x",
                "results": [{**stage, "right": packed}],
            }
            cost = {**stage, "flops": 10 + number, "seconds": 2.5, "trained_parameters": 7, "tokens": 5}
            result = {"outcomes": outcomes, "costs": [cost, cost]}
            endings.finish_succeeded(session, claim, storage_key="k", manifest={}, task={}, result=result)
    verdict = {
        "arms": [
            {
                "name": "heft",
                "seeds": [1, 2],
                "accuracy": 0.25,
                "interval_95": [0.1, 0.4],
                "missing_seeds": [],
            }
        ],
        "comparisons": [{"a": "heft", "b": "rank 2", "separable": False, "sentence": "Not significant."}],
    }
    with transaction(sessions) as session:
        verdicts.record(session, study_id, studies.runs_of(session, study_id), verdict)


def test_a_study_is_made_of_ordinary_jobs(client: httpx.Client) -> None:
    study = create(client, metadata={"for": "the paper"})
    assert study["id"].startswith("study_")
    assert (study["object"], study["status"], study["comparisons"]) == ("study", "queued", [])
    assert [arm["name"] for arm in study["arms"]] == ["heft", "rank 2"]
    assert study["jobs"] == {"validating_files": 4}
    assert study["metadata"] == {"for": "the paper"}
    job = client.get(f"{JOBS}/{study['arms'][1]['jobs'][0]['id']}").json()
    assert (job["seed"], job["method"]["heft"]["reft"]["rank"]) == (1, 2)
    assert job["metadata"] == {"study": study["id"], "arm": "rank 2"}
    assert client.get(f"{STUDIES}/{study['id']}").json() == study
    listed = client.get(STUDIES).json()["data"]
    assert [one["id"] for one in listed] == [study["id"]]
    assert "arms" not in listed[0]


def test_a_finished_study_has_its_comparisons(client: httpx.Client, sessions: SessionFactory) -> None:
    study_id = create(client)["id"]
    end_all(sessions, study_id)
    study = client.get(f"{STUDIES}/{study_id}").json()
    assert study["status"] == "succeeded"
    assert study["finished_at"] is not None
    heft = study["arms"][0]
    assert (heft["accuracy"], heft["interval_95"], heft["metric"]) == (0.25, [0.1, 0.4], "rouge_l")
    assert (heft["flops"], heft["seconds"], heft["trained_parameters"]) == (22.0, 5.0, 14)
    assert all(job["fine_tuned_model"].startswith("ft:") for job in heft["jobs"])
    assert study["comparisons"][0]["sentence"] == "Not significant."
    events = client.get(f"{STUDIES}/{study_id}/events").json()["data"]
    assert [event["data"]["code"] for event in events] == [
        "SUCCEEDED", "COMPARISON", "JOB_ENDED", "JOB_ENDED", "JOB_ENDED", "JOB_ENDED", "CREATED",
    ]  # fmt: skip
    assert refusal(client.post(f"{STUDIES}/{study_id}/cancel"))[0] == 400


def test_a_repeated_request_creates_one_study(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "once"}
    first = client.post(STUDIES, json=BODY, headers=headers).json()
    assert client.post(STUDIES, json=BODY, headers=headers).json()["id"] == first["id"]
    assert client.post(STUDIES, json={**BODY, "name": "other"}, headers=headers).status_code == 409
    assert len(client.get(STUDIES).json()["data"]) == 1


def test_a_study_is_cancelled_with_its_jobs(client: httpx.Client) -> None:
    study_id = create(client)["id"]
    study = client.post(f"{STUDIES}/{study_id}/cancel").json()
    assert study["jobs"] == {"cancelled": 4}


def test_another_owners_study_is_not_found(client: httpx.Client, stranger: httpx.Client) -> None:
    study_id = create(client)["id"]
    for answer in (
        stranger.get(f"{STUDIES}/{study_id}"),
        stranger.post(f"{STUDIES}/{study_id}/cancel"),
        stranger.get(f"{STUDIES}/{study_id}/events"),
    ):
        assert answer.status_code == 404


@pytest.mark.parametrize(
    ("param", "changes"),
    [
        ("grid", {"arms": None, "grid": {}}),
        (
            "grid",
            {"arms": None, "grid": {"lora.rank": list(range(1, 101)), "reft.rank": list(range(1, 101))}},
        ),
        ("arms[1].set.reft.rank", {"arms": [{"name": "a"}, {"name": "b", "set": {"reft.rank": -1}}]}),
        (
            "arms[0].method.heft.lora.rank",
            {"arms": [{"name": "a", "method": {"heft": {"lora": {"rank": 0}}}}]},
        ),
        ("preset", {"arms": None, "preset": "everything"}),
        ("preset", {"arms": None, "preset": "layer_rank", "model": "org/never-seen"}),
        ("training_file", {"training_file": "file-nowhere"}),
        ("test_file", {"test_file": None}),
        ("task.metrics[0]", {"task": {"metrics": ["bleu"]}}),
        ("task.metrics", {"task": {"type": "yes_no", "metrics": ["rouge_l"]}}),
        ("task.metrics", {"training_file": "hub:openai/gsm8k", "task": {"metrics": ["accuracy"]}}),
        ("budgets", {"budgets": 3}),
        ("seeds[1]", {"seeds": [1, -1]}),
        ("grid", {"grid": {"reft.rank": [2]}}),
        ("arms", {"arms": None}),
        ("budget", {"budget": 3}),
        ("epochs_scale", {"epochs_scale": 2}),
        ("tasks", {"arms": None, "preset": "cross_task"}),
        ("tasks[1].name", {**TASKS, "tasks": [TASKS["tasks"][0]] * 2}),
        ("tasks[0].colour", {**TASKS, "tasks": [{**TASKS["tasks"][0], "colour": 1}, TASKS["tasks"][1]]}),
        (
            "tasks[1].test_file",
            {**TASKS, "tasks": [TASKS["tasks"][0], {**TASKS["tasks"][1], "test_file": None}]},
        ),
        (
            "tasks[1].training_file",
            {**TASKS, "tasks": [TASKS["tasks"][0], {**TASKS["tasks"][1], "training_file": "file-nowhere"}]},
        ),
        ("training_file", {**TASKS, "training_file": "sample:passages"}),
        ("search", SEARCH | {"arms": BODY["arms"]}),
        ("search.budget", SEARCH | {"search": {"space": SPACE}}),
        ("search.space", SEARCH | {"search": {"space": {}, "budget": 3}}),
        ("search.space", SEARCH | {"search": {"budget": 3}}),
        ("search.space.reft.rank", SEARCH | {"search": {"space": {"reft.rank": []}, "budget": 3}}),
        (
            "search.space.reft.rank",
            SEARCH | {"search": {"space": {"reft.rank": {"low": 8, "high": 2}}, "budget": 3}},
        ),
        (
            "search.space.reft.rank.low",
            SEARCH | {"search": {"space": {"reft.rank": {"high": 2}}, "budget": 3}},
        ),
        ("search.space.reft.colour", SEARCH | {"search": {"space": {"reft.colour": [1, 2]}, "budget": 3}}),
        ("search.budget", SEARCH | {"search": {"space": SPACE, "budget": 151}}),
        ("validation_file", SEARCH | {"validation_file": None}),
        ("test_file", SEARCH | {"test_file": None}),
    ],
)
def test_invalid_fields_are_refused_by_name(
    client: httpx.Client, param: str, changes: dict[str, Any]
) -> None:
    assert refusal(client.post(STUDIES, json=BODY | changes)) == (400, param)
    assert client.get(JOBS).json()["data"] == []


def test_files_with_too_few_rows_are_refused(client: httpx.Client) -> None:
    row = b'{"question": "is it so", "answer": true}\n'
    few, enough = (
        client.post(
            "/v1/files", files={"file": ("rows.jsonl", row * n)}, data={"purpose": "fine-tune"}
        ).json()["id"]
        for n in (19, 20)
    )
    assert refusal(client.post(STUDIES, json={**BODY, "test_file": few})) == (400, "test_file")
    assert refusal(client.post(STUDIES, json={**BODY, "test_file": None, "validation_file": few})) == (
        400,
        "validation_file",
    )
    assert create(client, test_file=enough)["test_file"] == enough


def test_a_search_is_shown_with_its_trials(client: httpx.Client) -> None:
    study = create(client, **SEARCH, baseline="as it is")
    assert study["jobs"] == {"validating_files": 6}
    assert [arm["name"].split(":")[0] for arm in study["arms"]] == ["as it is", "trial 1", "trial 2"]
    assert study["arms"][0]["trial"] is None
    trial = study["arms"][1]["trial"]
    assert (trial["number"], trial["state"], trial["value"]) == (1, "running", None)
    assert sorted(trial["params"]) == sorted(SPACE)
    shown = study["search"]
    assert (shown["budget"], shown["parallel"], shown["sampler"]) == (5, 2, "tpe")
    assert shown["space"] == SPACE
    assert shown["trials"] == {"running": 2, "complete": 0, "failed": 0, "pruned": 0}
    assert shown["best"] is None
    assert client.get(f"{STUDIES}/{study['id']}").json() == study
    assert client.post(f"{STUDIES}/{study['id']}/cancel").json()["jobs"] == {"cancelled": 6}


def test_a_cross_task_study_is_shown_by_task(client: httpx.Client) -> None:
    study = create(client, **TASKS)
    assert [(arm["task"], arm["method_name"]) for arm in study["arms"]][2:4] == [
        ("boolq", "HEFT 3+3"), ("sst2", "LoRA alone 6"),
    ]  # fmt: skip
    assert study["training_file"] is None
    assert [task["name"] for task in study["tasks"]] == ["boolq", "sst2"]
    assert study["over_tasks"] == []
    job = client.get(f"{JOBS}/{study['arms'][3]['jobs'][0]['id']}").json()
    assert job["task"]["type"] == "yes_no"


def test_the_rows_of_every_evaluated_file_are_counted(client: httpx.Client) -> None:
    row = b'{"question": "is it so", "answer": true}\n'
    sent = {"files": {"file": ("rows.jsonl", row * 19)}, "data": {"purpose": "fine-tune"}}
    few = client.post("/v1/files", **sent).json()["id"]
    one, two = TASKS["tasks"]
    answer = client.post(STUDIES, json={**BODY, **TASKS, "tasks": [one, {**two, "test_file": few}]})
    assert refusal(answer) == (400, "tasks[1].test_file")
    assert refusal(client.post(STUDIES, json={**BODY, **SEARCH, "validation_file": few})) == (
        400,
        "validation_file",
    )


def test_a_repeated_request_is_answered_although_its_file_is_deleted(client: httpx.Client) -> None:
    row = b'{"question": "is it so", "answer": true}\n'
    sent = {"files": {"file": ("rows.jsonl", row * 20)}, "data": {"purpose": "fine-tune"}}
    file = client.post("/v1/files", **sent).json()["id"]
    headers = {"Idempotency-Key": "once"}
    first = client.post(STUDIES, json={**BODY, "test_file": file}, headers=headers).json()
    assert client.delete(f"/v1/files/{file}").status_code == 200
    again = client.post(STUDIES, json={**BODY, "test_file": file}, headers=headers)
    assert again.json()["id"] == first["id"]
    assert refusal(client.post(STUDIES, json={**BODY, "test_file": file})) == (400, "test_file")


def test_a_search_is_estimated_at_its_whole_budget(client: httpx.Client) -> None:
    request_body = {
        "name": "s",
        "model": "meta-llama/Llama-2-7b-hf",
        "training_file": "hub:google/boolq:train",
    }
    request_body |= {
        "validation_file": "sample:passages",
        "test_file": "sample:passages:test",
        "dry_run": True,
    }
    body = {
        **request_body,
        "seeds": [1, 2],
        "reuse": False,
        "search": {"space": {"reft.rank": [2, 4]}, "budget": 10},
    }
    estimate = client.post(STUDIES, json=body).json()
    assert estimate["jobs"] == 20
    per_run = sum(arm["flops"] for arm in estimate["arms"]) / 2
    assert estimate["flops"] == pytest.approx(20 * per_run)


def test_the_papers_run_is_estimated_and_not_started(client: httpx.Client) -> None:
    answer = client.post(
        STUDIES, json={"name": "paper", "preset": "paper_table", "dry_run": True, "seeds": [1]}
    )
    estimate = answer.json()
    assert [arm["name"] for arm in estimate["arms"]] == [
        "LoRA alone 20", "ReFT alone 20", "HEFT 3+3", "HEFT 20+20",
    ]  # fmt: skip
    # 4 operations for each of 6.6e9 weights and 9,427 · 150 tokens, 20 times; attention on top.
    lora, reft, _, both = (arm["flops"] for arm in estimate["arms"])
    assert lora == pytest.approx(20 * 4 * 6.6e9 * 9_427 * 150, rel=0.05)
    assert reft < lora / 10
    assert both == pytest.approx(lora + reft)
    # HEFT 20+20 reuses the stage of LoRA alone.
    assert estimate["flops"] == pytest.approx(sum(arm["flops"] for arm in estimate["arms"]) - lora)
    assert estimate["memory_bytes"] == pytest.approx(13.5e9, rel=0.01)
    assert estimate["arms"][0]["trained_parameters"] == 4_194_304
    assert client.get(STUDIES).json()["data"] == []
    assert client.get(JOBS).json()["data"] == []


def test_arms_of_equal_compute_have_equal_estimates(client: httpx.Client) -> None:
    request_body = {"name": "equal", "preset": "equal_compute", "dry_run": True, "seeds": [1, 2]}
    request_body |= {
        "model": "meta-llama/Llama-2-7b-hf",
        "training_file": "hub:google/boolq:train",
        "test_file": "sample:passages",
    }
    estimate = client.post(STUDIES, json=request_body).json()
    (flops,) = {arm["flops"] for arm in estimate["arms"]}
    assert estimate["flops"] == pytest.approx(6 * flops)
    assert estimate["arms"][1]["stages"] == ["as much as HEFT 3+3"]
