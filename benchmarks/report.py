"""RESULTS.md and its plots, from the result files of all parts."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.processor import measured_on

#: Parameters of SmolLM2-135M without its embeddings, which decide the operations of a token.
NON_EMBEDDING = 106_203_456

_HEAD = """# Results

Written by

    {command}

on {threads} threads, {dtype}. HEFT and the baseline run alternately, each in a process of its own. Ratios are the
baseline's seconds over HEFT's, for each pair of runs: median (lowest to highest). Machines are noisy: ratios are more
reliable than seconds. The baseline is `transformers.Trainer` + peft at its defaults for stage 1 and pyreft's trainer
for stage 2 (with a subclass that makes it run on transformers 5), on the same rows, batches of 8, dtype, ranks and
learning rates.

| column | |
| --- | --- |
| epoch | seconds of an epoch (the median over epochs), without the time before the first |
| before | HEFT only: planning, compiling, and the prefill of the cache |
| epoch ratio / whole ratio | of an epoch; of everything, `before` included |
| of the matrix rate | 4 · non-embedding parameters · tokens / seconds, over the rate of a large product |
| peak | memory of the process, GB |
"""


def write(folder: Path, parts: Path) -> None:
    """Writes RESULTS.md from the result files in `parts`, and a plot for each scaling measurement."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(parts.glob("*.json"))}
    pairs = [part for part in results.values() if part["kind"] == "pair"]
    scaling = {name: part for name, part in results.items() if part["kind"] == "growth"}
    commands = sorted({part["command"] for part in results.values()})
    first = next((run for part in pairs for run in part["ours"]), {"threads": "?", "dtype": "?"})
    lines = [_HEAD.format(command="\n    ".join(commands), threads=first["threads"], dtype=first["dtype"])]
    lines += [*measured_on(results.items()), ""]
    if pairs:
        lines += _pairs(pairs)
    if "losses" in results:
        lines += _losses(results["losses"]["result"])
    if "reuse" in results:
        lines += _reuse(results["reuse"]["result"])
    if "profile" in results:
        lines += _profile(results["profile"]["result"])
    if "memory" in results:
        lines += _memory(results["memory"]["cases"])
    if scaling:
        lines += ["", "## Scaling of HEFT's cost", "", "Seconds of an epoch."]
        lines += [line for name, part in scaling.items() for line in _scaling(folder, name, part)]
    (folder / "RESULTS.md").write_text("\n".join(lines) + "\n")


def _pairs(pairs: list[dict[str, Any]]) -> list[str]:
    return [
        "| work | rows | epoch, HEFT | before | epoch, baseline | epoch ratio | whole ratio | tokens/s, HEFT "
        "| of the matrix rate: HEFT, baseline | peak: HEFT, baseline |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_line, pairs),
    ]


def _line(pair: dict[str, Any]) -> str:
    heft, baseline = pair["ours"], pair["theirs"]
    heft_epoch, baseline_epoch = (statistics.median(map(_epoch, side)) for side in (heft, baseline))
    first = heft[0]
    before = statistics.median(sum(s["preparing"] + s["prefill"] for s in run["stages"]) for run in heft)
    is_job = len(first["stages"]) > 1
    shares = " , ".join("–" if _is_cached(first) else f"{_share(side):.0%}" for side in (heft, baseline))
    peaks = ", ".join(f"{max(run['peak_bytes'] for run in side) / 1e9:.2f}" for side in (heft, baseline))
    epochs = "–" if is_job else _ratio(heft, baseline, _epoch)
    return (
        f"| {pair['title']} | {first['rows']} | {heft_epoch:.2f} | {before:.1f} | {baseline_epoch:.2f} | {epochs} "
        f"| {_ratio(heft, baseline, _total)} | {first['tokens'] / heft_epoch:.0f} | {shares} | {peaks} |"
    )


