"""The one translation from what a user asked for (TrainingSpec) to what the engine runs (TrainConfig, run
file).

It does NOT read files or rows: paths go in, a JSON value comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heft_engine.config.known_datasets import with_dataset_defaults
from heft_engine.config.train import TrainConfig
from store.jobs.spec import TrainingSpec
from store.settings import StoreSettings


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """One attempt's folder on this machine. `resume` is the checkpoint to go on from, verified, or None."""

    folder: Path
    train: Path
    validation: Path | None
    test: Path | None
    resume: Path | None
    #: Of the machine, for all attempts on it: frozen activations of their rows, and whose they are.
    prefills: Path
    owner: str

    @property
    def out(self) -> Path:
        return self.folder / "bundle"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def results(self) -> Path:
        """Where the engine finds what stages of earlier jobs ended with, once it has asked."""
        return self.folder / "results"


def reuses(spec: TrainingSpec, settings: StoreSettings) -> bool:
    """Whether stages of earlier jobs are used, and this job's kept: its user and the operator both decide."""
    return spec.reuse and settings.reuse_enabled


def train_config(spec: TrainingSpec, *, revision: str | None) -> TrainConfig:
    """The engine's settings. A hub model is pinned to the `revision` that its files were checked with."""
    pinned = f"{spec.model}@{revision}" if revision and "/" in spec.model and "@" not in spec.model else None
    return TrainConfig(
        model=pinned or spec.model,
        stages=spec.stages(),
        method=spec.method.engine_method(),
        task=with_dataset_defaults(spec.task, spec.training_file),
        seed=spec.seed,
        max_length=spec.max_length,
        dtype=spec.dtype,
        early_stopping=spec.early_stopping,
    )


def run_file(
    config: TrainConfig,
    run: LocalRun,
    settings: StoreSettings,
    *,
    reuse: bool = False,
    writes_validation: bool = False,
) -> dict[str, Any]:
    """What `python -m heft_engine train --run-file` reads."""
    return {
        "config": config.model_dump(mode="json"),
        "train": str(run.train),
        "eval": _text(run.validation),
        "test": _text(run.test),
        "out": str(run.out),
        "checkpoint_dir": str(run.checkpoints),
        "resume": _text(run.resume),
        "checkpoint_seconds": settings.checkpoint_seconds,
        "model_dir": _text(settings.model_dir),
        "cache_dir": _text(settings.cache_dir),
        "cache_memory_bytes": settings.cache_memory_bytes,
        "cache_disk_bytes": settings.cache_disk_bytes,
        "memory_bytes": settings.train_memory_bytes,
        "sharers": settings.trainers,
        "max_line_bytes": settings.max_line_bytes,
        "results": str(run.results) if reuse else None,
        "results_on_request": reuse,
        "prefills": str(run.prefills) if reuse else None,
        "prefill_bytes": settings.prefill_bytes,
        "owner": run.owner,
        "writes_validation": writes_validation,
    }


def check_file(
    spec: TrainingSpec, files: Mapping[str, str], out: Path, settings: StoreSettings
) -> dict[str, Any]:
    """What `python -m heft_engine check --run-file` reads. `files`: a path or a reference for each field."""
    return {
        "config": train_config(spec, revision=None).model_dump(mode="json"),
        "files": dict(files),
        "out": str(out),
        "max_rows": settings.max_rows,
        "max_line_bytes": settings.max_line_bytes,
        "model_dir": _text(settings.model_dir),
        "cache_dir": _text(settings.cache_dir),
    }


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
