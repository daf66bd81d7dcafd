"""Garbage collection: unneeded bytes are deleted from storage, needed ones never."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from store import exports, models
from store.errors import Unavailable
from store.jobs import endings, jobs
from store.storage import files, garbage
from store.storage.artifacts import Artifacts
from store.storage.files import NewFile

OWNER = "team"
SHA = "0" * 64


@pytest.fixture
def artifacts(artifacts_url: str) -> Artifacts:
    return Artifacts(artifacts_url)


def put(artifacts: Artifacts, *keys: str) -> None:
    for key in keys:
        artifacts.put_stream(key, [b"x"])


def stored(artifacts_url: str) -> set[str]:
    root = Path(artifacts_url.removeprefix("file://"))
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_a_deleted_files_bytes_go_with_its_last_job(bench, artifacts: Artifacts, artifacts_url: str) -> None:
    file_id = bench.file()
    put(artifacts, f"files/{file_id}")
    spec = bench.spec.model_copy(update={"training_file": file_id})
    job = bench.do(jobs.create, owner_id=OWNER, spec=spec)
    bench.do(files.delete, owner_id=OWNER, file_id=file_id)
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == {f"files/{file_id}"}
    bench.do(jobs.request_cancel, owner_id=OWNER, job_id=job.id)
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == set()
    assert bench.do(files.purgeable) == []


def test_old_checkpoints_go_and_the_newest_stay(bench, artifacts: Artifacts, artifacts_url: str) -> None:
    claim = bench.running()
    prefix = f"jobs/{claim.job_id}/{claim.attempt}"
    for step in (10, 20, 30):
        put(artifacts, f"{prefix}/step-{step}/state.bin")
        bench.checkpoint(claim, step)
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == {f"{prefix}/step-20/state.bin", f"{prefix}/step-30/state.bin"}
    bench.do(endings.finish_failed, claim, error={"code": "x", "message": "m", "param": None})
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == set()


def test_a_deleted_model_takes_its_bytes_and_archives(
    bench, artifacts: Artifacts, artifacts_url: str
) -> None:
    claim = bench.running()
    prefix = f"jobs/{claim.job_id}/{claim.attempt}"
    bench.checkpoint(claim, 10, "stage")
    put(artifacts, f"{prefix}/stage-10/bundle/heft.json", f"{prefix}/stage-10/state.bin")
    put(artifacts, f"{prefix}/bundle/heft.json", "exports/a.tar")
    final = bench.succeed(claim).fine_tuned_model
    bench.do(exports.request, owner_id=OWNER, model_id=final, format="peft")
    export = bench.do(exports.claim, model_id=final, format="peft")
    bench.do(exports.finish, export, storage_key="exports/a.tar", size=1)
    garbage.collect(bench.factory, artifacts)
    assert len(stored(artifacts_url)) == 4
    bench.do(models.delete, owner_id=OWNER, model_id=final)
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == {f"{prefix}/stage-10/bundle/heft.json", f"{prefix}/stage-10/state.bin"}
    bench.do(models.delete, owner_id=OWNER, model_id=f"{final}:ckpt-lora")
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == set()


def test_the_files_of_a_replaced_epoch_stay_while_a_worker_may_read_them(
    bench, artifacts: Artifacts, artifacts_url: str
) -> None:
    claim = bench.running()
    prefix = f"jobs/{claim.job_id}/{claim.attempt}"
    for step in (10, 20, 30, 40):
        put(artifacts, f"{prefix}/epoch-{step}/state.bin")
        bench.checkpoint(claim, step, "epoch")
    garbage.collect(bench.factory, artifacts)
    assert len(stored(artifacts_url)) == 4
    bench.sql("UPDATE checkpoints SET removed_at = removed_at - interval '1 hour'")
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == {f"{prefix}/epoch-{step}/state.bin" for step in (20, 30, 40)}


def test_the_checkpoint_of_a_deleted_model_stays_while_its_job_may_resume_from_it(
    bench, artifacts: Artifacts, artifacts_url: str
) -> None:
    claim = bench.running()
    bench.checkpoint(claim, 10, "stage")
    put(artifacts, f"jobs/{claim.job_id}/{claim.attempt}/stage-10/state.bin")
    [row] = bench.sql("SELECT id FROM models")
    bench.do(models.delete, owner_id=OWNER, model_id=row.id)
    garbage.collect(bench.factory, artifacts)
    assert len(stored(artifacts_url)) == 1
    bench.succeed(claim)
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == set()


def test_what_an_attempt_left_without_a_row_goes_when_it_is_quiet(
    bench, artifacts: Artifacts, artifacts_url: str
) -> None:
    claim = bench.running()
    prefix = f"jobs/{claim.job_id}/{claim.attempt}"
    named = {f"{prefix}/bundle/heft.json", f"{prefix}/result.csv"}
    put(artifacts, *named, f"{prefix}/step-99/state.bin", f"{prefix}/bundle-2/heft.json")
    result_file = NewFile(
        file_id="file-r", filename="result.csv", size=1, sha256=SHA, storage_key=f"{prefix}/result.csv"
    )
    bench.do(
        endings.finish_succeeded,
        claim,
        storage_key=f"{prefix}/bundle",
        manifest={"heft.json": SHA},
        task={},
        result={},
        result_file=result_file,
    )
    garbage.collect(bench.factory, artifacts)
    assert len(stored(artifacts_url)) == 4  # a zombie of it may still be writing
    bench.sql("UPDATE attempts SET ended_at = now() - interval '11 minutes'")
    garbage.collect(bench.factory, artifacts)
    assert stored(artifacts_url) == named
    assert bench.attempt(claim.job_id, claim.attempt).swept_at is not None


def test_what_a_running_attempt_writes_is_left_alone(bench, artifacts: Artifacts, artifacts_url: str) -> None:
    claim = bench.running()
    put(artifacts, f"jobs/{claim.job_id}/{claim.attempt}/step-1/state.bin")
    garbage.collect(bench.factory, artifacts, quiet_seconds=0)
    assert len(stored(artifacts_url)) == 1


def test_an_upload_that_got_no_row_goes_after_a_day(bench, artifacts: Artifacts, artifacts_url: str) -> None:
    known = bench.file()
    put(artifacts, f"files/{known}", "files/file-without-row")
    garbage.collect_uploads(bench.factory, artifacts)
    assert len(stored(artifacts_url)) == 2
    yesterday = time.time() - 86_401
    for path in (Path(artifacts_url.removeprefix("file://")) / "files").iterdir():
        os.utime(path, (yesterday, yesterday))
    garbage.collect_uploads(bench.factory, artifacts)
    assert stored(artifacts_url) == {f"files/{known}"}


def test_an_archive_that_got_no_row_goes_after_a_day(bench, artifacts: Artifacts, artifacts_url: str) -> None:
    model_id = bench.succeed(bench.running()).fine_tuned_model
    bench.do(exports.request, owner_id=OWNER, model_id=model_id, format="merged")
    claim = bench.do(exports.claim, model_id=model_id, format="merged")
    bench.do(exports.finish, claim, storage_key="exports/job/mine.tar", size=1)
    put(artifacts, "exports/job/mine.tar", "exports/job/lost.tar")
    garbage.collect_archives(bench.factory, artifacts)
    assert "exports/job/lost.tar" in stored(artifacts_url)
    yesterday = time.time() - 90_000
    for name in ("mine", "lost"):
        os.utime(
            Path(artifacts_url.removeprefix("file://")) / f"exports/job/{name}.tar", (yesterday, yesterday)
        )
    garbage.collect_archives(bench.factory, artifacts)
    assert stored(artifacts_url) == {"exports/job/mine.tar"}


def test_rows_made_for_a_job_go_when_it_has_ended(bench, artifacts: Artifacts, artifacts_url: str) -> None:
    claim = bench.running()
    put(artifacts, f"prepared/{claim.job_id}/{SHA}")
    garbage.collect_prepared(bench.factory, artifacts)
    assert stored(artifacts_url) == {f"prepared/{claim.job_id}/{SHA}"}
    bench.do(endings.finish_cancelled, claim)
    garbage.collect_prepared(bench.factory, artifacts)
    assert stored(artifacts_url) == set()


def test_a_row_is_not_forgotten_before_its_bytes_are_gone(bench, artifacts: Artifacts, monkeypatch) -> None:
    file_id = bench.file()
    bench.do(files.delete, owner_id=OWNER, file_id=file_id)

    def away(_prefix: str) -> None:
        raise Unavailable("the artifact storage does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(artifacts, "delete", away)
        with pytest.raises(Unavailable):
            garbage.collect(bench.factory, artifacts)
    assert [file.id for file in bench.do(files.purgeable)] == [file_id]
    garbage.collect(bench.factory, artifacts)
    assert bench.do(files.purgeable) == []
