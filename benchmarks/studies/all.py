"""Runs all studies of STUDIES.md one after another, each as `python -m benchmarks.studies` does."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.studies.__main__ import main as run

#: The data of each study, its numbers of training and test rows, and further arguments.
STUDIES: dict[str, tuple[str, int, int, list[str]]] = {
    "sst2-paper-table": ("sst2", 2_000, 800, ["--preset", "paper_table", "--epochs-scale", "0.3"]),
    "sst2-order": ("sst2", 2_000, 800, ["--preset", "order"]),
    "sst2-layer-rank": ("sst2", 1_000, 800, ["--preset", "layer_rank"]),
    "sst2-nine-arms": ("sst2", 2_000, 800, ["--preset", "layer_rank", "--seeds", "1"]),
    "boolq-paper-table": ("boolq", 150, 300, ["--preset", "paper_table", "--epochs-scale", "0.3"]),
    "boolq-order": ("boolq", 300, 500, ["--preset", "order"]),
}


def arguments(name: str, folders: dict[str, Path], trainers: int) -> list[str]:
    """Returns the arguments of `python -m benchmarks.studies`."""
    data, rows, test_rows, more = STUDIES[name]
    files = ["--training", str(folders[data] / "train.jsonl"), "--test", str(folders[data] / "dev.jsonl")]
    limits = ["--rows", str(rows), "--test-rows", str(test_rows)]
    return [name, *files, *limits, "--trainers", str(trainers), *more]


def main() -> None:
    top = argparse.ArgumentParser(prog="python -m benchmarks.studies.all", description=__doc__)
    top.add_argument("--sst2", type=Path, required=True)
    top.add_argument("--boolq", type=Path, required=True)
    top.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    top.add_argument("--trainers", type=int, default=2, help="concurrent jobs")
    options = top.parse_args()
    for name in options.only:
        run(arguments(name, {"sst2": options.sst2, "boolq": options.boolq}, options.trainers))


if __name__ == "__main__":
    main()
