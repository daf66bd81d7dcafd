"""The plots of a study as SVG, by matplotlib (extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from cli.client import Json
from cli.report.data import Report, layer_and_rank

_COLOURS = ("#2f6f9f", "#c4622d", "#3f8f5f", "#8a5fa8", "#b08a1e", "#5f6b73", "#b5485d", "#2f9f97")
#: Text is not converted to paths, and equal data gives an equal file.
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "heft", "font.size": 9}


def plots(report: Report) -> list[tuple[str, str]]:
    """Returns (caption, SVG) of each plot that the study has data for."""
    candidates = [
        (
            "Accuracy by operations. Bars: 95 % confidence intervals; dots: single seeds.",
            against_compute(report.arms),
        ),
        ("Accuracy by stage 2's layer and rank.", layer_rank_map(report.arms)),
        (
            "Training loss, one seed of each arm; losses of a reused stage are those of the job that trained it.",
            curves(report),
        ),
    ]
    return [(caption, svg) for caption, svg in candidates if svg is not None]


def against_compute(arms: Sequence[Json]) -> str | None:
    evaluated = [arm for arm in arms if arm["accuracy"] is not None and arm["flops"]]
    if not evaluated:
        return None
    figure, axes = _figure()
    for arm, colour in zip(evaluated, _colours(len(evaluated)), strict=True):
        mean, (low, high) = 100 * arm["accuracy"], (100 * end for end in arm["interval_95"])
        bar = [[mean - low], [high - mean]]
        axes.errorbar(
            [arm["flops"]], [mean], yerr=bar, fmt="s", color=colour, capsize=3, label=_label(arm["name"])
        )
        for run in arm["per_seed"]:
            axes.plot([arm["flops"]], [100 * run["accuracy"]], ".", color=colour, alpha=0.5)
    axes.set_xscale("log")
    axes.set_xlabel("floating-point operations of one run")
    axes.set_ylabel("accuracy, %")
    _legend(axes, len(evaluated))
    return _svg(figure)


def layer_rank_map(arms: Sequence[Json]) -> str | None:
    """A heat map if arms differ in both layer and rank; None otherwise."""
    cells = {cell: arm["accuracy"] for arm in arms if (cell := layer_and_rank(arm)) is not None}
    layers, ranks = sorted({layer for layer, _ in cells}), sorted({rank for _, rank in cells})
    known = [value for value in cells.values() if value is not None]
    if len(layers) < 2 or len(ranks) < 2 or not known:
        return None
    figure, axes = _figure()
    values = [[_percent(cells.get((layer, rank))) for layer in layers] for rank in ranks]
    image = axes.imshow(values, cmap="viridis", origin="lower", aspect="auto")
    for row, rank in enumerate(ranks):
        for column, layer in enumerate(layers):
            if (value := cells.get((layer, rank))) is not None:
                axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color="white")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlabel("layer")
    axes.set_ylabel("rank")
    figure.colorbar(image, label="accuracy, %")
    return _svg(figure)


def curves(report: Report) -> str | None:
    if not report.curves:
        return None
    figure, axes = _figure()
    for (name, curve), colour in zip(report.curves.items(), _colours(len(report.curves)), strict=True):
        axes.plot(
            [step for step, _ in curve], [loss for _, loss in curve], color=colour, label=_label(name), lw=1
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    _legend(axes, len(report.curves))
    return _svg(figure)


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colours(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _legend(axes: Any, count: int) -> None:
    if count <= 20:
        axes.legend(frameon=False, fontsize=8)


def _label(name: str) -> str:
    """Escapes what matplotlib would take for mathematics, and underscores that hide a label."""
    return name.replace("$", r"\$").removeprefix("_")


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def _svg(figure: Figure) -> str:
    """Returns the <svg> element only."""
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
