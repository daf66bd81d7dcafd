"""Measurements into RESULTS.md and plots, from the files that the parts left. It does NOT measure."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

#: SmolLM2-135M without its embeddings: what a token's arithmetic is counted by.
NON_EMBEDDING = 106_203_456

_HEAD = """# Results

Written by

    {command}

on {threads} threads, {dtype}. Ours and theirs run in turn, each in a process of its own; ratios are theirs over ours,
pair by pair: median (lowest to highest). Machines are noisy: the ratios say more than the seconds. Theirs is
`transformers.Trainer` + peft at its defaults for stage 1 and pyreft's trainer for stage 2 (with the subclass that makes
it run on transformers 5), on the same rows, batch of 8, dtype, ranks and learning rates.

| column | |
| --- | --- |
| epoch | seconds of one epoch (the median over epochs), without what comes before the first |
| before | ours alone: planning, compiling, and the prefill of the cache |
| epoch ratio / whole ratio | of an epoch; of everything, `before` included |
| of the matrix rate | 4 · non-embedding parameters · tokens / seconds, over a large product's rate in that process |
| peak | of the whole process, GB |
"""


def write(folder: Path, parts: Path) -> None:
    """RESULTS.md from every part's file in `parts`, and one picture for each growth."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(parts.glob("*.json"))}
    pairs = [part for part in found.values() if part["kind"] == "pair"]
    growths = {name: part for name, part in found.items() if part["kind"] == "growth"}
    commands = sorted({part["command"] for part in found.values()})
    first = next((run for part in pairs for run in part["ours"]), {"threads": "?", "dtype": "?"})
    lines = [_HEAD.format(command="\n    ".join(commands), threads=first["threads"], dtype=first["dtype"])]
    if pairs:
        lines += _pairs(pairs)
    if "losses" in found:
        lines += _losses(found["losses"]["result"])
    if "reuse" in found:
        lines += _reuse(found["reuse"]["result"])
    if "profile" in found:
        lines += _profile(found["profile"]["result"])
    if "memory" in found:
        lines += _memory(found["memory"]["cases"])
    if growths:
        lines += ["", "## How our cost grows", "", "Seconds of an epoch."]
        lines += [line for name, part in growths.items() for line in _growth(folder, name, part)]
    (folder / "RESULTS.md").write_text("\n".join(lines) + "\n")


def _pairs(pairs: list[dict[str, Any]]) -> list[str]:
    return [
        "| work | rows | epoch, ours | before | epoch, theirs | epoch ratio | whole ratio | tokens/s, ours "
        "| of the matrix rate: ours, theirs | peak: ours, theirs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_line, pairs),
    ]


def _line(pair: dict[str, Any]) -> str:
    ours, theirs = pair["ours"], pair["theirs"]
    mine, other = (statistics.median(map(_epoch, side)) for side in (ours, theirs))
    first = ours[0]
    before = statistics.median(sum(s["preparing"] + s["prefill"] for s in run["stages"]) for run in ours)
    whole_run = len(first["stages"]) > 1
    shares = " , ".join("–" if _skips(first) else f"{_share(side):.0%}" for side in (ours, theirs))
    peaks = ", ".join(f"{max(run['peak_bytes'] for run in side) / 1e9:.2f}" for side in (ours, theirs))
    epochs = "–" if whole_run else _ratio(ours, theirs, _epoch)
    return (
        f"| {pair['title']} | {first['rows']} | {mine:.2f} | {before:.1f} | {other:.2f} | {epochs} "
        f"| {_ratio(ours, theirs, _total)} | {first['tokens'] / mine:.0f} | {shares} | {peaks} |"
    )


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], seconds: Any) -> str:
    ratios = [seconds(b) / seconds(a) for a, b in zip(ours, theirs, strict=True)]
    middle = f"**{statistics.median(ratios):.1f}**"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.1f} to {max(ratios):.1f})"


