"""SERVING.md and its picture, from what the parts left. It does NOT measure."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

_HEAD = """# Serving

Written by

    {commands}

SmolLM2-135M in bfloat16, yes/no rows with passages. Ours and theirs run in turn in one process; ratios are pair by
pair: median (lowest to highest). Machines are noisy: the ratios say more than the seconds. pyreft is asked as its
documentation does it, a row at a time with `generate`; transformers runs one forward pass a row, without intervention.
"""


def write(folder: Path) -> None:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    commands = "\n    ".join(dict.fromkeys(part["command"] for part in found.values()))
    lines = [_HEAD.format(commands=commands)]
    for name, title in (("distinct", "Distinct passages"), ("passages", "Five questions a passage")):
        if name in found:
            lines += _one_model(title, found[name])
    if "models" in found:
        lines += _many_models(found["models"])
    if "http" in found:
        lines += _over_http(folder.parent.parent, found["http"])
    if "overload" in found:
        lines += _overload(found["overload"])
    (folder.parent.parent / "SERVING.md").write_text("\n".join(lines) + "\n")


def _span(values: list[float], form: str = ".1f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _one_model(title: str, part: dict[str, Any]) -> list[str]:
    rate = part["rows_per_second"]
    lines = [f"## {title}, in the library", "", f"{part['rows']} rows, {part['tokens']:,} tokens.", ""]
    lines += ["| | rows a second | ours against it |", "| --- | --- | --- |"]
    lines += [f"| ours | {rate['ours']:.1f} | |"]
    lines += [f"| {name} | {rate[name]:.1f} | {_span(ratios)} |" for name, ratios in part["ratios"].items()]
    percent = [100 * each for each in part["intervention"]]
    lines += ["", f"The intervention costs {_span(percent)} % beside the merged model alone."]
    if part["per_passage"] == 1:
        lines += [
            f"Share of the matrix rate (2 · non-embedding parameters · tokens / seconds, over a large product's "
            f"{part['matrix_rate'] / 1e12:.2f} TFLOP/s in the same run): {100 * part['share']:.0f} %.",
            "",
            "| a pass's operations | % of their time |",
            "| --- | --- |",
            *(f"| {name} | {share:.0f} |" for name, share in part.get("spent", {}).items()),
        ]
    return [*lines, ""]


def _many_models(part: dict[str, Any]) -> list[str]:
    lines = [
        "## Many models on one base",
        "",
        "| models | rows a second, against one merged model |",
        "| --- | --- |",
    ]
    for count, times in part["models"].items():
        ratios = [alone / spread for alone, spread in zip(times["alone"], times["spread"], strict=True)]
        lines.append(f"| {int(count):,} | {_span(ratios, '.2f')} |")
    memory, own = part["memory_bytes"], part["adapter_bytes"]
    apart = part["merged_too"]
    return [
        *lines,
        "",
        f"{part['compared']:,} models hold {memory / 1e6:,.0f} MB beside their base: {memory / own:.2f} times the "
        f"adapters' own {own / 1e6:,.0f} MB.",
        f"Of {part['compared']:,} answers from mixed batches, {part['differing']} differ in a bit from what their "
        "model gives alone.",
        f"Unmerged against merged, {apart['rows']} rows: the difference of the two labels' log-probabilities moves by "
        f"{apart['median']:.3f} (at most {apart['largest']:.3f}) where the rows' own spread is {apart['spread']:.2f}; "
        f"{apart['answers_changed']} answers changed.",
        "",
    ]


def _over_http(folder: Path, part: dict[str, Any]) -> list[str]:
    lines = ["## Over HTTP", "", "| clients | p50, ms | p90 | p99 | rows a second, against the library |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for clients, one in part["clients"].items():
        times = " | ".join(f"{value:,.0f}" for value in one["milliseconds"].values())
        lines.append(f"| {clients} | {times} | {_span(one['rows_per_second_over_library'], '.2f')} |")
    lines += [
        "",
        f"The library answers {part['library_rows_per_second']:.1f} rows a second, one alone in "
        f"{1_000 * part['library_single']:.0f} ms; HTTP, Celery and Redis add "
        f"{part['added_milliseconds']:.1f} ms to it (medians).",
        "",
        "![Latency over HTTP](serving-latency.png)",
        "",
    ]
    figure, axes = plt.subplots(figsize=(5, 3))
    for name in ("p50", "p90", "p99"):
        counts = [int(clients) for clients in part["clients"]]
        values = [one["milliseconds"][name] for one in part["clients"].values()]
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
        f"{name} " + " → ".join(f"{each.get(name, 0) / 1e6:,.0f}" for each in part["memory_bytes"])
        for name in ("api", "inference")
    )
    times = part["milliseconds"]
    return [
        "## Twice the capacity",
        "",
        f"{part['seconds']:,.0f} s of {part['rate']:.0f} requests a second where {part['capacity']:.0f} can be "
        f"answered: {statuses}. Refusals without Retry-After: {part['bare_refusals']}. What was answered took "
        f"{times['p50']:,.0f} ms (p99 {times['p99']:,.0f}). Resident memory before and after each quarter, MB: "
        f"{memory}. Alone again, a request takes {part['milliseconds_after']['p50']:,.0f} ms.",
        "",
    ]
