"""The whole service, from an upload to a prediction, through the kills of a trainer, a worker and the stack itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_stack import HeftUp, heft_up

from cli.stack.home import Home
from cli.stack.process import wait_until

pytestmark = pytest.mark.timeout(420)

MODEL = "tiny"
ROWS = [
    {
        "question": f"is {number} larger than {number * 7 % 40}",
        "passage": "Numbers can be compared. " * (1 + number % 5),
        "answer": number > number * 7 % 40,
    }
    for number in range(40)
]
#: Long enough for three kills, with a checkpoint at every step.
STAGE = {"n_epochs": 16, "batch_size": 8, "rank": 2}
STAGES = {"lora": STAGE, "reft": {**STAGE, "layers": [2]}}
QUICK = {
    "OMP_NUM_THREADS": "1",
    "HEFT_CHECKPOINT_SECONDS": "0",
    "HEFT_LEASE_SECONDS": "3",
    "HEFT_LEASE_GRACE_SECONDS": "0.5",
    "HEFT_HEARTBEAT_SECONDS": "0.5",
    "HEFT_SWEEP_SECONDS": "0.5",
    "HEFT_DEATH_PAUSE_SECONDS": "0.1",
    # Scores with a cached prefix agree up to rounding; without the cache, bit for bit.
    "HEFT_PREFIX_CACHE_BYTES": "0",
}
TIMEOUT = 150.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A job whose trainer, worker and stack were killed, as its user saw it."""

    job: dict[str, Any]
    losses: list[float]
    success_events: int
    model_ids: list[str]
    batch_predictions: list[dict[str, Any]]
    single_predictions: list[dict[str, Any]]
    first_key: str
    second_key: str
    file_ids: list[str]  # after the restart
    uploaded_id: str
    secret_modes: set[int]
    left_after_kill: bool
    left_after_interrupt: bool
    exit_status: int
    output: str
    errors: str


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[[str], Path]) -> Iterator[Path]:
    """A folder with `models/tiny`, a random Llama."""
    path = Path(tempfile.mkdtemp(prefix="heft-test-", dir="/tmp"))
    path.chmod(0o711)
    shutil.copytree(make_tiny_model("llama"), path / "models" / MODEL)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    home = Home.at(folder / "home")
    environment = {**QUICK, "HEFT_MODEL_DIR": str(folder / "models")}
    with heft_up(home, **environment) as stack, client(stack) as api:
        first_key = stack.key
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (home.key_file, home.state_file)}
        uploaded_id = upload(api)
        job_id = create(api, uploaded_id)
        for words in (("heft_engine", "train", "--run-file"), ("-m worker", "train")):
            wait_for_steps(api, job_id, 2)
            wait_until(lambda named=words: bool(stack.named(*named)), seconds=TIMEOUT)
            os.kill(stack.named(*words)[0].pid, signal.SIGKILL)
        wait_for_steps(api, job_id, 1)
        stack.descendants()
        stack.process.kill()
        left_after_kill = not stack.nothing_is_left()
    with heft_up(home, **environment) as stack, client(stack) as api:
        job = wait_for_end(api, job_id)
        questions = [{"question": row["question"], "passage": row["passage"]} for row in ROWS]
        model = job["fine_tuned_model"]
        seen = {
            "job": job,
            "losses": step_losses(api, job),
            "success_events": len(events(api, job_id, "SUCCEEDED")),
            "model_ids": [model["id"] for model in api.get("/v1/models").json()["data"]],
            "batch_predictions": api.post("/predict", json={"model": model, "inputs": questions}).json()[
                "data"
            ],
            "single_predictions": [
                api.post("/v1/predict", json={"model": model, **question}).json() for question in questions
            ],
            "second_key": stack.key,
            "file_ids": [file["id"] for file in api.get("/v1/files?purpose=fine-tune").json()["data"]],
        }
        stack.descendants()
        stack.process.send_signal(signal.SIGINT)
        output, errors = stack.process.communicate(timeout=100)
        return Outcome(
            **seen,
            first_key=first_key,
            uploaded_id=uploaded_id,
            secret_modes=modes,
            left_after_kill=left_after_kill,
            left_after_interrupt=not stack.nothing_is_left() or home.state_file.exists(),
            exit_status=stack.process.returncode,
            output=output,
            errors=errors,
        )


def test_a_killed_stack_leaves_no_process_and_loses_nothing(outcome: Outcome) -> None:
    assert not outcome.left_after_kill
    assert outcome.secret_modes == {0o600}
    assert outcome.second_key == outcome.first_key
    assert outcome.file_ids == [outcome.uploaded_id]


