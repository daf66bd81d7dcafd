"""Diagnostics of a job's model: built once, from the job's own rows, with an error if that fails."""

from __future__ import annotations

import base64
import json

import pytest
from worker_bench import OWNER, Bench

from store import exports
from store.db.session import transaction
from store.db.tables import Export
from store.errors import NotFound, WrongState
from worker.jobs.export import build_export

ACT = {"do": "metrics", "step": 1}


def request(bench: Bench, job_id: str) -> Export:
    with transaction(bench.context.sessions) as session:
        return exports.request_diagnostics(session, owner_id=OWNER, job_id=job_id)


def computed(bench: Bench, job_id: str) -> Export:
    export = request(bench, job_id)
    assert export.state == "pending"
    assert build_export(bench.context, export.model_id, export.format)
    return request(bench, job_id)


def finished(bench: Bench, *acts: dict[str, object], **spec: object) -> str:
    return bench.run(bench.queued(list(acts), **spec)).id


def test_the_report_is_one_file_with_its_plots(bench: Bench) -> None:
    export = computed(bench, finished(bench, ACT))
    assert export.state == "ready", export.error
    assert export.storage_key is not None
    assert export.storage_key.endswith(".json")
    content = b"".join(bench.context.artifacts.iter_bytes(export.storage_key))
    assert len(content) == export.bytes
    report = json.loads(content)
    picture = base64.b64encode(b"plot").decode()
    assert report == {
        "object": "fine_tuning.job.diagnostics",
        "rows": 1,
        "plots": {"weights": f"data:image/png;base64,{picture}"},
    }


def test_rows_that_were_not_trained_on_come_first(bench: Bench) -> None:
    """The fake engine fails for two rows: the training file has two, the validation file one."""
    validation_file = bench.uploaded(b'{"question": "q", "answer": "yes"}\n')
    assert computed(bench, finished(bench, ACT, ACT, validation_file=validation_file)).state == "ready"
    export = computed(bench, finished(bench, ACT, ACT))
    assert export.state == "failed"
    assert export.error == {"code": "invalid_config", "message": "too many rows", "param": None}


def test_a_job_without_a_model_has_none(bench: Bench) -> None:
    failed = finished(bench, {"do": "fail", "code": "diverged", "message": "it did"})
    with pytest.raises(WrongState, match="the job is failed") as refused:
        request(bench, failed)
    assert refused.value.code == "job_has_no_model"
    with pytest.raises(NotFound):
        request(bench, "ftjob-none")
    with transaction(bench.context.sessions) as session, pytest.raises(NotFound):
        exports.request_diagnostics(session, owner_id="stranger", job_id=failed)
