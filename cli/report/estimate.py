"""Prints what a job would take on the terminal."""

from __future__ import annotations

from cli.client import Json
from cli.render import duration, table


def print_estimate(estimate: Json) -> None:
    """Prints the `estimate` of a dry run: rows and steps, then the memory and the time of each stage."""
    truncated = f", {estimate['truncated_rows']:,} of them truncated" if estimate["truncated_rows"] else ""
    print(
        f"{estimate['rows']:,} rows{truncated}; the longest example has {estimate['longest_example_tokens']:,} tokens"
    )
    print(f"{estimate['steps']:,} steps, {estimate['trained_tokens']:,} trained tokens")
    if estimate["stages"] is None:
        print("memory and time are not known: no training worker is running")
        return
    table(["stage", "place", "GPU", "memory", "time"], [_row(stage) for stage in estimate["stages"]])
    for stage in estimate["stages"]:
        if stage.get("error"):
            print(f"{stage['type']} does not fit: {stage['error']}")
    print(_time(estimate))


def _row(stage: Json) -> tuple[str, ...]:
    return (
        stage["type"],
        stage["placement"],
        _gigabytes(stage.get("gpu_bytes")),
        _gigabytes(stage.get("host_bytes")),
        "" if stage["seconds"] is None else duration(stage["seconds"]),
    )


def _time(estimate: Json) -> str:
    if estimate["seconds"] is None:
        return "the time is not known: no job like it has been trained here yet"
    return f"about {duration(estimate['seconds'])} of training, by {estimate['measured_jobs']} earlier jobs"


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.1f} GB"