def test_an_interrupted_stack_ends_in_order(outcome: Outcome) -> None:
    assert outcome.exit_status == 0
    assert not outcome.left_after_interrupt
    assert "address   http://127.0.0.1:" in outcome.output
    assert outcome.first_key in outcome.output
    assert outcome.errors == ""


def test_a_killed_job_succeeds_once_with_the_losses_of_the_library(outcome: Outcome, folder: Path) -> None:
    assert outcome.success_events == 1
    assert outcome.model_ids.count(outcome.job["fine_tuned_model"]) == 1
    assert outcome.losses == library_losses(folder)


def test_predictions_are_what_was_evaluated_alone_and_in_a_batch(outcome: Outcome) -> None:
    batch, single = outcome.batch_predictions, outcome.single_predictions
    assert [row["answer"] for row in batch] == [row["answer"] for row in single]
    for together, alone in zip(batch, single, strict=True):
        assert together["label_probabilities"] == pytest.approx(alone["label_probabilities"], abs=1e-5)
    correct = sum((row["answer"] == "yes") == given["answer"] for row, given in zip(batch, ROWS, strict=True))
    evaluation = outcome.job["evaluation"]
    assert evaluation["results"][-1]["correct"] == correct
    assert evaluation["split"] == "test"
    assert [result["stage"] for result in evaluation["results"]] == ["base", "lora", "reft"]


def test_a_job_shows_its_settings_with_values_for_auto(outcome: Outcome) -> None:
    heft = outcome.job["method"]["heft"]
    assert heft["reft"]["layers"] == [2]
    assert isinstance(heft["lora"]["learning_rate"], float)


def client(stack: HeftUp) -> httpx.Client:
    headers = {"Authorization": f"Bearer {stack.key}"}
    return httpx.Client(base_url=stack.record.url, headers=headers, timeout=60)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def upload(api: httpx.Client) -> str:
    files = {"file": ("rows.jsonl", jsonl(ROWS).encode())}
    answer = api.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def create(api: httpx.Client, file_id: str) -> str:
    body = {
        "model": MODEL,
        "training_file": file_id,
        "test_file": file_id,
        "method": {"type": "heft", "heft": STAGES},
        "seed": 3,
        "dtype": "float32",
        "max_length": 128,
    }
    answer = api.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def wait_for_steps(api: httpx.Client, job_id: str, count: int) -> None:
    """Waits until the job has taken this many steps more, without having ended."""

    def step() -> int:
        job = api.get(f"/v1/fine_tuning/jobs/{job_id}").json()
        assert job["status"] not in ("succeeded", "failed"), "it ended before it could be killed"
        return int((job["progress"] or {}).get("step") or 0)

    first = step()
    assert wait_until(lambda: step() >= first + count, seconds=TIMEOUT)


def wait_for_end(api: httpx.Client, job_id: str) -> dict[str, Any]:
    jobs: list[dict[str, Any]] = []

    def has_ended() -> bool:
        jobs.append(api.get(f"/v1/fine_tuning/jobs/{job_id}").json())
        return jobs[-1]["status"] in ("succeeded", "failed", "cancelled")

    wait_until(has_ended, seconds=TIMEOUT)
    assert jobs[-1]["status"] == "succeeded", jobs[-1]["error"]
    return jobs[-1]


def events(api: httpx.Client, job_id: str, code: str) -> list[dict[str, Any]]:
    page = api.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100}).json()["data"]
    return [event["data"] for event in page if event["data"].get("code") == code]


def step_losses(api: httpx.Client, job: dict[str, Any]) -> list[float]:
    """Returns the loss of every step, from the job's result file."""
    header, *lines = api.get(f"/v1/files/{job['result_files'][0]}/content").text.splitlines()
    column = header.split(",").index("train_loss")
    return [float(line.split(",")[column]) for line in lines if line.split(",")[column]]


def library_losses(folder: Path) -> list[float]:
    """Returns the loss of every step of the same run by `python -m heft_engine train`."""
    (folder / "rows.jsonl").write_text(jsonl(ROWS))
    model = folder / "models" / MODEL
    command = [sys.executable, "-m", "heft_engine", "train", "--model", str(model), "--seed", "3"]
    command += ["--train", str(folder / "rows.jsonl"), "--out", str(folder / "out"), "--no-reuse"]
    settings = {"dtype": "float32", "max_length": 128}
    for kind, stage in STAGES.items():
        settings |= {f"{kind}.{name}": value for name, value in stage.items()}
    for name, value in settings.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = [json.loads(line) for line in completed.stdout.splitlines()]
    return [event["data"]["loss"] for event in lines if event["code"] == "METRICS"]
