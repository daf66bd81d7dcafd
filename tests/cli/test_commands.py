"""Requests and output of the commands, against a scripted service on loopback."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import uvicorn
from running_stack import heft
from scripted_service import Service
from uvicorn.importer import import_from_string

from api.door.connections import LimitedProtocol
from cli.commands import service as service_commands
from cli.errors import CommandError
from cli.job_body import job_body
from cli.main import app
from store import logs


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": "model", "code": "x"}}


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("heft", [], {"method": {"type": "heft"}}),
        (
            "heft",
            ["lora.rank=8", "reft.layers=15", "reft.positions=f1+l1", "lora.learning_rate=auto"],
            {
                "method": {
                    "type": "heft",
                    "heft": {
                        "lora": {"rank": 8, "learning_rate": "auto"},
                        "reft": {"layers": 15, "positions": "f1+l1"},
                    },
                }
            },
        ),
        ("lora", ["lora.rank=4"], {"method": {"type": "lora", "lora": {"rank": 4}}}),
        (
            "reft",
            ["max_length=64", "early_stopping.patience=2"],
            {"method": {"type": "reft"}, "max_length": 64, "early_stopping": {"patience": 2}},
        ),
    ],
)
def test_settings_are_put_into_the_fields_of_the_api(method: str, settings: list[str], expected: Any) -> None:
    assert job_body(model="m", method=method, settings=settings) == {"model": "m", **expected}


def test_a_setting_without_a_value() -> None:
    with pytest.raises(CommandError, match="NAME=VALUE"):
        job_body(model="m", method="heft", settings=["lora.rank"])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> uvicorn.Config:
    """The configuration that `heft api` serves with."""
    configs: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: configs.append(self.config))
    monkeypatch.setattr(logs, "configure", lambda _: None)
    for name in ("DATABASE", "REDIS", "ARTIFACTS"):
        monkeypatch.setenv(f"HEFT_{name}_URL", "unused://")
    service_commands.api(typer.Context(typer.main.get_command(app)))
    return configs[0]


def test_the_api_keeps_idle_connections_for_longer_than_clients_do(served: uvicorn.Config) -> None:
    assert served.timeout_keep_alive > httpx.Limits().keepalive_expiry


def test_the_api_limits_its_connections(served: uvicorn.Config) -> None:
    assert import_from_string(served.http) is LimitedProtocol
    assert served.ws == "none"


def test_the_api_may_open_as_many_descriptors_as_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits))
    for limits in ((1_024, 4_096), (1_024, 1_048_576), (1_024, resource.RLIM_INFINITY), (4_096, 4_096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        service_commands._allow_descriptors()
    assert changed == [(4_096, 4_096), (65_536, 1_048_576), (65_536, resource.RLIM_INFINITY)]


def job(status: str, **more: Any) -> tuple[int, dict[str, Any]]:
    return 200, {"id": "ftjob-1", "status": status, "stage": None, "progress": None, "metrics": {}, **more}


def events(*messages: str, start: int = 0) -> tuple[int, dict[str, Any]]:
    data = [
        {
            "id": f"e{number}",
            "type": "message",
            "level": "info",
            "message": message,
            "data": {"code": "STARTED"},
        }
        for number, message in enumerate(messages, start=start)
    ]
    return 200, {"data": data[::-1], "has_more": False}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.watch._PERIOD_SECONDS", 0.01)
    monkeypatch.setattr("cli.client._PAUSE_SECONDS", 0.01)


ESTIMATE = {
    "rows": 1_000,
    "truncated_rows": 2,
    "longest_example_tokens": 300,
    "steps": 12,
    "trained_tokens": 6_000,
    "measured_jobs": 3,
    "seconds": 90.0,
    "fits": True,
    "stages": [
        {"type": "lora", "placement": "one GPU", "gpu_bytes": 2 * 10**9, "host_bytes": 0, "seconds": 80.0},
        {"type": "reft", "placement": "one GPU", "gpu_bytes": 10**9, "host_bytes": 10**8, "seconds": 10.0},
    ],
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fits", [True, False])
def test_a_dry_run_prints_what_training_would_take(service: Service, fits: bool) -> None:
    service.on("POST /v1/fine_tuning/jobs", job("validating_files"))
    service.on("GET /v1/fine_tuning/jobs/ftjob-1", job("succeeded", estimate={**ESTIMATE, "fits": fits}))
    service.on("GET /v1/fine_tuning/jobs/ftjob-1/events?limit=100", events())
    result = service.run("jobs", "create", "--model", "m", "--training-file", "file-1", "--dry-run")
    assert result.exit_code == (0 if fits else 1), result.output
    for part in ("1,000 rows, 2 of them truncated", "12 steps", "2.0 GB", "about 1:30 of training"):
        assert part in result.stdout
    [created] = [body for request, body in service.bodies if request == "POST /v1/fine_tuning/jobs"]
    assert created["dry_run"] is True


@pytest.mark.usefixtures("quick")
def test_create_and_watch(service: Service, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": true}\n')
    running = {
        "stage": "lora",
        "progress": {"percent": 50, "step": 1, "total_steps": 2, "eta_seconds": 70},
        "metrics": {"lora": {"loss": 0.25}},
    }
    service.on("POST /v1/files", (200, {"id": "file-1"}))
    service.on("POST /v1/fine_tuning/jobs", job("validating_files"))
    service.on(
        "GET /v1/fine_tuning/jobs/ftjob-1",
        job("queued"),
        job("running", **running),
        (503, error("starting again")),
        job("succeeded", fine_tuned_model="ft:m:o::1"),
    )
    service.on(
        "GET /v1/fine_tuning/jobs/ftjob-1/events?limit=100",
        events("one"),
        events("one", "two"),
        events("one", "two"),
    )
    result = service.run(
        "jobs",
        "create",
        "--model",
        "m",
        "--training-file",
        str(rows),
        "--validation-file",
        "file-2",
        "--watch",
    )
    assert result.exit_code == 0, result.output
    assert [line.strip() for line in result.stdout.splitlines() if line.strip()] == [
        "ftjob-1",
        "one",
        "two",
        "ft:m:o::1",
    ]
    [created] = [body for request, body in service.bodies if request == "POST /v1/fine_tuning/jobs"]
    assert created["training_file"] == "file-1"
    assert created["validation_file"] == "file-2"


@pytest.mark.usefixtures("quick")
def test_watching_a_failed_job_exits_with_an_error(service: Service) -> None:
    service.on("GET /v1/fine_tuning/jobs/ftjob-1", job("failed", error={"message": "rows are bad"}))
    service.on("GET /v1/fine_tuning/jobs/ftjob-1/events?limit=100", events("it failed"))
    result = service.run("jobs", "get", "ftjob-1", "--watch")
    assert result.exit_code == 1
    assert result.stderr == "heft: ftjob-1 failed: rows are bad\n"


@pytest.mark.parametrize("what", ["cancel", "pause", "resume"])
def test_requests_to_a_job(service: Service, what: str) -> None:
    service.on(f"POST /v1/fine_tuning/jobs/ftjob-1/{what}", job("running"))
    assert service.run("jobs", what, "ftjob-1").stdout == "running\n"


def test_lists_read_every_page(service: Service) -> None:
    def page(*ids: str, more: bool) -> tuple[int, Any]:
        data = [{"id": i, "filename": "f", "bytes": 1, "created_at": 0} for i in ids]
        return 200, {"data": data, "has_more": more}

    service.on("GET /v1/files?limit=100", page("file-1", "file-2", more=True))
    service.on("GET /v1/files?limit=100&after=file-2", page("file-3", more=False))
    lines = service.run("files", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["id", "file-1", "file-2", "file-3"]


def test_export_waits_until_it_is_built(service: Service, tmp_path: Path) -> None:
    service.on("GET /v1/models/ft%3Aa%2Fb%3A1/export?format=peft", (202, {}), (202, {}), (200, b"a tar"))
    out = tmp_path / "model.tar"
    result = service.run("models", "export", "ft:a/b:1", "--format", "peft", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == b"a tar"
    assert list(tmp_path.iterdir()) == [out]


def test_predict_one(service: Service) -> None:
    service.on("POST /v1/predict", (200, {"answer": "yes", "probability": 0.91}))
    result = service.run("predict", "m", "--question", "is it", "--passage", "It is.", "--no-intervention")
    assert result.stdout == "yes  (0.910)\n"
    assert service.bodies[-1][1] == {
        "model": "m",
        "question": "is it",
        "passage": "It is.",
        "intervention": {"enabled": False, "scale": 1.0},
    }


def test_predict_with_abstain_below(service: Service) -> None:
    shared = {"yes": 0.4, "no": 0.6}
    withheld = {"answer": None, "abstained": True, "probability": 0.6, "label_probabilities": shared}
    service.on("POST /v1/predict", (200, withheld))
    result = service.run("predict", "m", "--question", "is it", "--abstain-below", "0.7")
    assert result.output == "abstained  (no: 0.600)\n"
    assert service.bodies[0][1]["abstain_below"] == 0.7
    assert service.run("predict", "m", "--question", "is it", "--abstain-below", "1.1").exit_code == 2


def test_predict_a_file(service: Service, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"q{n}", "answer": True}) + "\n" for n in range(3)))
    service.on(
        "POST /v1/predict",
        (200, {"data": [{"answer": "yes"}, {"answer": "no"}]}),
        (200, {"data": [{"answer": "yes"}]}),
    )
    result = service.run("predict", "m", "--file", str(rows), "--batch", "2", "--requests", "1")
    assert [json.loads(line)["answer"] for line in result.stdout.splitlines()] == ["yes", "no", "yes"]
    assert [body["inputs"] for _, body in service.bodies] == [
        [{"question": "q0"}, {"question": "q1"}],
        [{"question": "q2"}],
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]\n", "line 1: not a JSON object"), ('{"question": "q"}\nnonsense\n', "line 2: not valid JSON")],
)
def test_predict_names_the_bad_line(service: Service, tmp_path: Path, content: str, message: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(content)
    result = service.run("predict", "m", "--file", str(rows))
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--question", "q", "--file", "f"]])
def test_predict_needs_a_question_or_a_file(service: Service, arguments: list[str]) -> None:
    result = service.run("predict", "m", *arguments)
    assert result.exit_code == 1
    assert "--file" in result.stderr


def test_refusals_are_one_line(service: Service) -> None:
    service.on("POST /v1/predict", (404, error("no such model")))
    result = service.run("predict", "m", "--question", "q")
    assert result.exit_code == 1
    assert result.stderr == "heft: no such model (model)\n"


def test_an_existing_file_that_is_not_an_answer_file_is_refused(service: Service) -> None:
    service.on("GET /v1/models", (502, b"<html>"))
    result = service.run("models", "list")
    assert result.exit_code == 1
    assert "502" in result.stderr


def test_a_service_that_does_not_answer_is_named() -> None:
    result = heft("--url", "http://127.0.0.1:1", "--api-key", "k", "models", "list")
    assert result.exit_code == 1
    assert "does not answer" in result.stderr


def test_help_is_fast_and_imports_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from cli.main import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "print(*sorted({'torch', 'sqlalchemy', 'fastapi', 'httpx', 'pydantic'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""
