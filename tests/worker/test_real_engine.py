"""The worker with the real engine on a tiny model: a job from its files to its model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from worker_bench import OWNER, Bench

import heft_engine
from heft_engine.config import LoraStage, TrainConfig
from heft_engine.events import Event
from heft_engine.rows import parse_row
from store import jobs
from store.database import transaction
from store.states import JobState
from worker.context import ENGINE, Context
from worker.prepare import prepare_job
from worker.run_job import run_job

ROWS = [
    {"question": f"is {n} even", "passage": f"The number is {n}.", "answer": n % 2 == 0} for n in range(48)
]
HEFT = {"lora": {"n_epochs": 2, "batch_size": 8}, "reft": {"n_epochs": 2, "batch_size": 8}}


@pytest.fixture
def real(bench: Bench, tiny_llama_dir: Path) -> Context:
    return replace(bench.with_settings(model_dir=tiny_llama_dir.parent), engine_command=ENGINE)


def test_a_job_from_its_files_to_its_model(bench: Bench, real: Context) -> None:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    method = {"type": "heft", "heft": HEFT}
    job_id = bench.created(content, model="llama", method=method, test_file="sample:passages:test")
    prepared = prepare_job(real, job_id)
    assert prepared is not None
    assert prepared.validation is not None
    kept = prepared.validation["files"]["test_file"]
    assert (kept["reference"], kept["rows"]) == ("sample:passages:test", 200)
    assert real.artifacts.children(f"prepared/{job_id}") == [kept["sha256"]]
    run_job(real, job_id)
    job = bench.job(job_id)
    assert job.state == JobState.SUCCEEDED, job.error
    assert job.evaluation is not None
    assert [result["stage"] for result in job.evaluation["results"]] == ["base", "lora", "reft"]
    assert (job.evaluation["split"], job.evaluation["n"]) == ("test", 200)
    assert [one.model_id.rpartition(":")[2] for one in bench.checkpoints(job_id) if one.model_id] == [
        "ckpt-lora",
        "ckpt-reft",
    ]
    assert set(job.metrics) == {"base", "lora", "reft"}
    assert "stages" in job.resolved


def test_paused_and_resumed_a_job_has_the_losses_of_the_library(
    bench: Bench, real: Context, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    stage = {"n_epochs": 12, "batch_size": 8, "dropout": 0.1}
    config = TrainConfig(model="llama", stages=[LoraStage(**stage)], method="lora", dtype="float32")
    losses: list[tuple[int, float]] = []

    def hear(event: Event) -> None:
        if event.code == "METRICS":
            losses.append((event.data["step"], event.data["loss"]))

    rows = [parse_row(row) for row in ROWS]
    heft_engine.train(config, rows, [], tmp_path / "out", hear, model_dir=tiny_llama_dir.parent)

    method = {"type": "lora", "lora": stage}
    job_id = bench.queued(ROWS, model="llama", method=method, dtype="float32")
    attempt = bench.start(job_id, real)
    bench.saw(job_id, "EPOCH_COMPLETE")
    with transaction(real.sessions) as session:
        jobs.request_pause(session, owner_id=OWNER, job_id=job_id)
    attempt.result(60)
    assert bench.job(job_id).state == JobState.PAUSED
    assert 6 <= bench.checkpoints(job_id)[-1].step < len(losses), "it was in the middle"
    with transaction(real.sessions) as session:
        jobs.resume(session, owner_id=OWNER, job_id=job_id)
    job = bench.run(job_id, real)
    assert job.state == JobState.SUCCEEDED, job.error
    table = [line for line in bench.results(job) if line["train_loss"]]
    assert [(int(line["step"]), float(line["train_loss"])) for line in table] == losses
