"""Models over HTTP: ids with colons and slashes, owners, and archives."""

from __future__ import annotations

from urllib.parse import quote

import httpx
import pytest
from kombu import Connection

from store import exports, models
from store.db.session import SessionFactory, transaction
from store.jobs import endings, leases
from store.settings import StoreSettings
from store.storage.artifacts import Artifacts

MODELS = "/v1/models"


def path(model_id: str) -> str:
    """The openai package escapes the slash, and not the colon."""
    return f"{MODELS}/{quote(model_id, safe=':')}"


@pytest.fixture
def base(sessions: SessionFactory) -> str:
    """A base model with a slash in its name, as a worker offers it."""
    with transaction(sessions) as session:
        models.offer_base(session, model_id="org/tiny", source="hub", info={"n_layers": 4})
    return "org/tiny"


@pytest.fixture
def trained(client: httpx.Client, sessions: SessionFactory, base: str) -> str:
    """The model of a finished job."""
    body = {"model": base, "training_file": "sample:passages", "suffix": "boolq"}
    job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    with transaction(sessions) as session:
        prepare = leases.claim(session, job_id=job_id, worker_id="w", purpose="prepare")
        assert prepare is not None
        endings.finish_prepared(session, prepare, report={})
        train = leases.claim(session, job_id=job_id, worker_id="w", purpose="train")
        assert train is not None
        endings.finish_succeeded(
            session,
            train,
            storage_key=f"jobs/{job_id}/{train.attempt}/bundle",
            manifest={"heft.json": "0" * 64},
            task={"type": "yes_no"},
            result={
                "evaluation": {"n": 10, "metric": "accuracy", "split": "test", "results": []},
                "parity": {"merge": 1e-6},
                "trained_tokens": 123,
            },
        )
    job = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    assert (job["status"], job["trained_tokens"], job["evaluation"]["n"]) == ("succeeded", 123, 10)
    return str(job["fine_tuned_model"])


def test_the_list_has_base_models_and_own_models(
    client: httpx.Client, stranger: httpx.Client, base: str, trained: str
) -> None:
    listed = client.get(MODELS).json()
    assert (listed["object"], listed["has_more"]) == ("list", False)
    assert {trained, base} <= {model["id"] for model in listed["data"]}
    theirs = {model["id"] for model in stranger.get(MODELS).json()["data"]}
    assert base in theirs
    assert trained not in theirs


def test_a_model_is_found_by_its_id(client: httpx.Client, owner: str, base: str, trained: str) -> None:
    model = client.get(path(trained)).json()
    assert model["id"] == trained
    assert (model["object"], model["owned_by"], model["base_model"]) == ("model", owner, base)
    assert (model["kind"], model["task"]) == ("final", {"type": "yes_no"})

    assert client.get(path(base)).json()["owned_by"] == "heft"
    assert client.get(f"{MODELS}/{base}").json()["info"] == {"n_layers": 4}


