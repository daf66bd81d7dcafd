"""All checks of a job before it is trained: its base model, its settings and its rows.

Resolves the base model (and downloads or converts it), writes the rows of `hub:` and `sample:` references to files, and
checks every file line by line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heft_engine.config.known_datasets import SPLITS
from heft_engine.config.run_file import FileField
from heft_engine.config.train import TrainConfig
from heft_engine.data import samples
from heft_engine.data.hub import load_hub_rows
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError
from heft_engine.model.auto_settings import resolve_stage
from heft_engine.model.base_models import BaseModel, resolve
from heft_engine.model.families import FAMILIES
from heft_engine.model.model_files import ModelInfo, inspect
from heft_engine.preflight.check_rows import Limits, check_files
from heft_engine.preflight.report import Report


@dataclass(frozen=True, kw_only=True)
class Directories:
    """Directories of a check. `out`: for the rows of references."""

    out: Path
    model_dir: Path | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The result. `written`: the files of references, by field."""

    base: BaseModel
    info: ModelInfo
    report: Report
    written: Mapping[FileField, Path]

    def to_json(self) -> dict[str, Any]:
        """The report as it is stored with the job, with the base model."""
        base = {"reference": self.base.reference, "source": self.base.source, "revision": self.base.revision}
        return {"base_model": {**base, **asdict(self.info)}, **self.report.to_json()}


def prepare(
    config: TrainConfig,
    files: Mapping[FileField, str],
    directories: Directories,
    *,
    base: BaseModel | None = None,
    start_task: Task | None = None,
    limits: Limits | None = None,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> Prepared:
    """Runs all checks. `files` are paths, or references `hub:…` or `sample:…`.

    base, start_task: of the fine-tuned model that the run goes on from; None: `config.model` is a base.
    Faults of rows are in the report (`report.error()`). Raises EngineError for everything else: a model or a dataset
    that is not available, a task or a setting that does not fit.
    """
    if base is None:
        base = resolve(config.model, model_dir=directories.model_dir, cache_dir=directories.cache_dir)
    info = inspect(base.path)
    for stage in config.stages:
        resolve_stage(
            stage,
            FAMILIES[info.model_type],
            n_layers=info.n_layers,
            hidden_size=info.hidden_size,
            parameters=info.parameters,
        )
    if config.early_stopping is not None and "validation_file" not in files:
        raise ConfigError("early_stopping needs a validation_file", param="early_stopping")
    written = {
        name: path
        for name, reference in files.items()
        if (path := write_reference(name, reference, directories)) is not None
    }
    paths = {name: Path(reference) for name, reference in files.items()} | written
    report = check_files(
        paths["training_file"],
        paths.get("validation_file"),
        paths.get("test_file"),
        model_path=base.path,
        task=config.task,
        start_task=start_task,
        max_length=config.max_length,
        limits=limits,
        on_progress=on_progress,
    )
    stopping = config.early_stopping
    if stopping is not None and report.task and (reason := stopping.task_error(report.task)):
        raise ConfigError(reason, param="early_stopping.metric")
    return Prepared(base=base, info=info, report=report, written=written)


def write_reference(name: FileField, reference: str, directories: Directories) -> Path | None:
    """Writes the rows of a `hub:…` or `sample:…` reference to a file in `out`. None for a path. Raises EngineError."""
    rows = _referenced_rows(name, reference, directories.cache_dir)
    return _write(rows, directories.out / f"{name}.jsonl") if rows is not None else None


def _referenced_rows(
    name: FileField, reference: str, cache_dir: Path | None
) -> Iterable[dict[str, Any]] | None:
    """Returns the rows of a reference, or None for a path."""
    source, _, rest = reference.partition(":")
    if source == "sample":
        sample, _, split = rest.partition(":")
        return samples.generate(sample, split or SPLITS[name])
    if source == "hub":
        return load_hub_rows(rest, name, cache_dir=cache_dir)
    return None


def _write(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
