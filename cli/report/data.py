"""The data of a report: the study object, and the training losses of its jobs."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.client import Client, Json

#: Points of a learning curve at most.
_MAX_POINTS = 200

Curve = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """curves: (step, training loss) of each arm's first seed that has succeeded."""

    study: Json
    curves: dict[str, Curve]

    @property
    def arms(self) -> list[Json]:
        arms: list[Json] = self.study["arms"]
        return arms

    def to_json(self) -> Json:
        return {**self.study, "curves": self.curves}


def fetch(client: Client, study_id: str) -> Report:
    study = client.get(f"/v1/studies/{study_id}")
    curves = {}
    for arm in study["arms"]:
        if arm.get("trial") and arm["accuracy"] is None:
            continue  # only the best trial of a search is evaluated
        job_id = next((job["id"] for job in arm["jobs"] if job["status"] == "succeeded"), None)
        if job_id is not None and (curve := _curve(client, job_id)):
            curves[arm["name"]] = curve
    return Report(study=study, curves=curves)


def _curve(client: Client, job_id: str) -> Curve:
    """The losses of the job's own steps; those of a reused stage belong to the job that trained it."""
    files: list[str] = client.get(f"/v1/fine_tuning/jobs/{job_id}")["result_files"]
    if not files:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.csv"
        client.download(f"/v1/files/{files[0]}/content", path, {})
        return losses(path.read_text())


def losses(table: str) -> Curve:
    """Returns (step, loss) from a job's CSV table, averaged over neighbouring steps if there are many."""
    rows = [
        (int(row["step"]), float(row["train_loss"]))
        for row in csv.DictReader(io.StringIO(table))
        if row["train_loss"]
    ]
    size = -(-len(rows) // _MAX_POINTS)
    return [_mean(rows[start : start + size]) for start in range(0, len(rows), size or 1)]


def _mean(points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    return points[-1][0], sum(loss for _, loss in points) / len(points)


def layer_and_rank(arm: Json) -> tuple[int, int] | None:
    """Returns layer and rank of an arm's ReFT stage; None without one, or with several layers."""
    method: dict[str, Any] = arm["method"]
    settings = method.get(method["type"], {})
    reft = settings if method["type"] == "reft" else settings.get("reft")
    layers = (reft or {}).get("layers")
    if not isinstance(layers, list) or len(layers) != 1:
        return None
    return layers[0], reft["rank"]