def test_a_model_of_another_owner_is_not_found(stranger: httpx.Client, trained: str) -> None:
    for answer in (
        stranger.get(path(trained)),
        stranger.delete(path(trained)),
        stranger.get(f"{path(trained)}/export"),
        stranger.post("/predict", json={"model": trained, "question": "?"}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_own_models_can_be_deleted_and_base_models_can_not(
    client: httpx.Client, base: str, trained: str
) -> None:
    assert client.delete(path(trained)).json() == {"id": trained, "object": "model", "deleted": True}
    assert client.get(path(trained)).status_code == 404

    refused = client.delete(path(base))
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert client.get(path(base)).status_code == 200


class TestExport:
    def test_an_archive_is_built_on_request_and_then_streamed(
        self, client: httpx.Client, sessions: SessionFactory, settings: StoreSettings, trained: str
    ) -> None:
        pending = client.get(f"{path(trained)}/export?format=peft")

        assert (pending.status_code, pending.headers["retry-after"]) == (202, "2")
        assert pending.json() == {
            "object": "model.export",
            "model": trained,
            "format": "peft",
            "status": "pending",
        }
        with Connection(settings.redis_url) as broker, broker.SimpleQueue("export", no_ack=True) as queue:
            assert queue.get(timeout=10).payload[0] == [trained, "peft"]

        tar = b"tar" * 200_000
        with transaction(sessions) as session:
            claim = exports.claim(session, model_id=trained, format="peft")
            assert claim is not None
        assert client.get(f"{path(trained)}/export?format=peft").json()["status"] == "building"
        Artifacts(settings.artifacts_url).put_stream("exports/x.tar", [tar])
        with transaction(sessions) as session:
            exports.finish(session, claim, storage_key="exports/x.tar", size=len(tar))

        ready = client.get(f"{path(trained)}/export?format=peft")
        assert ready.status_code == 200
        assert ready.content == tar
        assert ready.headers["content-type"] == "application/x-tar"
        assert ready.headers["content-disposition"].endswith('-peft.tar"')

    def test_an_export_that_can_not_be_built_has_a_reason(
        self, client: httpx.Client, sessions: SessionFactory, trained: str
    ) -> None:
        client.get(f"{path(trained)}/export?format=pyreft")
        error = {"code": "no_reft", "message": "This model has no intervention.", "param": "format"}
        with transaction(sessions) as session:
            claim = exports.claim(session, model_id=trained, format="pyreft")
            assert claim is not None
            exports.fail(session, claim, error=error)
        answer = client.get(f"{path(trained)}/export?format=pyreft")
        assert answer.status_code == 400
        assert answer.json()["error"] == error | {"type": "invalid_request_error"}

    def test_missing_content_is_an_error_response(
        self, client: httpx.Client, sessions: SessionFactory, trained: str
    ) -> None:
        client.get(f"{path(trained)}/export")
        with transaction(sessions) as session:
            claim = exports.claim(session, model_id=trained, format="bundle")
            assert claim is not None
            exports.finish(session, claim, storage_key="exports/gone.tar", size=3)
        answer = client.get(f"{path(trained)}/export")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "artifact_damaged")

    @pytest.mark.parametrize("query", ["format=zip", "format="])
    def test_an_unknown_format_is_refused(self, client: httpx.Client, trained: str, query: str) -> None:
        answer = client.get(f"{path(trained)}/export?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "format")

    def test_a_base_model_is_not_exported(self, client: httpx.Client, base: str) -> None:
        assert client.get(f"{path(base)}/export").status_code == 400


class TestDiagnostics:
    """Diagnostics belong to the job, and are computed by a worker as archives are."""

    def test_diagnostics_are_computed_on_request_and_then_returned(
        self,
        client: httpx.Client,
        stranger: httpx.Client,
        sessions: SessionFactory,
        settings: StoreSettings,
        trained: str,
    ) -> None:
        job_id = client.get(path(trained)).json()["job_id"]
        address = f"/v1/fine_tuning/jobs/{job_id}/diagnostics"
        pending = client.get(address)
        assert (pending.status_code, pending.headers["retry-after"]) == (202, "5")
        assert pending.json() == {
            "object": "fine_tuning.job.diagnostics",
            "job": job_id,
            "status": "pending",
        }
        with Connection(settings.redis_url) as broker, broker.SimpleQueue("export", no_ack=True) as queue:
            # Hints for models of other tests may precede it.
            while queue.get(timeout=10).payload[0] != [trained, "diagnostics"]:
                pass
        assert stranger.get(address).status_code == 404

        report = b'{"object": "fine_tuning.job.diagnostics", "plots": {}}'
        Artifacts(settings.artifacts_url).put_stream("exports/d.json", [report])
        with transaction(sessions) as session:
            claim = exports.claim(session, model_id=trained, format="diagnostics")
            assert claim is not None
            exports.finish(session, claim, storage_key="exports/d.json", size=len(report))
        ready = client.get(address)
        assert (ready.status_code, ready.content) == (200, report)
        assert ready.headers["content-type"] == "application/json"
        refused = client.get(f"{path(trained)}/export?format=diagnostics")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "format")

    def test_export_of_a_job_without_a_model_is_refused(self, client: httpx.Client, base: str) -> None:
        body = {"model": base, "training_file": "sample:passages"}
        job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        answer = client.get(f"/v1/fine_tuning/jobs/{job_id}/diagnostics")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "job_has_no_model")
