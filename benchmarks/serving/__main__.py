"""Runs the parts of the benchmark and writes SERVING.md; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processor import processor
from benchmarks.serving import http, library, report, structured
from heft_engine.runtime.malloc import retain_freed_memory

FOLDER = Path(__file__).parent / "results"
PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "distinct": lambda options: library.one_model(options, 1),
    "passages": lambda options: library.one_model(options, 5),
    "models": library.many_models,
    "http": http.over_http,
    "overload": http.overload,
    "json-answers": structured.answers,
    "json-steps": structured.steps,
}
#: Parts that need no data.
_WITHOUT_DATA = {"json-answers", "json-steps"}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(arguments if arguments is not None else sys.argv[1:])
    options = parser().parse_args(arguments)
    if options.data is None and not _WITHOUT_DATA.issuperset(options.parts):
        parser().error("--data is needed")
    FOLDER.mkdir(exist_ok=True)
    retain_freed_memory()  # for the baselines too
    for part in options.parts:
        command = shlex.join(["python", "-m", "benchmarks.serving", *arguments])
        result = {"command": command, "processor": processor(), **PARTS[part](options)}
        (FOLDER / f"{part}.json").write_text(json.dumps(result, indent=1))
        report.write(FOLDER)
        print(f"{part}: done", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    top.add_argument("--model", default="smollm2-135m")
    top.add_argument("--data", type=Path, help="JSONL file of yes/no rows")
    top.add_argument("--rows", type=int, default=60)
    top.add_argument("--repeat", type=int, default=3)
    top.add_argument("--models", type=int, nargs="+", default=[1, 10, 100, 1_000])
    top.add_argument("--compared", type=int, default=20, help="models that are compared with merged copies")
    top.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    top.add_argument("--seconds", type=float, default=600, help="of the overload")
    top.add_argument(
        "--answers",
        type=int,
        default=60,
        help="to JSON schemas, alone and mixed each; more calls add to them",
    )
    top.add_argument("--steps", type=int, default=100, help="decoding steps that are timed")
    quick = [part for part in PARTS if part != "overload"]
    top.add_argument("--parts", nargs="+", choices=list(PARTS), default=quick)
    return top


if __name__ == "__main__":
    main()
