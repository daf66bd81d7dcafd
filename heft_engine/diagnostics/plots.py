"""A plot for each part of a diagnostics report, as PNG. Figures are made without pyplot, which keeps state.

It does NOT compute: everything that is drawn is in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_BEFORE, _AFTER = "tab:blue", "tab:orange"


def write(report: dict[str, Any], out_dir: Path) -> list[Path]:
    """`<part>.png` for every part that the report has."""
    drawn = []
    for part, draw in _DRAW.items():
        if part in report:
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            draw(figure, report[part])
            drawn.append(out_dir / f"{part}.png")
            figure.savefig(drawn[-1], dpi=120)
    return drawn


def _weights(figure: Figure, part: dict[str, Any]) -> None:
    counts, spectra = _two(figure)
    modules = part["modules"]
    adapters = len(part["stages"])
    for adapter in range(adapters):
        found = [
            (at, stage["intruders"])
            for at, module in enumerate(modules)
            for stage in module["stages"]
            if stage["adapter"] == adapter
        ]
        at, count = [x + 0.8 * adapter / adapters for x, _ in found], [y for _, y in found]
        counts.bar(at, count, width=0.8 / adapters, align="edge", label=f"after LoRA stage {adapter + 1}")
    counts.set(
        title=f"Intruder dimensions of the {part['top']} largest", xlabel="adapted matrix", ylabel="count"
    )
    counts.set_ylim(0, part["top"])
    counts.legend()
    most = max(modules, key=lambda module: float(module["relative_change"]))
    _spectra(spectra, most)
    spectra.set_title(f"Most changed: {most['module']}", fontsize=9)


def _representations(figure: Figure, part: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    _spectra(axes, part)
    told = [f"effective rank {part[s]['effective_rank']:.1f} {s}" for s in ("before", "after") if s in part]
    told += [f"CKA {part['cka']:.3f}"] if "cka" in part else []
    axes.set_title(f"States of {part['rows']} rows: {', '.join(told)}")


def _curvature(figure: Figure, part: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    for side, colour in (("before", _BEFORE), ("after", _AFTER)):
        if side in part:
            own = part[side]
            label = f"{side}: λ₁ {own['largest']:.3g}, trace {own['trace']:.3g} ± {own['trace_standard_error']:.2g}"
            values = [value for value in own["ritz_values"] if value > 0]
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
    axes.set(title="Stage 2 from the same beginning", xlabel="step", ylabel="loss (nats a token)")
    axes.legend()


def _forgetting(figure: Figure, part: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    names = [f"{at}: {loss['after']}" for at, loss in enumerate(part["losses"])]
    axes.plot(names, [loss["loss"] for loss in part["losses"]], "o-", color=_AFTER)
    axes.set(title="Text that the task never saw", ylabel="loss (nats a token)")


def _spectra(axes: Axes, part: dict[str, Any]) -> None:
    for side, colour in (("before", _BEFORE), ("after", _AFTER)):
        if side in part:
            found = part[side]["singular_values"]
            # Centred rows have one that is rounding alone.
            values = [value for value in found if value > 1e-9 * found[0]]
            axes.semilogy(range(1, len(values) + 1), values, color=colour, label=side)
    axes.set(xlabel="index", ylabel="singular value")
    axes.legend()


def _two(figure: Figure) -> tuple[Axes, Axes]:
    return figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)


_DRAW: dict[str, Callable[[Figure, dict[str, Any]], None]] = {
    "weights": _weights,
    "representations": _representations,
    "curvature": _curvature,
    "descent": _descent,
    "forgetting": _forgetting,
}
