"""`train`: by arguments for a person, by a run file for the worker."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

from platformdirs import user_cache_path

from heft_engine.commands.arguments import (
    add_child_argument,
    add_machine_arguments,
    add_set_argument,
    at_least,
)
from heft_engine.commands.child_process import dump_stacks_on_signal, report_failures
from heft_engine.commands.json_file import read_json_file
from heft_engine.commands.launch import is_rank, run_ranks
from heft_engine.commands.train_config import config_from_settings
from heft_engine.config.known_datasets import DatasetError, with_dataset_defaults
from heft_engine.config.run_file import FileField, RunFile
from heft_engine.errors import ConfigError

_METHODS = ["heft", "lora", "reft", "heft_reversed", "heft_interleaved"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="smollm2-135m, a directory, a hub id org/name[@revision], or a bundle to go on from"
    )
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
    processes = parser.add_mutually_exclusive_group()
    processes.add_argument("--gpus", type=at_least(1), help="train on so many GPUs of this machine")
    processes.add_argument(
        "--processes", type=at_least(1), help="train in so many processes on its processors"
    )
    parser.add_argument("--nodes", type=at_least(1), default=1, help="machines that train this run together")
    parser.add_argument("--node-rank", type=at_least(0), default=0, help="of this machine: 0 to nodes - 1")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="a free port of machine 0")
    parser.add_argument("--run-file", type=Path, help="a JSON file instead of all of the above")
    add_machine_arguments(parser)
    add_child_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Trains, with events on stdout. SIGTERM and SIGINT end the run at its next step, with a checkpoint.

    Several processes are started from here; each runs this too.
    """
    dump_stacks_on_signal()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if is_rank():
        _train_in_this_process(_read_run_file(args), stop)
        return
    with report_failures():
        run_file = _read_run_file(args)
        if run_file.processes * run_file.nodes > 1:
            _train_in_several_processes(run_file, args.run_file, stop)
            return
    _train_in_this_process(run_file, stop)


def _train_in_this_process(run_file: RunFile, stop: threading.Event) -> None:
    # The process that starts others needs no torch, which takes seconds to import.
    from heft_engine.commands.train_process import train_in_process

    train_in_process(run_file, stop)


def _train_in_several_processes(run_file: RunFile, path: Path | None, stop: threading.Event) -> None:
    with TemporaryDirectory(prefix="heft-run-") as folder:
        if path is None:
            path = Path(folder) / "run.json"
            path.write_text(run_file.model_dump_json())
        run_ranks(run_file, path, stop)


def _read_run_file(args: argparse.Namespace) -> RunFile:
    return _from_arguments(args) if args.run_file is None else read_json_file(args.run_file, RunFile)


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
        device="cuda" if args.gpus else "cpu" if args.processes else args.device,
        processes=args.gpus or args.processes or 1,
        nodes=args.nodes,
        node_rank=args.node_rank,
        rendezvous=args.rendezvous,
        stage_dir=cache_dir / "stages" if args.reuse else None,
        activation_dir=cache_dir / "prefills" if args.reuse else None,
        allow_paths=True,
    )


def _rows_file(args: argparse.Namespace, field: FileField, reference: str) -> Path:
    """Returns a path unchanged; the rows of `hub:…` and `sample:…` are written beside the bundle first."""
    if not reference.startswith(("hub:", "sample:")):
        return Path(reference)
    if is_rank():
        message = (
            f"{field}: {reference} would be written by every process. Give a file, or start with --processes"
        )
        raise ConfigError(message, param=field)
    from heft_engine.preflight.prepare import Directories, write_reference  # torch takes seconds to import

    folder: Path = args.out.parent / f"{args.out.name}-rows"
    folder.mkdir(parents=True, exist_ok=True)
    path = write_reference(field, reference, Directories(out=folder, cache_dir=args.cache_dir))
    assert path is not None
    return path
