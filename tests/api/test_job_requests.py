"""Requests for a job over HTTP: accepted fields, and errors that name the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx
import openai
import pytest
from api_calls import JOBS, MINIMAL, create, hint, refusal
from fastapi import FastAPI

from api.app import create_app
from store.settings import StoreSettings

MLFLOW = {"type": "mlflow", "mlflow": {"project": "boolq"}}


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

    def test_metrics_are_sent_to_trackers_that_the_operator_enables(
        self,
        client: httpx.Client,
        settings: StoreSettings,
        serving: Callable[[FastAPI], AbstractContextManager[str]],
    ) -> None:
        wandb = {"type": "wandb", "wandb": {"project": "boolq", "tags": ["a"]}}
        app = create_app(settings.model_copy(update={"integrations": "wandb, trackio"}))
        with serving(app) as url:
            body = MINIMAL | {"integrations": [wandb]}
            key = client.headers["authorization"].removeprefix("Bearer ")
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as package:
                job = package.fine_tuning.jobs.create(**body)
            refused = client.post(f"{url}{JOBS}", json=MINIMAL | {"integrations": [wandb, MLFLOW]})
        assert job.integrations is not None
        assert (job.integrations[0].type, job.integrations[0].wandb.project) == ("wandb", "boolq")
        assert refusal(refused) == (400, "integrations[1].type")
        assert "HEFT_INTEGRATIONS" in refused.json()["error"]["message"]

    @pytest.mark.parametrize(
        "sent",
        [
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}},
            {"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": 2}},
            {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}, "method": None},
        ],
    )
    def test_requests_of_openai_clients_work_unchanged(
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

    def test_a_new_job_is_hinted_to_the_workers(self, client: httpx.Client, settings: StoreSettings) -> None:
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
            ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations[0].type"),
            ({"integrations": [{"type": "wandb"}]}, "integrations[0]"),
            ({"integrations": [{"type": "wandb", "mlflow": {"project": "p"}}]}, "integrations[0]"),
            (
                {"integrations": [{"type": "wandb", "wandb": {"project": "../p"}}]},
                "integrations[0].wandb.project",
            ),
            ({"integrations": [{"type": "excel", "excel": {}}]}, "integrations[0].type"),
            ({"metadata": {"k": 1}}, "metadata.k"),
            ({"metadata": {"k": "\0"}}, "metadata.k"),
            ({"metadata": {"k": "v" * 513}}, "metadata.k"),
            ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
            ({"task": {"type": "poetry"}}, "task.type"),
            ({"task": {"type": "yes_no", "labels": ["a", "b"]}}, "task"),
            ({"task": {"type": "text", "metrics": ["bleu"]}}, "task.metrics[0]"),
            ({"task": {"type": "choice", "metrics": ["rouge_l"]}}, "task.metrics"),
            ({"training_file": "hub:google/boolq", "task": {"metrics": ["f1"]}}, "task.metrics"),
            ({"training_file": "hub:openai/gsm8k", "task": {"type": "yes_no"}}, "task.type"),
            ({"training_file": "hub:allenai/ai2_arc"}, "training_file"),
            ({"validation_file": "hub:openai/gsm8k"}, "validation_file"),
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
    def test_invalid_fields_are_refused_by_name(
        self, client: httpx.Client, changes: dict[str, Any], param: str | None
    ) -> None:
        body = {name: value for name, value in (MINIMAL | changes).items() if value is not None}
        answer = client.post(JOBS, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert refusal(answer) == (400, param)
        assert client.get(JOBS).json()["data"] == []

    def test_a_file_of_another_owner_is_not_found(self, client: httpx.Client, stranger: httpx.Client) -> None:
        theirs = stranger.post(
            "/v1/files", files={"file": ("rows.jsonl", b"{}\n")}, data={"purpose": "fine-tune"}
        )
        answer = client.post(JOBS, json=MINIMAL | {"training_file": theirs.json()["id"]})
        assert refusal(answer) == (400, "training_file")


class TestIdempotency:
    KEY = {"Idempotency-Key": "once"}  # noqa: RUF012

    def test_eight_concurrent_requests_create_one_job(self, client: httpx.Client) -> None:
        with ThreadPoolExecutor(8) as threads:
            answers = list(
                threads.map(lambda _: client.post(JOBS, json=MINIMAL, headers=self.KEY).json(), range(8))
            )
        assert answers == [answers[0]] * 8
        assert len(client.get(JOBS).json()["data"]) == 1

    def test_the_order_of_keys_does_not_change_the_body_hash(self, client: httpx.Client) -> None:
        first = client.post(JOBS, json=MINIMAL, headers=self.KEY).json()
        again = client.post(JOBS, json=dict(reversed(MINIMAL.items())), headers=self.KEY).json()
        assert again["id"] == first["id"]

    def test_another_body_under_the_same_key_is_refused(self, client: httpx.Client) -> None:
        client.post(JOBS, json=MINIMAL, headers=self.KEY)
        answer = client.post(JOBS, json=MINIMAL | {"seed": 2}, headers=self.KEY)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
        assert len(client.get(JOBS).json()["data"]) == 1

    def test_a_refused_request_does_not_use_up_the_idempotency_key(self, client: httpx.Client) -> None:
        refused = client.post(JOBS, json=MINIMAL | {"training_file": "file-none"}, headers=self.KEY)
        assert refused.status_code == 400
        assert client.post(JOBS, json=MINIMAL, headers=self.KEY).status_code == 200

    def test_a_key_too_long_is_refused(self, client: httpx.Client) -> None:
        answer = client.post(JOBS, json=MINIMAL, headers={"Idempotency-Key": "k" * 256})
        assert refusal(answer) == (400, "Idempotency-Key")
