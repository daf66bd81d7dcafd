"""Arguments of `python -m heft_engine`. Exit codes: 0 done, 1 refused or failed, 2 unusable arguments, 75 stopped."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from heft_engine.errors import EngineError, Stopped

STOPPED = 75  #: EX_TEMPFAIL: a checkpoint is there, try again


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a refusal is one JSON line on stderr."""
    options = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except Stopped:
        return STOPPED
    except EngineError as error:
        print(_fault(error), file=sys.stderr)
        return 1
    return 0


def _fault(error: EngineError) -> str:
    return json.dumps({"error": {"code": error.code, "message": error.message, "param": error.param}})


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m heft_engine", description="Fine-tune with HEFT, without the service"
    )
    commands = top.add_subparsers(required=True, metavar="command")
    _add_train(commands.add_parser("train", help="train and write a bundle; one JSON event a line on stdout"))
    for name, help_ in (
        ("evaluate", "accuracy of a bundle on rows with answers"),
        ("predict", "answers for rows on stdin or in a file, one JSON line each"),
        ("export", "a bundle as merged weights, a peft adapter or pyreft's directory"),
    ):
        command = commands.add_parser(name, help=help_)
        command.add_argument("--bundle", type=Path, required=True)
        _add_places(command)
        if name == "evaluate":
            command.add_argument("--data", type=Path, required=True)
            command.set_defaults(run=_evaluate)
        elif name == "predict":
            command.add_argument("--file", type=Path, help="rows, one JSON object a line; default: stdin")
            command.add_argument(
                "--out",
                type=Path,
                help="where a file's answers go; begun before, it goes on. Default: stdout",
            )
            command.add_argument("--scale", type=float, default=1.0, help="0 leaves stage 2 out")
            command.add_argument(
                "--abstain-below", type=_probability, help="less probable answers are null (0 to 1)"
            )
            command.set_defaults(run=_predict)
        else:
            command.add_argument("--format", choices=["merged", "peft", "pyreft"], required=True)
            command.add_argument("--out", type=Path, required=True)
            _add_lifeline(command)
            command.set_defaults(run=_export)
    _add_import_pyreft(
        commands.add_parser(
            "import-pyreft", help="a bundle from an intervention that pyreft trained and saved"
        )
    )
    check = commands.add_parser(
        "check", help="a run's model, settings and files, judged before it is trained"
    )
    check.add_argument(
        "--run-file", type=Path, required=True, help="see heft_engine.commands.check.CheckFile"
    )
    _add_lifeline(check)
    check.set_defaults(run=_check)
    _add_diagnose(
        commands.add_parser("diagnose", help="what a bundle's stages did to weights, states and curvature")
    )
    models = commands.add_parser("models", help="the base models on this machine, one JSON line each")
    _add_lifeline(models)
    _add_places(models)
    models.set_defaults(run=_models)
    compare = commands.add_parser("compare", help="which differences between arms of several runs are real")
    compare.add_argument(
        "--run-file", type=Path, required=True, help="see heft_engine.commands.compare.Question"
    )
    compare.set_defaults(run=_compare)
    suggest = commands.add_parser("suggest", help="which points a search shall try next")
    suggest.add_argument(
        "--run-file", type=Path, required=True, help="see heft_engine.commands.suggest.Question"
    )
    suggest.set_defaults(run=_suggest)
    gpu_check = commands.add_parser(
        "gpu-check", help="a HEFT job on a random model of Llama-2-7B's shape, on a GPU"
    )
    gpu_check.set_defaults(run=_gpu_check)
    return top


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("between 0 and 1")
    return value


