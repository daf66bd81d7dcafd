"""SERVING.md and its plot, from the result files of all parts."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.processor import measured_on

_HEAD = """# Serving

Written by

    {commands}

SmolLM2-135M in bfloat16, yes/no rows with passages. HEFT and baselines run alternately in one process; ratios are those
of pairs of runs: median (lowest to highest). Machines are noisy: ratios are more reliable than seconds. pyreft is used
as in its documentation, one row at a time with `generate`; transformers runs a forward pass per row, without
intervention.
"""


def write(folder: Path) -> None:
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    commands = "\n    ".join(dict.fromkeys(part["command"] for part in results.values()))
    lines = [_HEAD.format(commands=commands), *measured_on(results.items()), ""]
    for name, title in (("distinct", "Distinct passages"), ("passages", "Five questions per passage")):
        if name in results:
            lines += _one_model(title, results[name])
    if "models" in results:
        lines += _many_models(results["models"])
    if "http" in results:
        lines += _over_http(folder.parent.parent, results["http"])
    if "overload" in results:
        lines += _overload(results["overload"])
    if {"json-answers", "json-steps"} <= results.keys():
        lines += _json(results["json-answers"], results["json-steps"])
    (folder.parent.parent / "SERVING.md").write_text("\n".join(lines) + "\n")


def _span(values: list[float], form: str = ".1f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _one_model(title: str, part: dict[str, Any]) -> list[str]:
    rate = part["rows_per_second"]
    lines = [f"## {title}, in the library", "", f"{part['rows']} rows, {part['tokens']:,} tokens.", ""]
    lines += ["| | rows/s | HEFT's ratio to it |", "| --- | --- | --- |"]
    lines += [f"| HEFT | {rate['ours']:.1f} | |"]
    lines += [f"| {name} | {rate[name]:.1f} | {_span(ratios)} |" for name, ratios in part["ratios"].items()]
    percent = [100 * overhead for overhead in part["intervention"]]
    lines += ["", f"The intervention adds {_span(percent)} % to the time of the merged model."]
    if part["per_passage"] == 1:
        lines += [
            f"Share of the matrix rate (2 · non-embedding parameters · tokens / seconds, over the "
            f"{part['matrix_rate'] / 1e12:.2f} TFLOP/s of a large product in the same run): "
            f"{100 * part['share']:.0f} %.",
            "",
            "| operations of a forward pass | % of its time |",
            "| --- | --- |",
            *(f"| {name} | {share:.0f} |" for name, share in part.get("spent", {}).items()),
        ]
    return [*lines, ""]


def _many_models(part: dict[str, Any]) -> list[str]:
    lines = [
        "## Many models on one base",
        "",
        "| models | rows/s, relative to one merged model |",
        "| --- | --- |",
    ]
    for count, times in part["models"].items():
        ratios = [alone / spread for alone, spread in zip(times["alone"], times["spread"], strict=True)]
        lines.append(f"| {int(count):,} | {_span(ratios, '.2f')} |")
    memory, adapters = part["memory_bytes"], part["adapter_bytes"]
    merged = part["merged_too"]
    return [
        *lines,
        "",
        f"{part['compared']:,} models take {memory / 1e6:,.0f} MB in addition to their base: {memory / adapters:.2f} "
        f"times the {adapters / 1e6:,.0f} MB of their adapters.",
        f"Of {part['compared']:,} answers in mixed batches, {part['differing']} differ in any bit from those that "
        "their model gives alone.",
        f"Unmerged compared with merged, {merged['rows']} rows: the difference of the two labels' log-probabilities "
        f"changes by {merged['median']:.3f} in the median and {merged['largest']:.3f} at most (its standard deviation "
        f"over the rows is {merged['spread']:.2f}); {merged['answers_changed']} answers change.",
        "",
    ]


def _over_http(folder: Path, part: dict[str, Any]) -> list[str]:
    lines = ["## Over HTTP", "", "| clients | p50, ms | p90 | p99 | rows/s, relative to the library |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for clients, result in part["clients"].items():
        times = " | ".join(f"{value:,.0f}" for value in result["milliseconds"].values())
        lines.append(f"| {clients} | {times} | {_span(result['rows_per_second_over_library'], '.2f')} |")
    lines += [
        "",
        f"The library answers {part['library_rows_per_second']:.1f} rows/s, and a single row in "
        f"{1_000 * part['library_single']:.0f} ms; HTTP, Celery and Redis add "
        f"{part['added_milliseconds']:.1f} ms to it (medians).",
        "",
        "![Latency over HTTP](serving-latency.png)",
        "",
    ]
    figure, axes = plt.subplots(figsize=(5, 3))
    for name in ("p50", "p90", "p99"):
        counts = [int(clients) for clients in part["clients"]]
        values = [result["milliseconds"][name] for result in part["clients"].values()]
        axes.plot(counts, values, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="milliseconds")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "serving-latency.png", dpi=120)
    plt.close(figure)
    return lines


def _overload(part: dict[str, Any]) -> list[str]:
    statuses = ", ".join(f"{status}: {count:,}" for status, count in sorted(part["statuses"].items()))
    memory = "; ".join(
        f"{name} " + " → ".join(f"{sample.get(name, 0) / 1e6:,.0f}" for sample in part["memory_bytes"])
        for name in ("api", "inference")
    )
    times = part["milliseconds"]
    return [
        "## Overload",
        "",
        f"{part['rate']:.0f} requests/s for {part['seconds']:,.0f} s, with a capacity of {part['capacity']:.0f} "
        f"requests/s: {statuses}. Refusals without Retry-After: {part['bare_refusals']}. Latency of answered requests: "
        f"{times['p50']:,.0f} ms (p99 {times['p99']:,.0f}). Resident memory before and after each quarter, MB: "
        f"{memory}. Latency of single requests afterwards: {part['milliseconds_after']['p50']:,.0f} ms.",
        "",
    ]


def _json(answers: dict[str, Any], steps: dict[str, Any]) -> list[str]:
    alone, mixed, seconds = answers["alone"], answers["mixed"], steps["step_seconds"]
    return [
        "## JSON schemas",
        "",
        "Answers of the base model to 20 schemas (benchmarks/serving/schemas.py), drawn at temperature 1: "
        f"{alone['valid']:,} of {alone['answers']:,} parse and validate, and {mixed['valid']:,} of "
        f"{mixed['answers']:,} in batches with as many free texts.",
        "",
        f"A decoding step of {steps['batch']} texts of which half match a schema takes {1_000 * seconds['mixed']:.1f} "
        f"ms, one of free texts {1_000 * seconds['free']:.1f} ms (medians of {steps['steps']}, alternately): beside "
        f"the others, free texts keep {steps['ratio']:.2f} of their tokens/s. Masks take "
        f"{1_000 * steps['mask_seconds']:.2f} ms of processor time a step.",
        "",
    ]
