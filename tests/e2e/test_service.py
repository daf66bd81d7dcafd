"""The whole service, from an upload to an answer: what it answers is what it evaluated, what it trains is what the
library trains, and what is killed goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_stack import HeftUp, heft_up

from cli.stack.home import Home
from cli.stack.process import wait_until

MODEL = "tiny"
ROWS = [
    {
        "question": f"is {number} larger than {number * 7 % 40}",
        "passage": "Numbers can be compared. " * (1 + number % 5),
        "answer": number > number * 7 % 40,
    }
    for number in range(40)
]
SECONDS = 150


@pytest.fixture
def places(make_tiny_model: Callable[[str], Path]) -> Iterator[tuple[Home, Path]]:
    """A home, and a folder of models with one tiny random Llama."""
    folder = Path(tempfile.mkdtemp(prefix="heft-test-", dir="/tmp"))
    folder.chmod(0o711)
    shutil.copytree(make_tiny_model("llama"), folder / "models" / MODEL)
    try:
        yield Home.at(folder / "home"), folder / "models"
    finally:
        shutil.rmtree(folder)


def client(stack: HeftUp) -> httpx.Client:
    return httpx.Client(
        base_url=stack.record.url, headers={"Authorization": f"Bearer {stack.key}"}, timeout=60
    )


def environment(models: Path, **more: str) -> dict[str, str]:
    return {"HEFT_MODEL_DIR": str(models), "OMP_NUM_THREADS": "1", **more}


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def upload(api: httpx.Client) -> str:
    files = {"file": ("rows.jsonl", jsonl(ROWS).encode())}
    answer = api.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def stages(n_epochs: int) -> dict[str, Any]:
    stage = {"n_epochs": n_epochs, "batch_size": 8, "rank": 2}
    return {"lora": stage, "reft": {**stage, "layers": [2]}}


def create(api: httpx.Client, n_epochs: int, **spec: Any) -> str:
    method = {"type": "heft", "heft": stages(n_epochs)}
    body = {"model": MODEL, "method": method, "seed": 3, "dtype": "float32", "max_length": 128, **spec}
    answer = api.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def ended(api: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job, once it has ended."""
    jobs: list[dict[str, Any]] = []

    def is_over() -> bool:
        jobs.append(api.get(f"/v1/fine_tuning/jobs/{job_id}").json())
        return jobs[-1]["status"] in ("succeeded", "failed", "cancelled")

    wait_until(is_over, seconds=SECONDS)
    assert jobs[-1]["status"] == "succeeded", jobs[-1]["error"]
    return jobs[-1]


def events(api: httpx.Client, job_id: str, code: str) -> list[dict[str, Any]]:
    """The data of a job's events with this code, oldest first."""
    found = api.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100}).json()["data"]
    return [event["data"] for event in reversed(found) if event["data"].get("code") == code]


def step_losses(api: httpx.Client, job: dict[str, Any]) -> list[float]:
    """From the job's result file: every step's."""
    header, *lines = api.get(f"/v1/files/{job['result_files'][0]}/content").text.splitlines()
    column = header.split(",").index("train_loss")
    return [float(line.split(",")[column]) for line in lines if line.split(",")[column]]


def test_answers_are_what_was_evaluated_and_losses_are_the_librarys(
    places: tuple[Home, Path], tmp_path: Path
) -> None:
    home, models = places
    # Scores from a kept beginning agree to rounding; without any, to the bit.
    settings = {**environment(models), "HEFT_PREFIX_CACHE_BYTES": "0"}
    with heft_up(home, **settings) as stack, client(stack) as api:
        rows = upload(api)
        job = ended(api, create(api, 2, training_file=rows, test_file=rows))
        model = job["fine_tuned_model"]
        questions = [{"question": row["question"], "passage": row["passage"]} for row in ROWS]
        many = api.post("/predict", json={"model": model, "inputs": questions}).json()["data"]
        alone = [api.post("/v1/predict", json={"model": model, **question}).json() for question in questions]
        losses = step_losses(api, job)

    assert [one["answer"] for one in many] == [one["answer"] for one in alone]
    scores = [one["label_probabilities"] for one in alone]
    assert [one["label_probabilities"] for one in many] == scores, "the same bits"
    right = sum((one["answer"] == "yes") == row["answer"] for one, row in zip(many, ROWS, strict=True))
    assert job["evaluation"]["results"][-1]["correct"] == right
    assert job["evaluation"]["split"] == "test"
    assert [result["stage"] for result in job["evaluation"]["results"]] == ["base", "lora", "reft"]

    assert losses == library_losses(models, tmp_path)


def library_losses(models: Path, folder: Path) -> list[float]:
    """The losses of the same run by `python -m heft_engine train`."""
    (folder / "rows.jsonl").write_text(jsonl(ROWS))
    command = [sys.executable, "-m", "heft_engine", "train", "--model", str(models / MODEL), "--seed", "3"]
    command += ["--train", str(folder / "rows.jsonl"), "--out", str(folder / "out"), "--no-reuse"]
    settings = {"dtype": "float32", "max_length": 128}
    settings |= {
        f"{kind}.{name}": value for kind, block in stages(2).items() for name, value in block.items()
    }
    for name, value in settings.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return [event["data"]["loss"] for event in told if event["code"] == "METRICS"]


@pytest.mark.timeout(420)
def test_a_job_outlives_the_kill_of_its_trainer_its_worker_and_the_whole_stack(
    places: tuple[Home, Path],
) -> None:
    home, models = places
    quick = environment(
        models,
        HEFT_CHECKPOINT_SECONDS="0",
        HEFT_LEASE_SECONDS="3",
        HEFT_LEASE_GRACE_SECONDS="0.5",
        HEFT_HEARTBEAT_SECONDS="0.5",
        HEFT_SWEEP_SECONDS="0.5",
        HEFT_DEATH_PAUSE_SECONDS="0.1",
    )
    with heft_up(home, **quick) as stack, client(stack) as api:
        rows = upload(api)
        straight = ended(api, create(api, 24, training_file=rows))
        job_id = create(api, 24, training_file=rows, reuse=False)
        for words in (("heft_engine", "train", "--run-file"), ("-m worker", "train")):
            passed = progress(api, job_id)
            wait_until(lambda before=passed: progress(api, job_id) >= before + 2, seconds=SECONDS)
            wait_until(lambda named=words: bool(stack.named(*named)), seconds=SECONDS)
            os.kill(stack.named(*words)[0].pid, signal.SIGKILL)
        passed = progress(api, job_id)
        wait_until(lambda: progress(api, job_id) > passed, seconds=SECONDS)
        stack.descendants()
        stack.process.kill()
        assert stack.nothing_is_left()
    with heft_up(home, **quick) as stack, client(stack) as api:
        job = ended(api, job_id)
        assert len(events(api, job_id, "SUCCEEDED")) == 1
        mine = [one for one in api.get("/v1/models").json()["data"] if one["id"] == job["fine_tuned_model"]]
        assert len(mine) == 1
        assert step_losses(api, job) == step_losses(api, straight), "as if never killed"


def progress(api: httpx.Client, job_id: str) -> int:
    job = api.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    assert job["status"] not in ("succeeded", "failed"), "it ended before it could be killed"
    return int((job["progress"] or {}).get("step") or 0)
