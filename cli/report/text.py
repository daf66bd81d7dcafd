"""A study's report as Markdown: tables of arms, trials, tasks and models, and the sentences of its comparisons."""

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
    "by seed",
    "operations",
    "time",
    "trained parameters",
)
TRIAL_COLUMNS = ("trial", "settings", "validation value", "state")
MODEL_COLUMNS = (
    "a",
    "b",
    "seed",
    "only a correct",
    "only b correct",
    "difference",
    "95 % interval",
    "p",
    "p (Holm)",
)
ABOUT_ARMS = (
    "Accuracy is the mean over the seeds, or the mean of the task's primary metric if it has another one. Its"
    " confidence interval covers the test rows and, with several seeds, the seeds too. Operations and time are those"
    " of a run on average; a reused stage counts with the costs of its training."
)
ABOUT_TRIALS = (
    "Trials are selected on the validation rows. Only the best trial was evaluated on the test rows, once the search"
    " had ended. Its seeds are those it was selected with: to confirm the result, run it again with other seeds."
)
ABOUT_TASKS = (
    "Accuracy by task and method, with its 95 % confidence interval. A comparison over tasks is a t interval over the"
    " tasks' differences, with the variance of their rows and seeds added. It generalises to other tasks only as far as"
    " these are a random sample of them."
)
ABOUT_METHODS = (
    "Do the methods differ? Paired t interval over the seeds with the variance of the test rows added; p-values are"
    " Holm-corrected over all comparisons."
)
ABOUT_MODELS = (
    "Do two single models differ? McNemar's exact test on the same rows (a sign-flip test for graded metrics), for each"
    " pair of models. It says nothing about the methods: another seed gives other models."
)


def markdown(report: Report) -> str:
    study = report.study
    parts = [
        f"# {_plain(study['name'])}",
        f"{study['id']}: {study['status']}. {_plain(study['model'])}, {_plain(rows_of(study))}, seeds"
        f" {', '.join(map(str, study['seeds']))}.",
        "## Arms",
        _table(ARM_COLUMNS, arm_rows(evaluated_arms(report.arms))),
        ABOUT_ARMS,
        *_markdown_of_search(study),
        *_markdown_of_tasks(study),
        "## Comparisons",
        ABOUT_METHODS,
        _sentences(study["comparisons"]) or "There are no comparisons.",
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
        _plain(best_trial(study)),
        _table(TRIAL_COLUMNS, trial_rows(study["arms"])),
        ABOUT_TRIALS,
    ]


def _markdown_of_tasks(study: Json) -> list[str]:
    if not study.get("tasks"):
        return []
    columns, *rows = task_table(study)
    return ["## Tasks", _table(columns, rows), ABOUT_TASKS, _sentences(study["over_tasks"])]


def _sentences(comparisons: Iterable[Json]) -> str:
    return "\n".join(f"- {_plain(comparison['sentence'])}" for comparison in comparisons)


def rows_of(study: Json) -> str:
    """Describes the training and evaluation rows of a study."""
    if study.get("tasks"):
        return "on " + "; ".join(f"{task['name']}: {_rows_of(task)}" for task in study["tasks"])
    metrics = sorted({arm["metric"] for arm in study["arms"] if arm.get("metric") not in (None, "accuracy")})
    return _rows_of(study) + (f" by {', '.join(metrics)}" if metrics else "")


def _rows_of(part: Json) -> str:
    evaluated = (
        part["test_file"] or f"{part['validation_file']} (validation rows, which may have been tuned on)"
    )
    return f"trained on {part['training_file']}, evaluated on {evaluated}"


def task_table(study: Json) -> list[list[str]]:
    """Returns a row for each task and a column for each method, after a header row."""
    cells = {(arm["task"], arm["method_name"]): arm for arm in study["arms"]}
    methods = list(dict.fromkeys(method for _, method in cells))
    rows = [
        [task["name"], *(_cell(cells[task["name"], method]) for method in methods)] for task in study["tasks"]
    ]
    return [["task", *methods], *rows]


def _cell(arm: Json) -> str:
    if arm["accuracy"] is None:
        return _statuses(arm)
    return f"{percent(arm['accuracy'])} ({between(arm['interval_95'])})"


def best_trial(study: Json) -> str:
    """Describes the best trial of a search so far."""
    best = study["search"]["best"]
    if best is None:
        return "No trial has succeeded yet."
    return f"Best on the validation rows: {best['arm']}, {percent(best['value'])}."


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


def evaluated_arms(arms: Sequence[Json]) -> list[Json]:
    """Returns all arms but the trials that are not evaluated on the test rows."""
    return [arm for arm in arms if not arm.get("trial") or arm["accuracy"] is not None]


def arm_rows(arms: Iterable[Json]) -> list[list[str]]:
    return [
        [
            arm["name"],
            percent(arm["accuracy"]),
            between(arm["interval_95"]),
            ", ".join(f"{run['seed']}: {percent(run['accuracy'])}" for run in arm["per_seed"])
            or _statuses(arm),
            flops(arm["flops"]),
            "" if arm["seconds"] is None else duration(arm["seconds"]),
            "" if arm["trained_parameters"] is None else f"{arm['trained_parameters']:,}",
        ]
        for arm in arms
    ]


def _statuses(arm: Json) -> str:
    """The statuses of the jobs of an arm without results."""
    return ", ".join(f"{job['seed']}: {job['status']}" for job in arm["jobs"])


def model_rows(comparisons: Iterable[Json]) -> list[list[str]]:
    return [
        [
            comparison["a"],
            comparison["b"],
            str(model["seed"]),
            str(model["only_a"]),
            str(model["only_b"]),
            points(model["difference"]),
            " to ".join(points(end) for end in model["interval_95"]),
            f"{model['p_value']:.3f}",
            f"{model['p_adjusted']:.3f}",
        ]
        for comparison in comparisons
        for model in comparison["models"]
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
    """Escapes Markdown, since names are the user's."""
    one_line = " ".join(str(text).split())
    return "".join(f"\\{sign}" if sign in "|`*_[]<>" else sign for sign in one_line)
