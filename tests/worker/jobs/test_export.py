"""Exports of models: built once, with an error if that fails, and never twice at a time."""

from __future__ import annotations

import io
import tarfile

import pytest
from worker_bench import OWNER, Bench

from store import exports
from store.db.session import transaction
from store.db.tables import Export
from worker.jobs.export import build_export


@pytest.fixture
def model_id(bench: Bench) -> str:
    """A model that the fake engine trained."""
    job = bench.run(bench.queued([{"do": "metrics", "step": 1}]))
    assert job.fine_tuned_model is not None
    return job.fine_tuned_model


def built(bench: Bench, model_id: str, export_format: str) -> Export:
    with transaction(bench.context.sessions) as session:
        exports.request(session, owner_id=OWNER, model_id=model_id, format=export_format)
    build_export(bench.context, model_id, export_format)
    with transaction(bench.context.sessions) as session:
        export = session.get(Export, (model_id, export_format))
    assert export is not None
    return export


def unpacked(bench: Bench, export: Export) -> dict[str, str]:
    """Returns the files of the export, by name."""
    assert export.state == "ready", export.error
    assert export.storage_key is not None
    content = b"".join(bench.context.artifacts.iter_bytes(export.storage_key))
    assert len(content) == export.bytes
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        files = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
        return {name: file.read().decode() for name, file in files if file is not None}


def test_a_bundle_is_stored_unchanged(bench: Bench, model_id: str) -> None:
    files = unpacked(bench, built(bench, model_id, "bundle"))
    assert {name.partition("/")[2] for name in files} == {"heft.json", "manifest.json"}
    assert {name.partition("/")[0] for name in files} == {f"{model_id.rpartition(':')[2]}-bundle"}


def test_another_format_is_the_output_of_the_engine(bench: Bench, model_id: str) -> None:
    files = unpacked(bench, built(bench, model_id, "merged"))
    assert list(files.values()) == ['{"task": {"type": "yes_no"}}merged']


def test_an_error_of_the_engine_is_the_error_of_the_export(bench: Bench, model_id: str) -> None:
    export = built(bench, model_id, "pyreft")
    assert export.state == "failed"
    assert export.error == {"code": "invalid_config", "message": "no intervention", "param": None}


def test_a_damaged_bundle_is_not_exported(bench: Bench, model_id: str) -> None:
    job_id = next(iter(bench.context.artifacts.children("jobs")))
    bench.context.artifacts.put_stream(f"jobs/{job_id}/2/bundle/heft.json", [b"{}"])
    export = built(bench, model_id, "bundle")
    assert export.state == "failed"
    assert export.error is not None
    assert export.error["code"] == "storage_damaged"


def test_a_repeated_message_builds_nothing(bench: Bench, model_id: str) -> None:
    assert built(bench, model_id, "bundle").attempt == 1
    assert built(bench, model_id, "bundle").attempt == 1
