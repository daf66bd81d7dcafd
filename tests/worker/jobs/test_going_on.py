"""The worker with the real engine: jobs that go on from models of other jobs, which are deleted meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worker_bench import OWNER, Bench

from heft_engine.serving.predictor import load
from store import models
from store.db.session import transaction
from store.db.states import JobState
from store.db.tables import Job
from store.storage import garbage
from worker.context import ENGINE, Context
from worker.jobs.prepare import prepare_job

ROWS = [
    {"question": f"is {n} even", "passage": f"The number is {n}.", "answer": n % 2 == 0} for n in range(24)
]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LORA = {"type": "lora", "lora": {"n_epochs": 1, "batch_size": 8}}
REFT = {"type": "reft", "reft": {"n_epochs": 1, "batch_size": 8}}


@pytest.fixture
def real(bench: Bench, tiny_llama_dir: Path) -> Context:
    return replace(bench.with_settings(model_dir=tiny_llama_dir.parent), engine_command=ENGINE)


def created(bench: Bench, model: str, **settings: Any) -> str:
    return bench.created(CONTENT, model=model, test_file=bench.uploaded(CONTENT), **settings)


def run(bench: Bench, real: Context, job_id: str) -> Job:
    prepare_job(real, job_id)
    return bench.run(job_id, real)


def delete(bench: Bench, model_id: str) -> None:
    """Deletes a model, and its bytes unless they are needed."""
    with transaction(bench.context.sessions) as session:
        models.delete(session, owner_id=OWNER, model_id=model_id)
    garbage.collect(bench.context.sessions, bench.context.artifacts)


def fetched(bench: Bench, job: Job, path: Path) -> Path:
    """Returns the bundle of the job's model."""
    with transaction(bench.context.sessions) as session:
        model = models.get(session, owner_id=OWNER, model_id=str(job.fine_tuned_model))
    bench.context.artifacts.fetch_directory(str(model.storage_key), path, model.manifest)
    return path


def test_a_job_goes_on_from_a_checkpoint_that_is_deleted_meanwhile(
    bench: Bench, real: Context, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    first = run(bench, real, created(bench, "llama", method=LORA, dtype="float32", max_length=64))
    start = f"{first.fine_tuned_model}:ckpt-lora"
    second_id = created(bench, start, method=REFT)
    for model_id in (start, str(first.fine_tuned_model)):
        delete(bench, model_id)
    second = run(bench, real, second_id)
    assert second.state == JobState.SUCCEEDED, second.error
    assert second.evaluation is not None
    assert first.evaluation is not None
    results = [(each["stage"], each["accuracy"]) for each in second.evaluation["results"]]
    assert results[0] == ("start", first.evaluation["results"][-1]["accuracy"])
    assert [stage for stage, _ in results] == ["start", "reft"]
    assert second.resolved["max_length"] == 64

    garbage.collect(bench.context.sessions, bench.context.artifacts)
    assert not bench.context.artifacts.children(f"{bench.checkpoints(first.id)[-1].storage_key}/bundle")
    predictor = load(
        fetched(bench, second, tmp_path / "second"), model_dir=tiny_llama_dir.parent, device="cpu"
    )
    assert predictor.encoder.max_length == 64
    info = json.loads((tmp_path / "second" / "heft.json").read_text())
    assert [stage["type"] for stage in info["stages"]] == ["lora", "reft"]
    assert [ancestor["model"] for ancestor in info["started_from"]] == [start]
