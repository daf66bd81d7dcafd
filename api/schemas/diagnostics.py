"""Diagnostics of a job, as the engine wrote them, and the answer while a worker computes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Diagnostics(BaseModel):
    """`before` is the base, `after` the base with every LoRA stage merged. A part that the model has no stage for is
    missing. Formulas and sources are in `heft_engine/diagnostics`.
    """

    object: Literal["fine_tuning.job.diagnostics"] = "fine_tuning.job.diagnostics"
    method: str
    base_model: dict[str, Any]
    rows: int
    stage_two: dict[str, Any]
    weights: dict[str, Any] | None = None
    representations: dict[str, Any] | None = None
    curvature: dict[str, Any] | None = None
    descent: dict[str, Any] | None = None
    forgetting: dict[str, Any] | None = None
    plots: dict[str, str]  #: PNG by part, as `data:` addresses


class DiagnosticsPending(BaseModel):
    """Ask again after `Retry-After` seconds."""

    object: Literal["fine_tuning.job.diagnostics"] = "fine_tuning.job.diagnostics"
    job: str
    status: str
