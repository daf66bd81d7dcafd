"""Measurements into a table and plots. It does NOT measure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

#: SmolLM2-135M without its embeddings: what a token's arithmetic is counted by.
NON_EMBEDDING = 106_203_456


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same work, measured in turn."""

    title: str
    ours: list[dict[str, Any]]
    theirs: list[dict[str, Any]]

    @property
    def ratios(self) -> list[float]:
        return [_seconds(b) / _seconds(a) for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def with_prefill(self) -> list[float]:
        return [_total(b) / _total(a) for a, b in zip(self.ours, self.theirs, strict=True)]


def write(folder: Path, command: str, pairs: list[Pair], growth: dict[str, dict[int, float]]) -> None:
    """RESULTS.md with the command on top, and one picture for each growth."""
    first = pairs[0].ours[0]
    lines = [
        "# Results",
        "",
        f"    {command}",
        "",
        f"{first['threads']} threads, {first['dtype']}; the matrix rate is measured beside each run. Medians; the",
        "ratio is taken pair by pair, theirs over ours, with its range.",
        "",
        "| work | rows | ours, s | theirs, s | ratio | with the prefill | tokens/s | of the matrix rate "
        "| peak, ours | peak, theirs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(pair) for pair in pairs]
    lines += [
        "",
        "## Losses",
        "",
        "The same rows in other orders, so the losses are alike and not equal:",
        "",
    ]
    for pair in pairs:
        mine, other = (_losses(side[0]) for side in (pair.ours, pair.theirs))
        lines.append(f"- {pair.title}: mean of the last epoch {mine:.4f} beside {other:.4f}")
    lines += ["", "## How an epoch of stage 2 grows", ""]
    for name, seconds in growth.items():
        picture = f"stage2-{name}.png"
        _plot(folder / picture, name, seconds)
        values = ", ".join(f"{value}: {spent:.2f} s" for value, spent in seconds.items())
        lines += [f"By {name}: {values}.", "", f"![{name}]({picture})", ""]
    (folder / "RESULTS.md").write_text("\n".join(lines) + "\n")


def _line(pair: Pair) -> str:
    ours, theirs = statistics.median(map(_seconds, pair.ours)), statistics.median(map(_seconds, pair.theirs))
    ratio, whole = statistics.median(pair.ratios), statistics.median(pair.with_prefill)
    tokens = pair.ours[0]["tokens"]
    # Forward and backward of a frozen base cost 4 operations a parameter and token; cached stages skip most of them.
    share = statistics.median(
        4 * NON_EMBEDDING * run["tokens"] / _seconds(run) / run["matrix_rate"] for run in pair.ours
    )
    peak = [max(run["peak_bytes"] for run in side) / 1e9 for side in (pair.ours, pair.theirs)]
    spread = f"{min(pair.ratios):.1f}–{max(pair.ratios):.1f}"
    shown = f"{share:.0%}" if pair.title.startswith("stage 1") else "–"
    return (
        f"| {pair.title} | {pair.ours[0]['rows']} | {ours:.2f} | {theirs:.2f} | **{ratio:.1f}** ({spread}) "
        f"| {whole:.1f} | {tokens / ours:.0f} | {shown} | {peak[0]:.2f} GB | {peak[1]:.2f} GB |"
    )


def _seconds(run: dict[str, Any]) -> float:
    """An epoch (the median over epochs) of one stage; of a whole job, everything."""
    if len(run["stages"]) > 1:
        return _total(run)
    return float(statistics.median(run["stages"][0]["epochs"]))


def _total(run: dict[str, Any]) -> float:
    return float(sum(stage["prefill"] + sum(stage["epochs"]) for stage in run["stages"]))


def _losses(run: dict[str, Any]) -> float:
    stage = run["stages"][-1]
    last = len(stage["losses"]) // max(1, len(stage["epochs"]))
    return float(statistics.mean(stage["losses"][-last:]))


def _plot(path: Path, name: str, seconds: dict[int, float]) -> None:
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot(list(seconds), list(seconds.values()), marker="o")
    axes.set_xlabel(name)
    axes.set_ylabel("seconds an epoch")
    axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
