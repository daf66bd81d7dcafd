"""Plots of a diagnostics report as PNG files, one for each part. Figures are made without pyplot's global state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_BEFORE, _AFTER = "tab:blue", "tab:orange"


def write(report: dict[str, Any], out_dir: Path) -> list[Path]:
    """Writes `<part>.png` for every part of the report, and returns the paths."""
    paths = []
    for part, draw in _DRAW.items():
        if part in report:
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            draw(figure, report[part])
            paths.append(out_dir / f"{part}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def _weights(figure: Figure, part: dict[str, Any]) -> None:
    counts, spectra = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    modules = part["modules"]
    adapters = len(part["stages"])
    for adapter in range(adapters):
        bars = [
            (index + 0.8 * adapter / adapters, stage["intruders"])
            for index, module in enumerate(modules)
            for stage in module["stages"]
            if stage["adapter"] == adapter
        ]
        x, height = [x for x, _ in bars], [height for _, height in bars]
        counts.bar(x, height, width=0.8 / adapters, align="edge", label=f"after LoRA stage {adapter + 1}")
    counts.set(
        title=f"Intruder dimensions of the {part['top']} largest", xlabel="adapted matrix", ylabel="count"
    )
    counts.set_ylim(0, part["top"])
    counts.legend()
    most_changed = max(modules, key=lambda module: float(module["relative_change"]))
    _spectra(spectra, most_changed)
    spectra.set_title(f"Most changed: {most_changed['module']}", fontsize=9)


def _representations(figure: Figure, part: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    _spectra(axes, part)
    values = [f"effective rank {part[s]['effective_rank']:.1f} {s}" for s in ("before", "after") if s in part]
    values += [f"CKA {part['cka']:.3f}"] if "cka" in part else []
    axes.set_title(f"Hidden states of {part['rows']} rows: {', '.join(values)}")


def _curvature(figure: Figure, part: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    for side, colour in (("before", _BEFORE), ("after", _AFTER)):
        if side in part:
            values = [value for value in part[side]["ritz_values"] if value > 0]
            trace, error = part[side]["trace"], part[side]["trace_standard_error"]
            label = f"{side}: λ₁ {part[side]['largest']:.3g}, trace {trace:.3g} ± {error:.2g}"
            axes.semilogy(range(1, len(values) + 1), values, "o-", ms=3, color=colour, label=label)
    axes.set(title="Gauss-Newton matrix of stage 2", xlabel="Ritz value", ylabel="size")
    axes.legend()


def _descent(figure: Figure, part: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    for side, colour in (("before", _BEFORE), ("after", _AFTER)):
        if side in part:
            steps = part[f"steps_{side}"]
            reached = f"{steps} steps" if steps is not None else "not reached"
            axes.plot(part[side], color=colour, label=f"{side}: {reached}")
    axes.axhline(part["target"], color="grey", lw=0.8, ls="--")
    axes.set(
        title="Stage 2 from the same initial intervention", xlabel="step", ylabel="loss (nats per token)"
    )
    axes.legend()


def _forgetting(figure: Figure, part: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    names = [f"{index}: {loss['after']}" for index, loss in enumerate(part["losses"])]
    axes.plot(names, [loss["loss"] for loss in part["losses"]], "o-", color=_AFTER)
    axes.set(title="General text", ylabel="loss (nats per token)")


def _spectra(axes: Axes, part: dict[str, Any]) -> None:
    for side, colour in (("before", _BEFORE), ("after", _AFTER)):
        if side in part:
            values = part[side]["singular_values"]
            # Centring makes one singular value zero up to rounding.
            values = [value for value in values if value > 1e-9 * values[0]]
            axes.semilogy(range(1, len(values) + 1), values, color=colour, label=side)
    axes.set(xlabel="index", ylabel="singular value")
    axes.legend()


_DRAW: dict[str, Callable[[Figure, dict[str, Any]], None]] = {
    "weights": _weights,
    "representations": _representations,
    "curvature": _curvature,
    "descent": _descent,
    "forgetting": _forgetting,
}
