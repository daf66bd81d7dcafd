"""Diagnostics of a job, as the engine writes them, and pending diagnostics."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Diagnostics(BaseModel):
    """`before`: the base; `after`: the base with all LoRA stages merged. Parts without a stage in the model are null.
    Formulas and sources are in `heft_engine/diagnostics`.
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
    plots: dict[str, str]  #: a PNG of each part, as a `data:` URL


class DiagnosticsPending(BaseModel):
    """A worker is computing the diagnostics: retry after `Retry-After` seconds."""

    object: Literal["fine_tuning.job.diagnostics"] = "fine_tuning.job.diagnostics"
    job: str
    status: str
