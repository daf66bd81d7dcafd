"""Ours against Trainer + peft and pyreft's trainer, alternating in one go; writes benchmarks/RESULTS.md and plots.

Every measurement is a process of its own (benchmarks.measure). Machines are noisy: read the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Pair, write

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    pairs = [
        _pair(options, "stage 1, an epoch", "stage1", rows=options.stage1_rows, epochs=1),
        _pair(options, "stage 2, an epoch after the prefill", "stage2", rows=options.stage2_rows, epochs=3),
        _pair(
            options,
            "stage 2, an epoch, states alone",
            "stage2",
            rows=options.stage2_rows,
            epochs=3,
            ours="states",
        ),
        _pair(options, "whole job, 3 + 3 epochs", "job", rows=options.job_rows, epochs=3),
    ]
    command = "python -m benchmarks " + " ".join(arguments if arguments is not None else sys.argv[1:])
    growth = {
        "rows": _growth(options, "rows", [16, 32, 64, 128]),
        "layer": _growth(options, "layer", [5, 15, 25]),
        "rank": _growth(options, "rank", [4, 16, 64]),
    }
    write(HERE, command, pairs, growth)
    print((HERE / "RESULTS.md").read_text())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    top.add_argument("--model", default="smollm2-135m")
    top.add_argument("--data", help="rows, JSON lines; default: the sample `passages`")
    top.add_argument("--repeat", type=int, default=3, help="measurements of each side")
    top.add_argument("--stage1-rows", type=int, default=128)
    top.add_argument("--stage2-rows", type=int, default=64)
    top.add_argument("--job-rows", type=int, default=64)
    return top


def _pair(
    options: argparse.Namespace, title: str, kind: str, *, rows: int, epochs: int, ours: str = "ours"
) -> Pair:
    """Ours and theirs in turn."""
    a, b = [], []
    for _ in range(options.repeat):
        a.append(_measure(options, f"{kind}-{ours}", rows=rows, epochs=epochs))
        b.append(_measure(options, f"{kind}-peer", rows=rows, epochs=epochs))
        print(f"{title}: {len(a)} of {options.repeat}", file=sys.stderr)
    return Pair(title=title, ours=a, theirs=b)


def _growth(options: argparse.Namespace, name: str, values: list[int]) -> dict[int, float]:
    """Seconds of an epoch of our stage 2 (median over the epochs) as one setting grows."""
    seconds = {}
    for value in values:
        settings = {"rows": options.stage2_rows, "epochs": 3, name: value}
        epochs = _measure(options, "stage2-ours", **settings)["stages"][0]["epochs"]
        seconds[value] = statistics.median(epochs)
    return seconds


def _measure(options: argparse.Namespace, kind: str, **settings: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.measure", kind, "--model", options.model]
    command += ["--data", options.data] if options.data else []
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
