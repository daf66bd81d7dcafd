"""The worker with the real engine on a tiny model: a job from its files to its model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from worker_bench import OWNER, Bench

import heft_engine
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import LoraStage, ReftStage, TrainConfig
from heft_engine.data.rows import parse_row
from heft_engine.events import Event
from store import models
from store.db.session import transaction
from store.db.states import JobState
from store.db.tables import Job, StageResult
from store.jobs import jobs, stage_results
from worker.celery_app import Role
from worker.chores.presence import offer_base_models, registered
from worker.context import ENGINE, Context
from worker.jobs.prepare import prepare_job

ROWS = [
    {"question": f"is {n} even", "passage": f"The number is {n}.", "answer": n % 2 == 0} for n in range(48)
]
HEFT = {"lora": {"n_epochs": 2, "batch_size": 8}, "reft": {"n_epochs": 2, "batch_size": 8}}


@pytest.fixture
def real(bench: Bench, tiny_llama_dir: Path) -> Context:
    return replace(bench.with_settings(model_dir=tiny_llama_dir.parent), engine_command=ENGINE)


def test_a_job_from_its_files_to_its_model_with_a_pause(
    bench: Bench, real: Context, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Validated, paused in its first stage, resumed, evaluated; its losses are those of the library."""
    lora, reft = {"n_epochs": 6, "batch_size": 8, "dropout": 0.1}, {"n_epochs": 2, "batch_size": 8}
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    validation_file = bench.uploaded(content)
    job_id = bench.created(
        content,
        model="llama",
        method={"type": "heft", "heft": {"lora": lora, "reft": reft}},
        dtype="float32",
        validation_file=validation_file,
        test_file="sample:passages:test",
    )
    prepared = prepare_job(real, job_id)
    assert prepared is not None
    assert prepared.validation is not None
    test_rows = prepared.validation["files"]["test_file"]
    assert (test_rows["reference"], test_rows["rows"]) == ("sample:passages:test", 200)
    assert real.artifacts.children(f"prepared/{job_id}") == [test_rows["sha256"]]

    attempt = bench.start(job_id, real)
    bench.saw(job_id, "EPOCH_COMPLETE")
    with transaction(real.sessions) as session:
        jobs.request_pause(session, owner_id=OWNER, job_id=job_id)
    attempt.result(60)
    assert bench.job(job_id).state == JobState.PAUSED
    paused_at = bench.checkpoints(job_id)[-1]
    assert 6 <= paused_at.step < 36, "in the middle of the first stage"
    assert paused_at.metrics["train_loss"] > 0
    with transaction(real.sessions) as session:
        jobs.resume(session, owner_id=OWNER, job_id=job_id)
    job = bench.run(job_id, real)

    assert job.state == JobState.SUCCEEDED, job.error
    assert job.evaluation is not None
    assert [result["stage"] for result in job.evaluation["results"]] == ["base", "lora", "reft"]
    assert (job.evaluation["split"], job.evaluation["n"]) == ("test", 200)
    stage_ends = [checkpoint for checkpoint in bench.checkpoints(job_id) if checkpoint.kind == "stage"]
    model_ids = [str(checkpoint.model_id) for checkpoint in stage_ends]
    assert [model_id.rpartition(":")[2] for model_id in model_ids] == ["ckpt-lora", "ckpt-reft"]
    table = bench.results(job)
    for checkpoint in stage_ends:
        lines = [line for line in table if line["step"] == str(checkpoint.step)]
        (line,) = [line for line in lines if line["train_loss"]]
        right = checkpoint.metrics["valid_accuracy"] * len(ROWS)
        assert right == pytest.approx(round(right)), "the share of right answers"
        assert checkpoint.metrics == {
            "valid_accuracy": checkpoint.metrics["valid_accuracy"],
            "step": checkpoint.step,
            "train_loss": float(line["train_loss"]),
            "train_mean_token_accuracy": float(line["train_accuracy"]),
            "valid_loss": float(line["valid_loss"]),
            "valid_mean_token_accuracy": float(line["valid_mean_token_accuracy"]),
            "full_valid_loss": float(line["valid_loss"]),
            "full_valid_mean_token_accuracy": float(line["valid_mean_token_accuracy"]),
        }
    epoch_ends = [row for row in bench.checkpoints(job_id) if row.kind == "epoch" and row.removed_at is None]
    assert {24, 30, 42} <= {row.step for row in epoch_ends}, "the last three, and the best"
    for row in epoch_ends:
        assert "heft.json" in real.artifacts.children(f"{row.storage_key}/bundle")
    assert set(job.metrics) == {"base", "lora", "reft"}
    assert "stages" in job.resolved
    losses = [(int(line["step"]), float(line["train_loss"])) for line in table if line["train_loss"]]
    assert losses == library_losses([LoraStage(**lora), ReftStage(**reft)], tmp_path, tiny_llama_dir.parent)


def library_losses(
    stages: list[LoraStage | ReftStage], folder: Path, models: Path
) -> list[tuple[int, float]]:
    losses: list[tuple[int, float]] = []

    def on_event(event: Event) -> None:
        if event.code == "METRICS":
            losses.append((event.data["step"], event.data["loss"]))

    config = TrainConfig(model="llama", stages=stages, method="heft", dtype="float32")
    rows = [parse_row(row) for row in ROWS]
    heft_engine.train(config, rows, [], folder / "out", on_event, options=RunOptions(model_dir=models))
    return losses


