"""`train`: by arguments for a person, by a run file for the worker."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from platformdirs import user_cache_path

from heft_engine.commands.arguments import add_child_argument, add_machine_arguments, add_set_argument
from heft_engine.commands.child_process import dump_stacks_on_signal, print_event, report_failures
from heft_engine.commands.json_file import read_json_file
from heft_engine.commands.stage_exchange import RequestedStages
from heft_engine.commands.train_config import config_from_settings
from heft_engine.config.known_datasets import DatasetError, with_dataset_defaults
from heft_engine.config.run_file import FileField, RunFile
from heft_engine.data.rows import Row, read_rows
from heft_engine.errors import ConfigError, RowError
from heft_engine.preflight.prepare import Directories, write_reference
from heft_engine.training.activation_store import MAX_BYTES, ActivationStore
from heft_engine.training.run import train
from heft_engine.training.stage_cache import StageStore
from heft_engine.training.stage_store import LocalStages

_METHODS = ["heft", "lora", "reft", "heft_reversed", "heft_interleaved"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="smollm2-135m, a directory, or a hub id org/name[@revision]")
    parser.add_argument(
        "--train", help="training rows: a file of JSON lines, hub:google/boolq:train or sample:passages"
    )
    parser.add_argument("--eval", help="validation rows, for early stopping and calibration")
    parser.add_argument("--test", help="test rows, for the reported evaluation alone")
    parser.add_argument("--method", default="heft", choices=_METHODS)
    add_set_argument(parser, "lora.rank=8, reft.layers=15, max_length=512 …")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--checkpoints", type=Path, help="a folder for checkpoints")
    parser.add_argument("--resume", type=Path, help="a checkpoint directory to continue from")
    parser.add_argument(
        "--no-reuse",
        dest="reuse",
        action="store_false",
        help="train every stage, even one that an equal run has trained before; and store none for later runs",
    )
    parser.add_argument("--run-file", type=Path, help="a JSON file instead of all of the above")
    add_machine_arguments(parser)
    add_child_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Trains, with events on stdout. SIGTERM and SIGINT end the run at its next step, with a checkpoint."""
    dump_stacks_on_signal()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with report_failures():
        run_file = _from_arguments(args) if args.run_file is None else read_json_file(args.run_file, RunFile)
        _train(run_file, stop)


def _train(run_file: RunFile, stop: threading.Event) -> None:
    train(
        run_file.config,
        _read("training_file", run_file.train, run_file),
        _read("validation_file", run_file.eval, run_file),
        run_file.out,
        print_event,
        test_rows=_read("test_file", run_file.test, run_file),
        options=run_file,
        stage_store=_stage_store(run_file, stop),
        activations=_activation_store(run_file),
        should_stop=stop.is_set,
    )


def _stage_store(run_file: RunFile, stop: threading.Event) -> StageStore | None:
    if run_file.stage_dir is None:
        return None
    if run_file.stages_on_request:
        return RequestedStages(directory=run_file.stage_dir, on_event=print_event, should_stop=stop.is_set)
    return LocalStages(directory=run_file.stage_dir)


def _activation_store(run_file: RunFile) -> ActivationStore | None:
    if run_file.activation_dir is None or run_file.activation_bytes == 0:
        return None
    return ActivationStore(
        directory=run_file.activation_dir,
        max_bytes=run_file.activation_bytes or MAX_BYTES,
        owner=run_file.owner,
    )


def _read(field: FileField, path: Path | None, run_file: RunFile) -> list[Row]:
    """Returns the rows of a file, none for None. Raises RowError."""
    if path is None:
        return []
    try:
        return read_rows(path, labels=run_file.config.task.labels, max_line_bytes=run_file.max_line_bytes)
    except OSError as error:
        raise RowError(f"{path} can't be read: {error.strerror}", param=field) from error


def _from_arguments(args: argparse.Namespace) -> RunFile:
    """Raises ConfigError and RowError that name the argument at fault."""
    for name in ("model", "train", "out"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is needed (or --run-file)", param=name)
    config = config_from_settings(args.model, args.method, args.set, args.seed)
    try:
        task = with_dataset_defaults(config.task, args.train)
    except DatasetError as error:
        raise ConfigError(str(error), param=error.param) from error
    cache_dir = args.cache_dir or user_cache_path("heft")
    return RunFile(
        config=config.model_copy(update={"task": task}),
        train=_rows_file(args, "training_file", args.train),
        eval=_rows_file(args, "validation_file", args.eval) if args.eval else None,
        test=_rows_file(args, "test_file", args.test) if args.test else None,
        out=args.out,
        checkpoint_dir=args.checkpoints,
        resume=args.resume,
        model_dir=args.model_dir,
        cache_dir=args.cache_dir,
        device=args.device,
        stage_dir=cache_dir / "stages" if args.reuse else None,
        activation_dir=cache_dir / "prefills" if args.reuse else None,
        allow_paths=True,
    )


def _rows_file(args: argparse.Namespace, field: FileField, reference: str) -> Path:
    """Returns a path unchanged; the rows of `hub:…` and `sample:…` are written beside the bundle first."""
    if not reference.startswith(("hub:", "sample:")):
        return Path(reference)
    folder: Path = args.out.parent / f"{args.out.name}-rows"
    folder.mkdir(parents=True, exist_ok=True)
    path = write_reference(field, reference, Directories(out=folder, cache_dir=args.cache_dir))
    assert path is not None
    return path
