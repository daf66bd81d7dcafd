"""What a report is made from: the study as the service shows it, and its jobs' losses. It does NOT draw."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.client import Client, Json

#: Points of a learning curve that are drawn.
_MOST_POINTS = 200

Curve = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """curves: for each arm the training losses of its first seed that has ended, as (step, loss)."""

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
            continue  # of a search's trials only the best is looked at
        ended = next((job["id"] for job in arm["jobs"] if job["status"] == "succeeded"), None)
        if ended is not None and (curve := _curve(client, ended)):
            curves[arm["name"]] = curve
    return Report(study=study, curves=curves)


def _curve(client: Client, job_id: str) -> Curve:
    """The losses of its own steps: a stage that was reused has its losses in the job that trained it."""
    files: list[str] = client.get(f"/v1/fine_tuning/jobs/{job_id}")["result_files"]
    if not files:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.csv"
        client.download(f"/v1/files/{files[0]}/content", path, {})
        return losses(path.read_text())


def losses(table: str) -> Curve:
    """(step, loss) of a job's table, averaged over runs of steps where there are many."""
    rows = [
        (int(row["step"]), float(row["train_loss"]))
        for row in csv.DictReader(io.StringIO(table))
        if row["train_loss"]
    ]
    size = -(-len(rows) // _MOST_POINTS)
    return [_mean(rows[start : start + size]) for start in range(0, len(rows), size or 1)]


def _mean(part: Sequence[tuple[int, float]]) -> tuple[int, float]:
    return part[-1][0], sum(loss for _, loss in part) / len(part)


def layer_and_rank(arm: Json) -> tuple[int, int] | None:
    """Where an arm's one ReFT stage acts and how wide it is; None where that is not one layer."""
    method: dict[str, Any] = arm["method"]
    block = method.get(method["type"], {})
    reft = block if method["type"] == "reft" else block.get("reft") if isinstance(block, dict) else None
    layers = (reft or {}).get("layers")
    return (layers[0], reft["rank"]) if reft and isinstance(layers, list) and len(layers) == 1 else None