def queued(bench: Bench, **reft: Any) -> str:
    """A HEFT job that reports on its own rows."""
    test_file = bench.uploaded("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    method = {"type": "heft", "heft": HEFT | {"reft": HEFT["reft"] | reft}}
    return bench.queued(ROWS, model="llama", method=method, dtype="float32", test_file=test_file)


def test_a_sweep_pays_for_its_first_stage_once(
    bench: Bench, real: Context, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    first = bench.run(queued(bench), real)
    assert trained_stages(bench, first) == {"lora", "reft"}
    prefills = sorted(real.activation_folder.iterdir())
    assert len(prefills) == 1, "of the training rows"
    second = bench.run(queued(bench, rank=3), real)
    assert trained_stages(bench, second) == {"reft"}
    assert sorted(real.activation_folder.iterdir()) == prefills, "taken over"

    stages = [LoraStage(**HEFT["lora"]), ReftStage(**HEFT["reft"], rank=3)]
    config = TrainConfig(model="llama", stages=stages, method="heft", dtype="float32")
    rows = [parse_row(row) for row in ROWS]
    plain = heft_engine.train(
        config,
        rows,
        [],
        tmp_path / "plain",
        lambda _: None,
        test_rows=rows,
        options=RunOptions(model_dir=tiny_llama_dir.parent),
    )
    files = [
        plain.path / name for name in ("lora/adapter_model.safetensors", "reft/intervention.safetensors")
    ]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert learned(bench, second) == hashes, "as if it had trained both"
    assert second.evaluation == plain.info.evaluation
    told = [line for line in bench.results(second) if line["accuracy"]]
    assert [(line["stage"], line["step"]) for line in told] == [("base", "0"), ("lora", "12"), ("reft", "24")]
    assert first.trained_tokens is not None
    assert second.trained_tokens == first.trained_tokens // 2, "those of its own stage"
    checkpoints = [checkpoint for checkpoint in bench.checkpoints(second.id) if checkpoint.model_id]
    models = [(checkpoint.step, str(checkpoint.model_id).rpartition(":")[2]) for checkpoint in checkpoints]
    assert models == [(12, "ckpt-lora"), (18, "ckpt-step-18"), (24, "ckpt-reft")]


@pytest.mark.slow
def test_a_job_that_reused_a_stage_is_paused_and_goes_on(bench: Bench, real: Context) -> None:
    straight = bench.run(queued(bench, n_epochs=30), real)
    with transaction(real.sessions) as session:
        # What the job ends with would be reused too.
        _, last = session.scalars(select(StageResult).order_by(StageResult.created_at))
        stage_results.remove(session, storage_key=last.storage_key)
    job_id = queued(bench, n_epochs=30)
    attempt = bench.start(job_id, real)
    bench.saw(job_id, "STAGE_REUSED")
    with transaction(real.sessions) as session:
        jobs.request_pause(session, owner_id=OWNER, job_id=job_id)
    attempt.result(60)
    assert bench.job(job_id).state == JobState.PAUSED
    with transaction(real.sessions) as session:
        jobs.resume(session, owner_id=OWNER, job_id=job_id)
    job = bench.run(job_id, real)
    assert job.state == JobState.SUCCEEDED, job.error
    assert bench.codes(job_id).count("STAGE_REUSED") == 1
    assert trained_stages(bench, job) == {"reft"}
    assert learned(bench, job) == learned(bench, straight)


def test_a_dry_run_is_planned_for_the_training_workers_machine(bench: Bench, real: Context) -> None:
    worker = replace(real, worker_id="train-1")
    with registered(worker, Role.TRAIN):
        offer_base_models(worker)
        content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        job_id = bench.created(content, model="llama", method={"type": "heft", "heft": HEFT}, dry_run=True)
        job = prepare_job(real, job_id)
    assert job is not None
    assert job.state == JobState.SUCCEEDED, job.error
    assert job.validation is not None
    estimate = job.validation["estimate"]
    assert (estimate["rows"], estimate["steps"], estimate["fits"]) == (48, 24, True)
    assert estimate["machine"]["host_bytes"] > 0
    lora, reft = estimate["stages"]
    assert (lora["type"], reft["type"]) == ("lora", "reft")
    assert 0 < reft["trained_parameters"] < lora["trained_parameters"]
    assert lora["host_bytes"] > lora["weight_bytes"] > 0


def trained_stages(bench: Bench, job: Job) -> set[str]:
    return {line["stage"] for line in bench.results(job) if line["train_loss"]}


def learned(bench: Bench, job: Job) -> list[str]:
    """The hashes of the adapter and of the intervention of the job's model."""
    with transaction(bench.context.sessions) as session:
        model = models.get(session, owner_id=OWNER, model_id=str(job.fine_tuned_model))
    return [
        model.manifest[name] for name in ("lora/adapter_model.safetensors", "reft/intervention.safetensors")
    ]
