"""`heft studies`: several methods on the same data, compared, over HTTP."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.commands.jobs import FileOption, file_id, job_body, setting_value
from cli.errors import CommandError
from cli.options import target

if TYPE_CHECKING:
    from cli.client import Client, Json

app = typer.Typer(help="Studies: several methods on the same data, compared.", no_args_is_help=True)

_STUDIES = "/v1/studies"
_PERIOD_SECONDS = 2.0
_ENDED = ("succeeded", "failed", "cancelled")
_FILES = ("training_file", "validation_file", "test_file")
StudyId = Annotated[str, typer.Argument(metavar="STUDY", help="The study's id, study_…")]


class Format(StrEnum):
    JSON = "json"
    MARKDOWN = "markdown"
    HTML = "html"


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="What the study is called.")],
    model: Annotated[str | None, typer.Option(help="The base model.")] = None,
    training_file: FileOption = None,
    validation_file: FileOption = None,
    test_file: FileOption = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="paper_table, equal_compute, order, layer_rank, stage1_variants or stage2_variants."
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
    budget: Annotated[int | None, typer.Option(help="So many of the grid's arms, drawn at random.")] = None,
    method: Annotated[str, typer.Option(help="What a grid varies.")] = "heft",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Settings of that method.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Each arm is run with each.")] = "1,2,3",
    baseline: Annotated[str | None, typer.Option(help="The arm that all others are compared with.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what it would take, and start nothing.")] = False,
    watch: Annotated[bool, typer.Option(help="Show what happens until it ends.")] = False,
) -> None:
    """Start a study and print its id."""
    from cli.render import as_json

    body: Json = {"name": name, "seeds": numbers(seeds), "dry_run": dry_run}
    given = {
        "model": model,
        "preset": preset,
        "epochs_scale": epochs_scale,
        "budget": budget,
        "baseline": baseline,
    }
    body |= {option: value for option, value in given.items() if value is not None}
    if arm:
        body["arms"] = [arm_body(text) for text in arm]
    if grid:
        body |= job_body(model=model or "", method=method, settings=settings or []) | body
        body["grid"] = grid_body(grid)
    with target(context).client() as client:
        for field, reference in zip(_FILES, (training_file, validation_file, test_file), strict=True):
            if reference is not None:
                body[field] = file_id(client, reference)
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
        from cli.report.words import markdown

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


def numbers(text: str) -> list[int]:
    """`"1,2,3"` → [1, 2, 3]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise CommandError(f"--seeds takes numbers with commas between them, not {text!r}") from None


def arm_body(text: str) -> Json:
    """`"narrow: heft reft.rank=2"` as the request has it."""
    name, separator, rest = text.partition(":")
    kind, *settings = rest.split() or [""]
    if not separator or not name.strip() or not kind:
        raise CommandError(f"--arm takes 'NAME: METHOD NAME=VALUE …', not {text!r}")
    body = job_body(model="", method=kind, settings=settings)
    beyond = {field: value for field, value in body.items() if field not in ("model", "method")}
    return {"name": name.strip(), "method": body["method"], **({"set": beyond} if beyond else {})}


def grid_body(settings: list[str]) -> dict[str, list[Any]]:
    """`["reft.layers=10,15"]` → {"reft.layers": [10, 15]}; a JSON list works too."""
    found: dict[str, list[Any]] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not text:
            raise CommandError(f"--grid takes NAME=VALUE,VALUE, not {setting!r}")
        value = setting_value(text)
        found[name] = value if isinstance(value, list) else [setting_value(part) for part in text.split(",")]
    return found


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
