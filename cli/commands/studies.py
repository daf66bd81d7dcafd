"""`heft studies`: several methods on the same data, compared, over HTTP."""

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

app = typer.Typer(help="Studies: several methods on the same data, compared.", no_args_is_help=True)

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
    name: Annotated[str | None, typer.Option(help="What the study is called.")] = None,
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
    epochs_scale: Annotated[float | None, typer.Option(help="Of a preset's epochs.")] = None,
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
            help="reft.rank=2,4,8 or reft.learning_rate=1e-5..1e-3:log: chosen by the validation rows",
        ),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="So many trials of a search, or of the grid's arms, drawn at random.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="How a search chooses: tpe or random.")] = None,
    parallel: Annotated[int | None, typer.Option(help="So many trials of a search at a time.")] = None,
    method: Annotated[
        str | None, typer.Option(help="What a grid or a search varies.", show_default="heft")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Settings of that method.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Each arm is run with each.", show_default="1,2,3")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The arm that all others are compared with.")] = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="The request as JSON; what else is given goes before."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what it would take, and start nothing.")] = False,
    watch: Annotated[bool, typer.Option(help="Show what happens until it ends.")] = False,
) -> None:
    """Start a study and print its id."""
    from cli import study_body
    from cli.render import as_json

    given = {
        "name": name,
        "model": model,
        "preset": preset,
        "epochs_scale": epochs_scale,
        "baseline": baseline,
    }
    given |= dict(zip(study_body.FILES, (training_file, validation_file, test_file), strict=True))
    body = study_body.read(from_file) if from_file is not None else {}
    body |= {option: value for option, value in given.items() if value is not None}
    if seeds is not None:
        body["seeds"] = study_body.numbers(seeds)
    body |= study_body.arms(arm or [], grid or [], method=method, settings=settings or [])
    body |= study_body.chosen(
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
    """Show all studies, newest first."""
    from cli.render import moment, table

    with target(context).client() as client:
        rows = [
            (study["id"], study["status"], study["name"], study["model"], moment(study["created_at"]))
            for study in client.everything(_STUDIES)
        ]
    table(["id", "status", "name", "base", "created"], rows)


@app.command()
def get(context: typer.Context, study_id: StudyId) -> None:
    """Show one study as JSON."""
    from cli.render import as_json

    with target(context).client() as client:
        as_json(client.get(f"{_STUDIES}/{study_id}"))


@app.command()
def watch(context: typer.Context, study_id: StudyId) -> None:
    """Show what happens in a study until it ends."""
    with target(context).client() as client:
        _watch(client, study_id)


@app.command()
def cancel(context: typer.Context, study_id: StudyId) -> None:
    """End every job of a study that has not ended."""
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
    """Write a study's numbers, its verdict and its plots."""
    chosen = file_format or _format_of(out)
    from cli.report.data import fetch

    with target(context).client() as client:
        found = fetch(client, study_id)
    if chosen is Format.JSON:
        text = json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n"
    elif chosen is Format.MARKDOWN:
        from cli.report.text import markdown

        text = markdown(found)
    else:
        text = _page(found)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text)
        print(out)


def _page(found: Any) -> str:
    try:
        from cli.report.page import page
    except ModuleNotFoundError as missing:
        raise CommandError(
            f"plots need {missing.name}: pip install 'heft-service[report]', or take --format markdown"
        ) from None
    return page(found)


def _format_of(out: Path | None) -> Format:
    suffixes = {".json": Format.JSON, ".html": Format.HTML, ".htm": Format.HTML}
    return suffixes.get(out.suffix, Format.MARKDOWN) if out is not None else Format.MARKDOWN


def _watch(client: Client, study_id: str) -> None:
    seen: set[str] = set()
    while True:
        study = client.patient_get(f"{_STUDIES}/{study_id}")
        # After the study itself: what led to its end is among them.
        events = list(client.everything(f"{_STUDIES}/{study_id}/events"))
        for event in reversed(events):
            if event["id"] not in seen:
                seen.add(event["id"])
                print(event["message"], flush=True)
        if study["status"] in _ENDED:
            break
        time.sleep(_PERIOD_SECONDS)
    if study["status"] != "succeeded":
        raise CommandError(f"{study_id} {study['status']}")
