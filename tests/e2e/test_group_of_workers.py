"""The whole service with two training workers that take one job together: a rank is killed, the job is cancelled."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from running_stack import HeftUp, heft_up

from cli.stack.home import Home
from cli.stack.process import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS = [
    {"question": f"is {n} even", "passage": f"The number is {n}.", "answer": n % 2 == 0} for n in range(48)
]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HEFT_TRAIN_NODES": "2",
    "HEFT_TRAIN_ADDRESS": "127.0.0.1",
    "HEFT_CHECKPOINT_SECONDS": "0",
    "HEFT_SWEEP_SECONDS": "0.5",
    "HEFT_DEATH_PAUSE_SECONDS": "0.1",
}
TIMEOUT = 150.0


@pytest.fixture
def stack(make_tiny_model: Callable[[str], Path]) -> Iterator[HeftUp]:
    folder = Path(tempfile.mkdtemp(prefix="heft-test-", dir="/tmp"))
    folder.chmod(0o711)
    shutil.copytree(make_tiny_model("llama"), folder / "models" / "tiny")
    environment = {**ENVIRONMENT, "HEFT_MODEL_DIR": str(folder / "models")}
    with heft_up(Home.at(folder / "home"), "--trainers", "2", **environment) as stack:
        yield stack
    shutil.rmtree(folder)


def create(api: httpx.Client, n_epochs: int) -> str:
    rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    uploaded = api.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)})
    method = {"type": "lora", "lora": {"n_epochs": n_epochs, "batch_size": 8}}
    body = {"model": "tiny", "training_file": uploaded.json()["id"], "method": method, "dtype": "float32"}
    answer = api.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def job_of(api: httpx.Client, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = api.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    return job


def wait_for_step(api: httpx.Client, job_id: str, step: int) -> None:
    def reached() -> bool:
        job = job_of(api, job_id)
        assert job["status"] not in ("succeeded", "failed"), job["error"]
        return int((job["progress"] or {}).get("step") or 0) >= step

    assert wait_until(reached, seconds=TIMEOUT)


def ranks(stack: HeftUp) -> dict[int, psutil.Process]:
    processes = stack.named("heft_engine", "train", "--run-file")
    by_rank = {process.environ().get("RANK"): process for process in processes}
    return {int(rank): process for rank, process in by_rank.items() if rank is not None}


def test_two_workers_train_one_job_which_survives_a_rank_and_is_cancelled(stack: HeftUp) -> None:
    headers = {"Authorization": f"Bearer {stack.key}"}
    with httpx.Client(base_url=stack.record.url, headers=headers, timeout=60) as api:
        job_id = create(api, n_epochs=200)
        wait_for_step(api, job_id, 2)
        processes = ranks(stack)
        assert sorted(processes) == [0, 1]
        assert len({os.getpgid(process.pid) for process in processes.values()}) == 2, "of two workers"
        step = int(job_of(api, job_id)["progress"]["step"])
        processes[1].kill()
        wait_for_step(api, job_id, step + 4)
        page = api.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100}).json()["data"]
        restarts = [event["data"] for event in page if event["data"].get("code") == "RESTARTED"]
        assert [restart["error"]["code"] for restart in restarts] == ["rank_lost"]

        processes |= {rank + 2: process for rank, process in ranks(stack).items()}
        assert api.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").status_code == 200
        assert wait_until(lambda: job_of(api, job_id)["status"] == "cancelled", seconds=TIMEOUT)
        assert wait_until(lambda: not ranks(stack), seconds=TIMEOUT)
        _, alive = psutil.wait_procs(list(processes.values()), timeout=20)
        assert not alive

        short_job = create(api, n_epochs=1)
        assert wait_until(lambda: job_of(api, short_job)["status"] == "succeeded", seconds=TIMEOUT)
