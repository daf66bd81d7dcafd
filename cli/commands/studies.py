"""`heft studies`: comparisons of several methods on the same data."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.commands.jobs import FileOption
from cli.errors import CommandError
from cli.options import target

if TYPE_CHECKING:
    from cli.client import Client

app = typer.Typer(help="Studies: comparisons of several methods on the same data.", no_args_is_help=True)

_STUDIES = "/v1/studies"
_PERIOD_SECONDS = 2.0
_ENDED = ("succeeded", "failed", "cancelled")
StudyId = Annotated[str, typer.Argument(metavar="STUDY", help="The study's id, study_…")]


class Format(StrEnum):
    JSON = "json"
    MARKDOWN = "markdown"
    HTML = "html"


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str | None, typer.Option(help="Name of the study.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model.")] = None,
    training_file: FileOption = None,
    validation_file: FileOption = None,
    test_file: FileOption = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="paper_table, equal_compute, order, layer_rank, stage1_variants, stage2_variants or cross_task."
        ),
    ] = None,
    epochs_scale: Annotated[float | None, typer.Option(help="Multiplies a preset's epochs.")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME: METHOD NAME=VALUE …'", help="'narrow: heft reft.rank=2'"),
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE,…", help="reft.layers=10,15,20: every combination")
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,… | NAME=LOW..HIGH[:log]",
            help="reft.rank=2,4,8 or reft.learning_rate=1e-5..1e-3:log: optimized on the validation rows",
        ),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Number of trials of a search, or of randomly drawn arms of a grid.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler of a search: tpe or random.")] = None,
    parallel: Annotated[int | None, typer.Option(help="Concurrent trials of a search.")] = None,
    method: Annotated[
        str | None, typer.Option(help="The method of a grid or a search.", show_default="heft")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Settings of that method.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Random seeds; each arm runs with each.", show_default="1,2,3")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The arm that all others are compared with.")] = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="The request as JSON; other options override it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the study's estimated costs and start nothing.")
    ] = False,
    watch: Annotated[bool, typer.Option(help="Print its events until it ends.")] = False,
) -> None:
    """Create a study and print its id."""
    from cli import study_body
    from cli.render import as_json

    options = {
        "name": name,
        "model": model,
        "preset": preset,
        "epochs_scale": epochs_scale,
        "baseline": baseline,
    }
    options |= dict(zip(study_body.FILES, (training_file, validation_file, test_file), strict=True))
    body = study_body.read(from_file) if from_file is not None else {}
    body |= {option: value for option, value in options.items() if value is not None}
    if seeds is not None:
        body["seeds"] = study_body.parse_seeds(seeds)
    body |= study_body.arms(arm or [], grid or [], method=method, settings=settings or [])
    body |= study_body.search_or_budget(
        search or [], body.get("search"), budget=budget, sampler=sampler, parallel=parallel
    )
    body["dry_run"] = dry_run = dry_run or body.get("dry_run", False)
    with target(context).client() as client:
        study_body.upload_files(client, body)
        study = client.post(_STUDIES, body)
        if dry_run:
            as_json(study)
            return
        print(study["id"], flush=True)
        if watch:
            _watch(client, study["id"])


@app.command(name="list")
def list_studies(context: typer.Context) -> None:
    """List all studies, newest first."""
    from cli.render import moment, table

    with target(context).client() as client:
        rows = [
            (study["id"], study["status"], study["name"], study["model"], moment(study["created_at"]))
            for study in client.get_all(_STUDIES)
        ]
    table(["id", "status", "name", "base", "created"], rows)


@app.command()
def get(context: typer.Context, study_id: StudyId) -> None:
    """Print a study as JSON."""
    from cli.render import as_json

    with target(context).client() as client:
        as_json(client.get(f"{_STUDIES}/{study_id}"))


@app.command()
def watch(context: typer.Context, study_id: StudyId) -> None:
    """Print the events of a study until it ends."""
    with target(context).client() as client:
        _watch(client, study_id)


@app.command()
def cancel(context: typer.Context, study_id: StudyId) -> None:
    """Cancel all unfinished jobs of a study."""
    with target(context).client() as client:
        print(client.post(f"{_STUDIES}/{study_id}/cancel")["status"])


@app.command()
def report(
    context: typer.Context,
    study_id: StudyId,
    out: Annotated[Path | None, typer.Option(help="The file to write; else it is printed.")] = None,
    file_format: Annotated[
        Format | None,
        typer.Option("--format", help="json, markdown or html.", show_default="by the file's name"),
    ] = None,
) -> None:
    """Write a report of a study: its results, comparisons and plots."""
    from cli.report.data import fetch

    file_format = file_format or _format_of(out)
    with target(context).client() as client:
        data = fetch(client, study_id)
    if file_format is Format.JSON:
        text = json.dumps(data.to_json(), indent=2, ensure_ascii=False) + "\n"
    elif file_format is Format.MARKDOWN:
        from cli.report.text import markdown

        text = markdown(data)
    else:
        text = _page(data)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text)
        print(out)


def _page(data: Any) -> str:
    try:
        from cli.report.page import page
    except ModuleNotFoundError as missing:
        raise CommandError(
            f"plots need {missing.name}: pip install 'heft-service[report]', or use --format markdown"
        ) from None
    return page(data)


def _format_of(out: Path | None) -> Format:
    suffixes = {".json": Format.JSON, ".html": Format.HTML, ".htm": Format.HTML}
    return suffixes.get(out.suffix, Format.MARKDOWN) if out is not None else Format.MARKDOWN


def _watch(client: Client, study_id: str) -> None:
    seen: set[str] = set()
    while True:
        study = client.get_with_retries(f"{_STUDIES}/{study_id}")
        # After the study, so that the events that ended it are among them.
        events = list(client.get_all(f"{_STUDIES}/{study_id}/events"))
        for event in reversed(events):
            if event["id"] not in seen:
                seen.add(event["id"])
                print(event["message"], flush=True)
        if study["status"] in _ENDED:
            break
        time.sleep(_PERIOD_SECONDS)
    if study["status"] != "succeeded":
        raise CommandError(f"{study_id} {study['status']}")
