"""`python -m heft_engine train`: by flags for a person, by a run file for the worker; one path behind both."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from platformdirs import user_cache_path
from pydantic import BaseModel, ValidationError

from heft_engine.commands.child_process import die_with_parent, dump_stacks_on_signal
from heft_engine.commands.stage_exchange import AskedStages
from heft_engine.commands.telling import print_event, telling_faults
from heft_engine.config.known_datasets import DatasetError, with_dataset_defaults
from heft_engine.config.run_file import FileField, RunFile
from heft_engine.config.train import (
    EarlyStopping,
    LoraStage,
    MethodType,
    ReftStage,
    TaskSettings,
    TrainConfig,
    recipe,
)
from heft_engine.data.rows import Row, read_rows
from heft_engine.errors import ConfigError, RowError

if TYPE_CHECKING:
    from heft_engine.training.activation_store import ActivationStore
    from heft_engine.training.stage_cache import StageStore

S = TypeVar("S", bound=BaseModel)
#: Settings that `--set` leaves to flags of their own.
_FLAGS = ("model", "method", "stages", "seed", "task", "early_stopping")


def run(options: argparse.Namespace) -> None:
    """Trains; events go to stdout. SIGTERM and SIGINT end the run at its next step, with a checkpoint."""
    if options.die_with_parent:
        die_with_parent()
    dump_stacks_on_signal()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with telling_faults():
        _train(_run_file(options), stop)


def _train(run_file: RunFile, stop: threading.Event) -> None:
    from heft_engine.training.run import train

    train(
        run_file.config,
        _read("training_file", run_file.train, run_file),
        _read("validation_file", run_file.eval, run_file),
        run_file.out,
        print_event,
        test_rows=_read("test_file", run_file.test, run_file),
        options=run_file,
        stage_store=_stage_store(run_file, stop),
        activations=_activations(run_file),
        should_stop=stop.is_set,
    )


def _stage_store(run_file: RunFile, stop: threading.Event) -> StageStore | None:
    from heft_engine.training.stage_store import LocalStages

    if run_file.stage_dir is None:
        return None
    if run_file.stages_on_request:
        return AskedStages(directory=run_file.stage_dir, on_event=print_event, should_stop=stop.is_set)
    return LocalStages(directory=run_file.stage_dir)


def _activations(run_file: RunFile) -> ActivationStore | None:
    from heft_engine.training.activation_store import MAX_BYTES, ActivationStore

    if run_file.activation_dir is None or run_file.activation_bytes == 0:
        return None
    return ActivationStore(
        directory=run_file.activation_dir,
        max_bytes=run_file.activation_bytes or MAX_BYTES,
        owner=run_file.owner,
    )


def _read(field: FileField, path: Path | None, run_file: RunFile) -> list[Row]:
    """The rows of a file, none without one. Raises RowError."""
    if path is None:
        return []
    try:
        return read_rows(path, labels=run_file.config.task.labels, max_line_bytes=run_file.max_line_bytes)
    except OSError as error:
        raise RowError(f"{path} can't be read: {error.strerror}", param=field) from error


def _run_file(options: argparse.Namespace) -> RunFile:
    if options.run_file is not None:
        return _read_run_file(options.run_file)
    missing = [name for name in ("model", "train", "out") if getattr(options, name) is None]
    if missing:
        raise ConfigError(f"--{missing[0]} is needed (or --run-file)", param=missing[0])
    config = configure(options.model, options.method, options.set, options.seed)
    try:
        task = with_dataset_defaults(config.task, options.train)
    except DatasetError as fault:
        raise ConfigError(str(fault), param=fault.param) from fault
    cache_dir = options.cache_dir or user_cache_path("heft")
    return RunFile(
        config=config.model_copy(update={"task": task}),
        train=_rows(options, "training_file", options.train),
        eval=_rows(options, "validation_file", options.eval) if options.eval else None,
        test=_rows(options, "test_file", options.test) if options.test else None,
        out=options.out,
        checkpoint_dir=options.checkpoints,
        resume=options.resume,
        model_dir=options.model_dir,
        cache_dir=options.cache_dir,
        device=options.device,
        stage_dir=cache_dir / "stages" if options.reuse else None,
        activation_dir=cache_dir / "prefills" if options.reuse else None,
        allow_paths=True,
    )


def _read_run_file(path: Path) -> RunFile:
    try:
        return RunFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the run file can't be read: {error}", param="run_file") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "run_file"
        raise ConfigError(f"the run file's {where}: {first['msg']}", param=where) from error


def _rows(options: argparse.Namespace, field: FileField, reference: str) -> Path:
    """A path as it is; the rows of `hub:…` and `sample:…` are written beside the bundle first."""
    if not reference.startswith(("hub:", "sample:")):
        return Path(reference)
    from heft_engine.preflight.prepare import Directories, write_reference

    folder: Path = options.out.parent / f"{options.out.name}-rows"
    folder.mkdir(parents=True, exist_ok=True)
    path = write_reference(field, reference, Directories(out=folder, cache_dir=options.cache_dir))
    assert path is not None
    return path


def configure(model: str, method: MethodType, settings: list[str], seed: int) -> TrainConfig:
    """A config from `--set` lines. Raises ConfigError that names the setting at fault."""
    groups: dict[str, dict[str, Any]] = {name: {} for name in ("lora", "reft", "task", "early_stopping", "")}
    for setting in settings:
        name, equals, value = setting.partition("=")
        group, _, field = name.rpartition(".")
        if not equals or group not in groups or name in _FLAGS:
            raise ConfigError(
                f"--set {setting}: write it as lora.rank=8, reft.layers=15 or max_length=512", param=name
            )
        groups[group][field] = _value(value)
    for kind in {"lora", "reft"} - {stage.type for stage in recipe(method)}:
        for field in groups[kind]:
            raise ConfigError(
                f"--set {kind}.{field}: method {method} has no {kind} stage", param=f"{kind}.{field}"
            )
    lora, reft = _made(LoraStage, groups["lora"], "lora."), _made(ReftStage, groups["reft"], "reft.")
    whole = {
        "model": model,
        "method": method,
        "stages": recipe(method, lora, reft),
        "seed": seed,
        **groups[""],
    }
    whole["task"] = _made(TaskSettings, groups["task"], "task.")
    if groups["early_stopping"]:
        whole["early_stopping"] = _made(EarlyStopping, groups["early_stopping"], "early_stopping.")
    return _made(TrainConfig, whole, "")


def _made(kind: type[S], values: dict[str, Any], prefix: str) -> S:
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = prefix + str(first["loc"][0]) if first["loc"] else prefix.rstrip(".")
        known = f"; there are {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"--set {where}: {first['msg']}{known}", param=where) from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
