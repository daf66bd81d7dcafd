"""Jobs that go on from fine-tuned models: which ones are accepted, the names of their results, and retention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from store import models
from store.db.tables import Job
from store.errors import InvalidRequest
from store.jobs import endings, jobs, leases
from store.jobs.spec import TrainingSpec
from store.storage import garbage
from store.storage.artifacts import Artifacts
from store.studies import studies
from store.studies.spec import StudySpec

OWNER = "team"


def going_on(bench: Any, model: str) -> TrainingSpec:
    return TrainingSpec.model_validate({**bench.spec.model_dump(), "model": model, "suffix": "second"})


def create(bench: Any, model: str, owner_id: str = OWNER) -> Job:
    job: Job = bench.do(jobs.create, owner_id=owner_id, spec=going_on(bench, model))
    return job


def trained(bench: Any) -> tuple[str, str]:
    """Returns the ids of a model and of a checkpoint's model of its job."""
    claim = bench.running()
    bench.checkpoint(claim, 10, "stage")
    final = str(bench.succeed(claim).fine_tuned_model)
    return final, f"{final}:ckpt-lora"


def test_the_result_is_named_after_the_base_and_knows_its_start(bench: Any) -> None:
    for start in trained(bench):
        job = create(bench, start)
        assert job.spec["model"] == start
        claim = bench.claim(job.id)
        bench.do(endings.finish_prepared, claim, report={})
        claim = bench.claim(job.id)
        bench.checkpoint(claim, 10, "stage")
        final = str(bench.succeed(claim).fine_tuned_model)
        assert final == f"ft:smollm2-135m:{OWNER}:second:{job.id[-8:]}"
        for model_id in (final, f"{final}:ckpt-lora"):
            model = bench.do(models.get, owner_id=OWNER, model_id=model_id)
            assert (model.base_model, model.started_from) == ("smollm2-135m", start)


@pytest.mark.parametrize("case", ["unknown", "another owner's", "deleted", "a step's checkpoint"])
def test_other_models_are_refused(bench: Any, case: str) -> None:
    final, _ = trained(bench)
    owner, model = OWNER, final
    if case == "unknown":
        model = "ft:smollm2-135m:team::AbCdEfGh"
    elif case == "another owner's":
        owner = "stranger"
    elif case == "deleted":
        bench.do(models.delete, owner_id=OWNER, model_id=final)
    else:
        model = f"{final}:ckpt-step-10"
    with pytest.raises(InvalidRequest) as refusal:
        create(bench, model, owner)
    assert (refusal.value.param, refusal.value.code) == ("model", "model_not_found")
    assert bench.sql("SELECT count(*) FROM jobs WHERE spec->>'model' LIKE 'ft:%'")[0].count == 0


@pytest.mark.parametrize(
    ("settings", "param"),
    [({"dtype": "float32"}, "dtype"), ({"base_quantization": "nf4"}, "base_quantization"), ({}, None)],
)
def test_settings_that_contradict_the_model_s_are_refused(
    bench: Any, settings: dict[str, Any], param: str | None
) -> None:
    claim = bench.running()
    bench.do(leases.record_event, claim, code="STARTED", message="", resolved={"dtype": "bfloat16"})
    final = str(bench.succeed(claim).fine_tuned_model)
    spec = TrainingSpec.model_validate({**going_on(bench, final).model_dump(), **settings})
    if param is None:
        assert bench.do(jobs.create, owner_id=OWNER, spec=spec).spec["model"] == final
        return
    with pytest.raises(InvalidRequest) as refusal:
        bench.do(jobs.create, owner_id=OWNER, spec=spec)
    assert refusal.value.param == param


def test_a_study_goes_on_from_a_model_and_is_planned_by_its_base(bench: Any) -> None:
    final, _ = trained(bench)
    bench.do(
        models.offer_base, model_id="smollm2-135m", source="alias", info={"n_layers": 4, "hidden_size": 8}
    )
    fields = {
        "name": "more",
        "training_file": "sample:passages",
        "test_file": "sample:passages:test",
        "seeds": [1],
        "grid": {"reft.layers": [1, 3]},
    }
    bench.do(studies.create, owner_id=OWNER, spec=StudySpec.model_validate({**fields, "model": final}))
    rows = bench.sql("SELECT spec->>'model' AS model FROM jobs WHERE metadata ? 'study'")
    assert [row.model for row in rows] == [final, final]
    for changes, param in (
        ({"grid": {"reft.layers": [9]}}, "layers"),
        ({"model": "ft:gone:team::x"}, "model"),
    ):
        spec = StudySpec.model_validate({**fields, "model": final, **changes})
        with pytest.raises(InvalidRequest) as refusal:
            bench.do(studies.create, owner_id=OWNER, spec=spec)
        assert param in str(refusal.value.param)


def test_a_deleted_start_keeps_its_bytes_until_the_job_ends(bench: Any, artifacts_url: str) -> None:
    artifacts = Artifacts(artifacts_url)
    claim = bench.running()
    prefix = f"jobs/{claim.job_id}/{claim.attempt}"
    for key in (
        f"{prefix}/bundle/heft.json",
        f"{prefix}/stage-10/state.bin",
        f"{prefix}/stage-10/bundle/heft.json",
    ):
        artifacts.put_stream(key, [b"x"])
    bench.checkpoint(claim, 10, "stage")
    final = str(bench.succeed(claim).fine_tuned_model)
    from_final, from_checkpoint = create(bench, final), create(bench, f"{final}:ckpt-lora")
    for model_id in (final, f"{final}:ckpt-lora"):
        bench.do(models.delete, owner_id=OWNER, model_id=model_id)
    garbage.collect(bench.factory, artifacts)
    assert len(stored(artifacts_url)) == 3
    bench.do(jobs.request_cancel, owner_id=OWNER, job_id=from_final.id)
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == {f"{prefix}/stage-10/bundle/heft.json", f"{prefix}/stage-10/state.bin"}
    bench.do(jobs.request_cancel, owner_id=OWNER, job_id=from_checkpoint.id)
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == set()


def test_a_replaced_epoch_keeps_its_bytes_for_a_job_that_goes_on_from_it(
    bench: Any, artifacts_url: str
) -> None:
    artifacts = Artifacts(artifacts_url)
    claim = bench.running()
    prefix = f"jobs/{claim.job_id}/{claim.attempt}"
    for step in (10, 20):
        artifacts.put_stream(f"{prefix}/epoch-{step}/state.bin", [b"x"])
        bench.checkpoint(claim, step, "epoch")
    rows = bench.sql("SELECT id FROM models ORDER BY created_at")
    first = create(bench, rows[0].id)
    for step in (30, 40, 50):
        bench.checkpoint(claim, step, "epoch")
    bench.sql("UPDATE checkpoints SET removed_at = removed_at - interval '1 hour'")
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == {f"{prefix}/epoch-10/state.bin"}
    bench.do(jobs.request_cancel, owner_id=OWNER, job_id=first.id)
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == set()


def stored(artifacts_url: str) -> set[str]:
    root = Path(artifacts_url.removeprefix("file://"))
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
