"""A study's report as a single HTML page with embedded plots, without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from cli.client import Json
from cli.report.data import Report
from cli.report.plots import plots
from cli.report.text import (
    ABOUT_ARMS,
    ABOUT_METHODS,
    ABOUT_MODELS,
    ABOUT_TASKS,
    ABOUT_TRIALS,
    ARM_COLUMNS,
    MODEL_COLUMNS,
    TRIAL_COLUMNS,
    arm_rows,
    best_trial,
    evaluated_arms,
    model_rows,
    rows_of,
    task_table,
    trial_rows,
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2428; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #d8dde0; vertical-align: top; }
p.note, figcaption { color: #5f6b73; font-size: 13px; max-width: 46rem; }
figure { margin: 1.5rem 0; } svg { max-width: 100%; height: auto; }
"""


def page(report: Report) -> str:
    study = report.study
    setup = f"{study['model']}, {rows_of(study)}"
    seeds = ", ".join(map(str, study["seeds"]))
    figures = "".join(
        f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for text, svg in plots(report)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(study["name"])}</title><style>{_STYLE}</style></head><body>
<h1>{escape(study["name"])}</h1>
<p>{escape(study["id"])}: {escape(study["status"])}. {escape(setup)}, seeds {escape(seeds)}.</p>
<h2>Arms</h2>{_table(ARM_COLUMNS, arm_rows(evaluated_arms(report.arms)))}{_note(ABOUT_ARMS)}
{_search(study)}{_tasks(study)}
<h2>Comparisons</h2>{_note(ABOUT_METHODS)}
{_sentences(study["comparisons"]) or "<p>There are no comparisons.</p>"}
{figures}
<h2>Single models</h2>{_note(ABOUT_MODELS)}
{_table(MODEL_COLUMNS, model_rows(study["comparisons"]))}
</body></html>
"""


def _search(study: Json) -> str:
    if not study.get("search"):
        return ""
    table = _table(TRIAL_COLUMNS, trial_rows(study["arms"]))
    return f"<h2>Search</h2><p>{escape(best_trial(study))}</p>{table}{_note(ABOUT_TRIALS)}"


def _tasks(study: Json) -> str:
    if not study.get("tasks"):
        return ""
    columns, *rows = task_table(study)
    return f"<h2>Tasks</h2>{_table(columns, rows)}{_note(ABOUT_TASKS)}{_sentences(study['over_tasks'])}"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _sentences(comparisons: Sequence[Json]) -> str:
    items = "".join(f"<li>{escape(comparison['sentence'])}</li>" for comparison in comparisons)
    return f"<ul>{items}</ul>" if items else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
