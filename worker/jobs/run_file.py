"""The translation from a user's request (TrainingSpec) to the engine's input (TrainConfig, RunFile, CheckFile)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heft_engine.config.known_datasets import with_dataset_defaults
from heft_engine.config.run_file import LISTEN_FD, SECRET, CheckFile, FileField, MachineSettings, RunFile
from heft_engine.config.train import TrainConfig
from store.jobs.spec import TrainingSpec
from store.settings import StoreSettings

#: Folders of an attempt: checkpoints that the engine writes, and stage results of earlier jobs brought for it.
CHECKPOINTS, STAGES = "checkpoints", "stages"


def reuses(spec: TrainingSpec, settings: StoreSettings) -> bool:
    """True if stage results of earlier jobs are reused and this job's are stored: user and operator both decide."""
    return spec.reuse and settings.reuse_enabled


def train_config(spec: TrainingSpec, *, revision: str | None) -> TrainConfig:
    """Returns the engine's settings. A hub model is pinned to the `revision` that its files were checked with.

    A fine-tuned model's bundle names the revision of its base itself.
    """
    is_open = not spec.goes_on and "/" in spec.model and "@" not in spec.model
    pinned = f"{spec.model}@{revision}" if revision and is_open else None
    return TrainConfig(
        model=pinned or spec.model,
        stages=spec.stages(),
        method=spec.method.engine_method(),
        task=with_dataset_defaults(spec.task, spec.training_file),
        seed=spec.seed,
        max_length=spec.max_length,
        dtype=spec.dtype,
        base_quantization=spec.base_quantization,
        early_stopping=spec.early_stopping,
    )


def hub_revision(validation: Mapping[str, Any] | None) -> str | None:
    """Returns the revision of a hub model that the files were checked with. validation: the report on them."""
    base = (validation or {}).get("base_model") or {}
    return base.get("revision") if base.get("source") == "hub" else None


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of several that train a job together. rendezvous: host:port of machine 0, which listens.

    secret: of the group. listener: on machine 0, the descriptor of the socket that listens at `rendezvous`.
    """

    count: int
    rank: int
    rendezvous: str
    secret: str = field(repr=False)
    listener: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The variables of this machine's processes that no run file has: the secret, and the socket."""
        variables = {SECRET: self.secret}
        return variables if self.listener is None else {**variables, LISTEN_FD: str(self.listener)}

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that this machine's processes inherit."""
        return () if self.listener is None else (self.listener,)


def run_file(
    config: TrainConfig,
    folder: Path,
    rows: Mapping[FileField, Path],
    settings: StoreSettings,
    *,
    start: Path | None = None,
    resume: Path | None = None,
    activation_dir: Path | None = None,
    owner: str = "",
    evaluate_validation: bool = False,
    n_checkpoints: int = 0,
    node: Node | None = None,
) -> RunFile:
    """The input of `python -m heft_engine train`, whose output goes into `folder`, the attempt's own.

    `start`: the bundle of a fine-tuned model that the job goes on from. `resume`: a verified checkpoint to continue
    from. `activation_dir`: the machine's folder of frozen activations; None: stages and activations of earlier jobs are
    not reused. `node`: None where this machine trains alone.
    """
    return RunFile(
        config=config,
        train=rows["training_file"],
        eval=rows.get("validation_file"),
        test=rows.get("test_file"),
        out=folder / "bundle",
        checkpoint_dir=folder / CHECKPOINTS,
        checkpoint_seconds=settings.checkpoint_seconds,
        n_checkpoints=n_checkpoints,
        start=start,
        resume=resume,
        model_dir=settings.model_dir,
        cache_dir=settings.cache_dir,
        cache_memory_bytes=settings.cache_memory_bytes,
        cache_disk_bytes=settings.cache_disk_bytes,
        memory_bytes=settings.train_memory_bytes,
        sharers=settings.trainers,
        processes=settings.train_processes,
        nodes=node.count if node is not None else 1,
        node_rank=node.rank if node is not None else 0,
        rendezvous=node.rendezvous if node is not None else None,
        max_line_bytes=settings.max_line_bytes,
        stage_dir=folder / STAGES if activation_dir else None,
        stages_on_request=activation_dir is not None,
        activation_dir=activation_dir,
        activation_bytes=settings.prefill_bytes,
        owner=owner,
        evaluate_validation=evaluate_validation,
    )


def check_file(
    spec: TrainingSpec,
    files: Mapping[FileField, str],
    out: Path,
    settings: StoreSettings,
    *,
    start: Path | None = None,
    machine: Mapping[str, Any] | None = None,
) -> CheckFile:
    """The input of `python -m heft_engine check`. `files`: a path or a reference for each field. `start`: as in
    `run_file`. `machine`: what the run is planned for.
    """
    return CheckFile(
        config=train_config(spec, revision=None),
        start=start,
        files=dict(files),
        out=out,
        machine=None if machine is None else MachineSettings.model_validate(machine),
        max_rows=settings.max_rows,
        max_line_bytes=settings.max_line_bytes,
        model_dir=settings.model_dir,
        cache_dir=settings.cache_dir,
    )
