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
TRIAL_COLUMNS = ("trial", "settings", "on the validation rows", "what became of it")
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
ABOUT_TRIALS = (
    "Trials are chosen by the validation rows alone. Of the test rows only the best trial's result was looked at, once"
    " the search was over. Its seeds are those that it was chosen with: to be sure of it, run it again with others."
)
ABOUT_TASKS = (
    "Accuracy by task and method, with its 95 % interval. Over tasks each is one case: a t interval over the tasks'"
    " differences, with the noise of their rows and seeds. It speaks of tasks only as far as these stand for them."
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
        f"{study['id']}: {study['status']}. {_plain(study['model'])}, {_plain(rows_of(study))}, seeds"
        f" {', '.join(map(str, study['seeds']))}.",
        "## Arms",
        _table(ARM_COLUMNS, arm_rows(judged_arms(report.arms))),
        ABOUT_ARMS,
        *_markdown_of_search(study),
        *_markdown_of_tasks(study),
        "## Verdict",
        ABOUT_METHODS,
        _sentences(study["comparisons"]) or "There is nothing to compare.",
        "## Single models",
        ABOUT_MODELS,
        _table(MODEL_COLUMNS, model_rows(study["comparisons"])),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_of_search(study: Json) -> list[str]:
    if not study.get("search"):
        return []
    return [
        "## Search",
        _plain(best_of(study)),
        _table(TRIAL_COLUMNS, trial_rows(study["arms"])),
        ABOUT_TRIALS,
    ]


def _markdown_of_tasks(study: Json) -> list[str]:
    if not study.get("tasks"):
        return []
    columns, *rows = task_table(study)
    return ["## Tasks", _table(columns, rows), ABOUT_TASKS, _sentences(study["over_tasks"])]


def _sentences(found: Iterable[Json]) -> str:
    return "\n".join(f"- {_plain(one['sentence'])}" for one in found)


def rows_of(study: Json) -> str:
    """What a study was trained and measured on, in words."""
    if study.get("tasks"):
        return "on " + "; ".join(f"{task['name']}: {_rows_of(task)}" for task in study["tasks"])
    metrics = sorted({arm["metric"] for arm in study["arms"] if arm.get("metric") not in (None, "accuracy")})
    return _rows_of(study) + (f" by {', '.join(metrics)}" if metrics else "")


def _rows_of(part: Json) -> str:
    measured = part["test_file"] or f"{part['validation_file']} (validation rows: they may have steered)"
    return f"trained on {part['training_file']}, measured on {measured}"


def task_table(study: Json) -> list[list[str]]:
    """Tasks down, methods across; the first row is the head."""
    cells = {(arm["task"], arm["method_name"]): arm for arm in study["arms"]}
    methods = list(dict.fromkeys(method for _, method in cells))
    rows = [
        [task["name"], *(_cell(cells[task["name"], method]) for method in methods)] for task in study["tasks"]
    ]
    return [["task", *methods], *rows]


def _cell(arm: Json) -> str:
    if arm["accuracy"] is None:
        return _ends(arm)
    return f"{percent(arm['accuracy'])} ({between(arm['interval_95'])})"


def best_of(study: Json) -> str:
    """What a search has found so far, in words."""
    found = study["search"]["best"]
    if found is None:
        return "No trial has succeeded yet."
    return f"Best on the validation rows: {found['arm']}, {percent(found['value'])}."


def trial_rows(arms: Iterable[Json]) -> list[list[str]]:
    trials = [arm["trial"] for arm in arms if arm.get("trial")]
    return [
        [
            str(trial["number"]),
            ", ".join(f"{name} = {value}" for name, value in trial["params"].items()),
            percent(trial["value"]),
            f"{trial['state']}: {trial['reason']}" if trial["reason"] else trial["state"],
        ]
        for trial in trials
    ]


def judged_arms(arms: Sequence[Json]) -> list[Json]:
    """All but the trials whose test rows nobody looks at."""
    return [arm for arm in arms if not arm.get("trial") or arm["accuracy"] is not None]


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