def _ratio(heft: list[dict[str, Any]], baseline: list[dict[str, Any]], seconds: Any) -> str:
    ratios = [seconds(b) / seconds(a) for a, b in zip(heft, baseline, strict=True)]
    median = f"**{statistics.median(ratios):.1f}**"
    return median if len(ratios) == 1 else f"{median} ({min(ratios):.1f} to {max(ratios):.1f})"


def _is_cached(run: dict[str, Any]) -> bool:
    """Returns whether a stage uses a cache, so that its operations don't follow from its tokens."""
    return any(stage.get("rung", "nothing") != "nothing" for stage in run["stages"])


def _share(side: list[dict[str, Any]]) -> float:
    shares = (4 * NON_EMBEDDING * run["tokens"] / _epoch(run) / run["matrix_rate"] for run in side)
    return float(statistics.median(shares))


def _epoch(run: dict[str, Any]) -> float:
    """Seconds of an epoch: the median over the epochs of a stage, summed over stages."""
    return float(sum(statistics.median(stage["epochs"]) for stage in run["stages"]))


def _total(run: dict[str, Any]) -> float:
    return float(sum(s["preparing"] + s["prefill"] + sum(s["epochs"]) for s in run["stages"]))


def _losses(result: dict[str, Any]) -> list[str]:
    names = [name for name in result["float32"] if name != "steps"]
    lines = [
        "",
        "## The same losses",
        "",
        f"The largest relative difference of {result['float32']['steps']} step losses to plain training (the whole "
        "model in every step, without cache and compilation), in one process.",
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
        f"With another rank in stage 2. From the start of the run to that of stage 2 the first job took "
        f"{first['stage1_seconds']:.1f} s ({first['lora_steps']} LoRA steps, then {first['reft_steps']} of LoReFT), "
        f"the second {second['stage1_seconds']:.1f} s ({second['lora_steps']} and {second['reft_steps']}).",
    ]


def _profile(result: dict[str, Any]) -> list[str]:
    variants = [name for name in ("not compiled", "compiled") if name in result]
    parts = [name for name in result[variants[0]] if name != "milliseconds"]
    total = " | ".join(f"{result[variant]['milliseconds']:.0f} ms" for variant in variants)
    return [
        "",
        "## Time of a step of stage 1",
        "",
        f"{result['tokens']} tokens, by torch's profiler.",
        "",
        f"| | layers {' | layers '.join(variants)} |",
        "| --- |" + " --- |" * len(variants),
        f"| whole step | {total} |",
        *(
            f"| {name} | {' | '.join(f'{result[variant][name]:.0f} %' for variant in variants)} |"
            for name in parts
        ),
    ]


def _memory(cases: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "",
        "## Estimated and actual memory of a stage",
        "",
        "Runs of 16 rows (8 of the longest): the process's memory in GB, as estimated when the stage starts, and its "
        "actual peak.",
        "",
        "| | stage | cache | estimated | actual | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return lines + [
        f"| {name} | {stage['type']} | {stage['rung']} | {stage['estimated'] / 1e9:.2f} | {stage['held'] / 1e9:.2f} "
        f"| {stage['estimated'] / stage['held']:.2f} |"
        for name, stages in cases.items()
        for stage in stages
    ]


def _scaling(folder: Path, name: str, part: dict[str, Any]) -> list[str]:
    seconds = {value: _epoch(run) for value, run in part["points"]}
    plot = f"{name}.png"
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot(list(seconds), list(seconds.values()), marker="o")
    axes.set_xlabel(part["name"])
    axes.set_ylabel("seconds per epoch")
    axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(folder / plot, dpi=100)
    plt.close(figure)
    values = ", ".join(f"{value}: {epoch_seconds:.2f}" for value, epoch_seconds in seconds.items())
    note = "" if part["name"] == "rows" else f" ({part['points'][0][1]['rows']} rows)"
    if (part["what"], part["name"]) == ("stage1-heft", "rank"):
        note += " LoRA's rank is twice the number"
    return ["", f"**{part['what']}, by {part['name']}**{note}. {values}.", "", f"![{name}]({plot})"]
