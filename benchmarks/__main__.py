"""Compares HEFT's training with Trainer + peft and with pyreft, and measures how its cost scales.

    python -m benchmarks --data boolq/train.jsonl                 everything: more than an hour
    python -m benchmarks --data boolq/train.jsonl --parts stage1  one part

Writes RESULTS.md and plots from the results of all parts so far. Every measurement runs in a process of its own
(benchmarks.measure), HEFT and baseline alternately. Machines are noisy: ratios are more reliable than seconds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory_prediction import CASES
from benchmarks.processor import processor
from benchmarks.report import write

HERE = Path(__file__).parent
PARTS_FOLDER = HERE / "results"

#: Comparisons: title, HEFT's kind of measurement, the baseline's, rows, epochs, repetitions, and HEFT's settings.
COMPARISONS: dict[str, tuple[str, str, str, int, int, int, dict[str, str]]] = {
    "stage1": ("stage 1, an epoch", "stage1-heft", "stage1-baseline", 128, 1, 3, {"compile": "no"}),
    "stage1-compiled": (
        "stage 1, an epoch, layers compiled",
        "stage1-heft",
        "stage1-baseline",
        128,
        1,
        3,
        {"compile": "yes"},
    ),
    "stage2": ("stage 2, 3 epochs", "stage2-heft", "stage2-baseline", 64, 3, 3, {}),
    "stage2-states": (
        "stage 2, 3 epochs, hidden states only",
        "stage2-states",
        "stage2-baseline",
        64,
        3,
        3,
        {},
    ),
    "job-3-3": ("whole job, 3 + 3 epochs", "job-heft", "job-baseline", 64, 3, 1, {}),
    "job-20-20": ("whole job, 20 + 20 epochs", "job-heft", "job-baseline", 16, 20, 1, {}),
}
#: Scaling: HEFT's kind of measurement, the varied setting, its values, and the other settings.
SCALING: dict[str, tuple[str, str, list[int], dict[str, Any]]] = {
    "growth-rows-stage1": ("stage1-heft", "rows", [16, 32, 64, 128], {"compile": "no"}),
    "growth-rows-stage2": ("stage2-heft", "rows", [16, 32, 64, 128], {"epochs": 3}),
    "growth-length-stage1": ("stage1-heft", "length", [64, 256, 1_024], {"rows": 16, "compile": "no"}),
    "growth-length-stage2": ("stage2-heft", "length", [64, 256, 1_024], {"rows": 16, "epochs": 3}),
    "growth-layer": ("stage2-heft", "layer", [5, 15, 25], {"rows": 32, "epochs": 3}),
    "growth-rank-stage1": ("stage1-heft", "rank", [4, 16, 64], {"rows": 32, "compile": "no"}),
    "growth-rank-stage2": ("stage2-heft", "rank", [4, 16, 64], {"rows": 32, "epochs": 3}),
}
SINGLE = ("losses", "reuse", "profile")
MEMORY = "memory"


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(arguments if arguments is not None else sys.argv[1:])
    options = parser().parse_args(arguments)
    PARTS_FOLDER.mkdir(exist_ok=True)
    for part in options.parts:
        command = shlex.join(["python", "-m", "benchmarks", *arguments])
        result = {"command": command, "processor": processor(), **_run(options, part)}
        (PARTS_FOLDER / f"{part}.json").write_text(json.dumps(result, indent=1))
        write(HERE, PARTS_FOLDER)
        print(f"{part}: done", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    names = [*COMPARISONS, *SINGLE, MEMORY, *SCALING]
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--model", default="smollm2-135m")
    top.add_argument("--data", help="JSONL file of rows; default: the sample `passages`")
    top.add_argument("--repeat", type=int, help="repetitions; default: one to three")
    top.add_argument("--scale", type=float, default=1.0, help="multiplies the number of rows")
    top.add_argument("--parts", nargs="+", choices=names, default=names)
    return top


def _run(options: argparse.Namespace, part: str) -> dict[str, Any]:
    if part in SINGLE:
        return {"kind": part, "result": _measure(options, part, rows=_scaled(options, 24))}
    if part == MEMORY:
        return {"kind": MEMORY, "cases": {name: _memory(options, case) for name, case in CASES.items()}}
    if part in SCALING:
        kind, name, values, fixed = SCALING[part]
        fixed = {"rows": 64, **fixed}
        points = []
        for value in values:
            settings = {**fixed, name: value}
            settings["rows"] = _scaled(options, settings["rows"])
            points.append([settings[name], _measure(options, kind, **settings)])
        return {"kind": "growth", "what": kind, "name": name, "points": points}
    title, heft_kind, baseline_kind, rows, epochs, repeat, settings = COMPARISONS[part]
    rows, repeat = _scaled(options, rows), options.repeat or repeat
    heft, baseline = [], []
    for _ in range(repeat):  # alternately, so that noise of the machine affects both
        heft.append(_measure(options, heft_kind, rows=rows, epochs=epochs, **settings))
        baseline.append(_measure(options, baseline_kind, rows=rows, epochs=epochs))
        print(f"{title}: {len(heft)} of {repeat}", file=sys.stderr)
    return {"kind": "pair", "title": title, "ours": heft, "theirs": baseline}


def _memory(options: argparse.Namespace, case: dict[str, Any]) -> list[dict[str, Any]]:
    settings = {"rows": 16, "compile": "no", **case}
    stages: list[dict[str, Any]] = _measure(options, MEMORY, **settings)["stages"]
    print(f"{case}: {stages}", file=sys.stderr)
    return stages


def _scaled(options: argparse.Namespace, rows: int) -> int:
    return max(8, int(rows * options.scale))


def _measure(options: argparse.Namespace, kind: str, **settings: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.measure", kind, "--model", options.model]
    command += ["--data", options.data] if options.data else []
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
