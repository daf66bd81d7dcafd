"""`heft jobs`: fine-tuning jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import CommandError
from cli.options import target

if TYPE_CHECKING:
    from cli.client import Client

app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)

_JOBS = "/v1/fine_tuning/jobs"
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, ftjob-…")]
_file_option = typer.Option(metavar="FILE", help="A path to upload, file-…, hub:<dataset> or sample:<name>.")
FileOption = Annotated[str | None, _file_option]


@app.command()
def create(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="The base model.")],
    training_file: Annotated[str, _file_option],
    validation_file: FileOption = None,
    test_file: FileOption = None,
    method: Annotated[
        str, typer.Option(help="heft, lora, reft, heft_reversed or heft_interleaved.")
    ] = "heft",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="lora.rank=8, reft.layers=15, max_length=512, …"),
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed; the same seed gives the same losses on the same machine.")
    ] = None,
    watch: Annotated[bool, typer.Option(help="Show progress until it ends.")] = False,
) -> None:
    """Create a job and print its id."""
    body = job_body(model=model, method=method, settings=settings or [])
    with target(context).client() as client:
        for name, reference in (
            ("training_file", training_file),
            ("validation_file", validation_file),
            ("test_file", test_file),
        ):
            if reference is not None:
                body[name] = file_id(client, reference)
        body |= {name: value for name, value in (("suffix", suffix), ("seed", seed)) if value is not None}
        job = client.post(_JOBS, body)
        print(job["id"], flush=True)
        if watch:
            _watch(client, job["id"])


@app.command(name="list")
def list_jobs(context: typer.Context) -> None:
    """List all jobs, newest first."""
    from cli.render import moment, table

    with target(context).client() as client:
        rows = [
            (job["id"], job["status"], job["model"], job["fine_tuned_model"], moment(job["created_at"]))
            for job in client.get_all(_JOBS)
        ]
    table(["id", "status", "base", "fine-tuned model", "created"], rows)


@app.command()
def get(
    context: typer.Context,
    job_id: JobId,
    watch: Annotated[bool, typer.Option(help="Show progress until it ends.")] = False,
) -> None:
    """Print a job as JSON."""
    from cli.render import as_json

    with target(context).client() as client:
        if watch:
            _watch(client, job_id)
        else:
            as_json(client.get(f"{_JOBS}/{job_id}"))


@app.command()
def cancel(context: typer.Context, job_id: JobId) -> None:
    """Cancel a job."""
    _post(context, job_id, "cancel")


@app.command()
def pause(context: typer.Context, job_id: JobId) -> None:
    """Pause a job at a checkpoint."""
    _post(context, job_id, "pause")


@app.command()
def resume(context: typer.Context, job_id: JobId) -> None:
    """Resume a paused job from its checkpoint."""
    _post(context, job_id, "resume")


@app.command()
def events(context: typer.Context, job_id: JobId) -> None:
    """Print the events of a job, oldest first."""
    from cli.render import moment

    with target(context).client() as client:
        for event in reversed(list(client.get_all(f"{_JOBS}/{job_id}/events"))):
            print(f"{moment(event['created_at'])}  {event['level']:<5}  {event['message']}")


def job_body(*, model: str, method: str, settings: list[str]) -> dict[str, Any]:
    """Returns the request's body. Settings of a stage (`lora.rank=8`) belong to the method, others to the job."""
    body: dict[str, Any] = {"model": model, "method": {"type": method}}
    stages: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise CommandError(f"--set must have the form NAME=VALUE, not {setting!r}")
        parent = stages if name.startswith(("lora.", "reft.")) else body
        *path, leaf = name.split(".")
        for key in path:
            parent = parent.setdefault(key, {})
        parent[leaf] = setting_value(text)
    if stages:
        # Methods with one stage have its settings without the stage's name.
        body["method"][method] = stages.get(method, stages) if method in ("lora", "reft") else stages
    return body


def setting_value(text: str) -> Any:
    """Parses JSON, and returns any other text (`auto`, `f1+l1`) as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def file_id(client: Client, reference: str) -> str:
    """Returns a reference as it is, and uploads a path first."""
    if reference.startswith(("file-", "hub:", "sample:")) and not Path(reference).exists():
        return reference
    return str(client.upload(Path(reference))["id"])


def _post(context: typer.Context, job_id: str, action: str) -> None:
    with target(context).client() as client:
        print(client.post(f"{_JOBS}/{job_id}/{action}")["status"])


def _watch(client: Client, job_id: str) -> None:
    from cli.watch import watch_job

    job = watch_job(client, job_id)
    if job["status"] != "succeeded":
        reason = (job.get("error") or {}).get("message")
        raise CommandError(f"{job_id} {job['status']}{f': {reason}' if reason else ''}")
    print(job["fine_tuned_model"])