def _skips(run: dict[str, Any]) -> bool:
    """Whether cached work is left out, so that arithmetic by tokens means nothing."""
    return any(stage.get("rung", "nothing") != "nothing" for stage in run["stages"])


def _share(side: list[dict[str, Any]]) -> float:
    shares = (4 * NON_EMBEDDING * run["tokens"] / _epoch(run) / run["matrix_rate"] for run in side)
    return float(statistics.median(shares))


def _epoch(run: dict[str, Any]) -> float:
    """Of all stages: the median over each one's epochs."""
    return float(sum(statistics.median(stage["epochs"]) for stage in run["stages"]))


def _total(run: dict[str, Any]) -> float:
    return float(sum(s["preparing"] + s["prefill"] + sum(s["epochs"]) for s in run["stages"]))


def _losses(result: dict[str, Any]) -> list[str]:
    names = [name for name in result["float32"] if name != "steps"]
    lines = [
        "",
        "## The same losses",
        "",
        f"Of {result['float32']['steps']} steps: the largest relative difference to the plain computation (the whole "
        "model every step, nothing cached, nothing compiled), in one process.",
        "",
        "| | float32 | bfloat16 |",
        "| --- | --- | --- |",
    ]
    return lines + [
        f"| {name} | {result['float32'][name]:.1e} | {result['bfloat16'][name]:.1e} |" for name in names
    ]


def _reuse(result: dict[str, Any]) -> list[str]:
    first, second = result["jobs"]
    return [
        "",
        "## A second job with the same stage 1",
        "",
        f"Another rank in stage 2. From the start of the run to that of stage 2 the first job took "
        f"{first['stage1_seconds']:.1f} s ({first['lora_steps']} LoRA steps, then {first['reft_steps']} of LoReFT), "
        f"the second {second['stage1_seconds']:.1f} s ({second['lora_steps']} and {second['reft_steps']}).",
    ]


def _profile(result: dict[str, Any]) -> list[str]:
    ways = [name for name in ("as they are", "compiled") if name in result]
    parts = [name for name in result[ways[0]] if name != "milliseconds"]
    whole = " | ".join(f"{result[way]['milliseconds']:.0f} ms" for way in ways)
    return [
        "",
        "## Where a step of stage 1 spends its time",
        "",
        f"{result['tokens']} tokens, by torch's profiler.",
        "",
        f"| | layers {' | layers '.join(ways)} |",
        "| --- |" + " --- |" * len(ways),
        f"| whole step | {whole} |",
        *(f"| {name} | {' | '.join(f'{result[way][name]:.0f} %' for way in ways)} |" for name in parts),
    ]


def _memory(cases: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "",
        "## What a stage was to take, and took",
        "",
        "Whole runs of 16 rows (8 of the longest): the process's memory in GB, as estimated when the stage began and "
        "as it was at most.",
        "",
        "| | stage | cache | estimated | held | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return lines + [
        f"| {name} | {one['type']} | {one['rung']} | {one['estimated'] / 1e9:.2f} | {one['held'] / 1e9:.2f} "
        f"| {one['estimated'] / one['held']:.2f} |"
        for name, stages in cases.items()
        for one in stages
    ]


def _growth(folder: Path, name: str, part: dict[str, Any]) -> list[str]:
    seconds = {value: _epoch(run) for value, run in part["points"]}
    picture = f"{name}.png"
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot(list(seconds), list(seconds.values()), marker="o")
    axes.set_xlabel(part["name"])
    axes.set_ylabel("seconds an epoch")
    axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(folder / picture, dpi=100)
    plt.close(figure)
    values = ", ".join(f"{value}: {spent:.2f}" for value, spent in seconds.items())
    rows = part["points"][0][1]["rows"]
    of = "" if part["name"] == "rows" else f" ({rows} rows)"
    of += (
        " LoRA's rank is twice the number" if (part["what"], part["name"]) == ("stage1-ours", "rank") else ""
    )
    return ["", f"**{part['what']}, by {part['name']}**{of}. {values}.", "", f"![{name}]({picture})"]
