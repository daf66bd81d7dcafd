"""A study as Markdown: a table of arms, the sentences, and single models apart from methods. It does NOT draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cli.client import Json
from cli.render import duration
from cli.report.data import Report

ARM_COLUMNS = (
    "arm",
    "accuracy",
    "95 % interval",
    "seeds one by one",
    "arithmetic",
    "time",
    "trained parameters",
)
MODEL_COLUMNS = (
    "a",
    "b",
    "seed",
    "right in a alone",
    "in b alone",
    "difference",
    "95 % interval",
    "p",
    "p (Holm)",
)
ABOUT_ARMS = (
    "Accuracy is the mean over the seeds. Its interval covers the test rows and, with several seeds, the seeds too."
    " Where rows are measured by another metric, its mean stands there. Arithmetic and time are of one run, a stage"
    " that was reused counted as when it was trained."
)
ABOUT_METHODS = (
    "Are the methods different? A t interval over the seeds' paired differences, with the noise of the test rows;"
    " Holm's correction over all comparisons."
)
ABOUT_MODELS = (
    "Are two single models different? McNemar's exact test on the same rows (a sign-flip test where they are more or"
    " less right), one pair of models at a time. It says nothing of the methods: another seed makes other models."
)


def markdown(report: Report) -> str:
    study = report.study
    parts = [
        f"# {_plain(study['name'])}",
        f"{study['id']}: {study['status']}. {_plain(study['model'])}, trained on {_plain(study['training_file'])},"
        f" measured on {_plain(measured_on(study))}, seeds {', '.join(map(str, study['seeds']))}.",
        "## Arms",
        _table(ARM_COLUMNS, arm_rows(report.arms)),
        ABOUT_ARMS,
        "## Verdict",
        ABOUT_METHODS,
        "\n".join(f"- {_plain(one['sentence'])}" for one in study["comparisons"])
        or "Nothing to compare yet.",
        "## Single models",
        ABOUT_MODELS,
        _table(MODEL_COLUMNS, model_rows(study["comparisons"])),
    ]
    return "\n\n".join(parts) + "\n"


def measured_on(study: Json) -> str:
    rows = study["test_file"] or f"{study['validation_file']} (validation rows: they may have steered)"
    metrics = sorted({arm["metric"] for arm in study["arms"] if arm.get("metric") not in (None, "accuracy")})
    return f"{rows} by {', '.join(metrics)}" if metrics else str(rows)


def arm_rows(arms: Iterable[Json]) -> list[list[str]]:
    return [
        [
            arm["name"],
            percent(arm["accuracy"]),
            between(arm["interval_95"]),
            ", ".join(f"{one['seed']}: {percent(one['accuracy'])}" for one in arm["per_seed"]) or _ends(arm),
            flops(arm["flops"]),
            "" if arm["seconds"] is None else duration(arm["seconds"]),
            "" if arm["trained_parameters"] is None else f"{arm['trained_parameters']:,}",
        ]
        for arm in arms
    ]


def _ends(arm: Json) -> str:
    """What became of an arm without numbers."""
    return ", ".join(f"{job['seed']}: {job['status']}" for job in arm["jobs"])


def model_rows(comparisons: Iterable[Json]) -> list[list[str]]:
    return [
        [
            one["a"],
            one["b"],
            str(model["seed"]),
            str(model["only_a"]),
            str(model["only_b"]),
            points(model["difference"]),
            " to ".join(points(end) for end in model["interval_95"]),
            f"{model['p_value']:.3f}",
            f"{model['p_adjusted']:.3f}",
        ]
        for one in comparisons
        for model in one["models"]
    ]


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def flops(value: float | None) -> str:
    """3.2e15 → "3.2 PFLOP"."""
    if value is None:
        return ""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP"
    return f"{value:.3g} FLOP"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(text: Any) -> str:
    """Names are the user's: nothing of them is markup."""
    shown = " ".join(str(text).split())
    return "".join(f"\\{sign}" if sign in "|`*_[]<>" else sign for sign in shown)