def _add_train(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="smollm2-135m, a directory, or a hub id org/name[@revision]")
    command.add_argument(
        "--train", help="rows to train on: a file of JSON lines, hub:google/boolq:train or sample:passages"
    )
    command.add_argument("--eval", help="validation rows: they steer")
    command.add_argument("--test", help="test rows: they only report")
    command.add_argument(
        "--method", default="heft", choices=["heft", "lora", "reft", "heft_reversed", "heft_interleaved"]
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="lora.rank=8, reft.layers=15, max_length=512 …",
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", type=Path)
    command.add_argument("--checkpoints", type=Path, help="a folder for checkpoints")
    command.add_argument("--resume", type=Path, help="a checkpoint directory to go on from")
    command.add_argument(
        "--no-reuse",
        dest="reuse",
        action="store_false",
        help="train every stage, even one that an equal run has trained before; and keep none for later runs",
    )
    command.add_argument("--run-file", type=Path, help="a JSON file instead of all of the above")
    _add_lifeline(command)
    _add_places(command)
    command.set_defaults(run=_train)


def _add_import_pyreft(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--directory", type=Path, required=True, help="what pyreft's save() wrote; it is unpickled"
    )
    command.add_argument("--model", required=True, help="the base it was trained on, as for train")
    command.add_argument("--rows", type=Path, required=True, help="a few rows of the task with their answers")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument(
        "--positions",
        action="append",
        help="l1, f1+l1, …; repeated, one for each intervention. Default: as an export of this engine says",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="task.template=…, max_length=512, dtype=…",
    )
    _add_places(command)
    command.set_defaults(run=_import_pyreft)


def _add_diagnose(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bundle", type=Path, required=True)
    command.add_argument("--data", type=Path, required=True, help="rows of the task with their answers")
    command.add_argument(
        "--out", type=Path, required=True, help="a new folder for diagnostics.json and plots"
    )
    command.add_argument(
        "--part", action="append", dest="parts", metavar="NAME", help="repeated; default: all of them"
    )
    command.add_argument("--rows", type=int, default=256, help="rows of representations")
    command.add_argument("--curvature-rows", type=int, default=64, help="rows of curvature and descent")
    command.add_argument("--target", type=float, help="steps to this loss; default: the lowest both reach")
    command.add_argument("--general", type=Path, help="a text to measure forgetting on")
    _add_lifeline(command)
    _add_places(command)
    command.set_defaults(run=_diagnose)


def _add_lifeline(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--die-with-parent", action="store_true", help="end when the starter ends (stdin is its pipe)"
    )


def _add_places(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model-dir", type=Path, help="a folder of base models, by name")
    command.add_argument("--cache-dir", type=Path, help="where converted and downloaded models are kept")
    command.add_argument("--device", help="cpu, cuda, auto; default: the GPU when there is one")


# torch takes seconds to import: each command imports its own part.


def _train(options: argparse.Namespace) -> None:
    from heft_engine.commands.train import run

    run(options)


def _evaluate(options: argparse.Namespace) -> None:
    from heft_engine.commands.predict import evaluate

    evaluate(options)


def _predict(options: argparse.Namespace) -> None:
    from heft_engine.commands.predict import predict

    predict(options)


def _export(options: argparse.Namespace) -> None:
    from heft_engine.bundle.export import export
    from heft_engine.commands.child_process import die_with_parent

    if options.die_with_parent:
        die_with_parent()
    places = {"model_dir": options.model_dir, "cache_dir": options.cache_dir}
    try:
        export(options.bundle, options.format, options.out, **places)
    except EngineError as error:
        print(_fault(error), flush=True)  # to whoever reads the outcome; main says it on stderr
        raise
    print(json.dumps({"format": options.format, "out": str(options.out)}))


def _import_pyreft(options: argparse.Namespace) -> None:
    from heft_engine.commands.import_pyreft import run

    run(options)


def _check(options: argparse.Namespace) -> None:
    from heft_engine.commands.check import run

    run(options)


def _diagnose(options: argparse.Namespace) -> None:
    from heft_engine.commands.diagnose import run

    run(options)


def _models(options: argparse.Namespace) -> None:
    from heft_engine.commands.child_process import die_with_parent
    from heft_engine.commands.models import run

    if options.die_with_parent:
        die_with_parent()
    run(options)


def _compare(options: argparse.Namespace) -> None:
    from heft_engine.commands.compare import run

    run(options)


def _suggest(options: argparse.Namespace) -> None:
    from heft_engine.commands.suggest import run

    run(options)


def _gpu_check(options: argparse.Namespace) -> None:
    from heft_engine.commands.gpu_check import run

    run()
