"""The diagnostics of a job's model: which of the job's rows they look at, and report and plots as one JSON file.

Built as archives are (`worker.jobs.export`). It does NOT compute: the engine does.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from sqlalchemy.orm import Session

from store.db.tables import Job
from store.errors import NotFound
from store.jobs.spec import TrainingSpec
from store.storage import files
from store.storage.artifacts import prepared_key

#: Rows that nobody trained on say more; the first of these that the job has.
_FIELDS = ("validation_file", "test_file", "training_file")
_REPORT = "diagnostics.json"


def rows_of(session: Session, job_id: str) -> tuple[str, str]:
    """Storage key and SHA-256 of the rows to look at. Raises NotFound when they have been deleted for good."""
    job = session.get(Job, job_id)
    if job is None:
        raise NotFound(f"no fine-tuning job {job_id!r}", param="fine_tuning_job_id", code="job_not_found")
    spec = TrainingSpec.model_validate(job.spec)
    field, reference = next((name, value) for name in _FIELDS if (value := getattr(spec, name)))
    if reference.startswith("file-"):
        row = files.for_job(session, owner_id=job.owner_id, file_id=reference)
        return row.storage_key, row.sha256
    sha256 = (job.validation or {})["files"][field]["sha256"]
    return prepared_key(job_id, sha256), sha256


def join(directory: Path, path: Path) -> Path:
    """The report with its plots in it, as `data:` addresses that a page can show."""
    report = json.loads((directory / _REPORT).read_text())
    pictures = {plot.stem: base64.b64encode(plot.read_bytes()).decode() for plot in directory.glob("*.png")}
    plots = {name: f"data:image/png;base64,{picture}" for name, picture in sorted(pictures.items())}
    path.write_text(json.dumps({**report, "object": "fine_tuning.job.diagnostics", "plots": plots}))
    return path
