"""`heft jobs`: fine-tuning jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.errors import CommandError
from cli.job_body import file_id, job_body
from cli.options import target

if TYPE_CHECKING:
    from cli.client import Client, Json

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
    dry_run: Annotated[
        bool, typer.Option(help="Check the files, print what training would take, and train nothing.")
    ] = False,
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
        if dry_run:
            _dry_run(client, {**body, "dry_run": True})
            return
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


def _post(context: typer.Context, job_id: str, action: str) -> None:
    with target(context).client() as client:
        print(client.post(f"{_JOBS}/{job_id}/{action}")["status"])


def _watch(client: Client, job_id: str) -> None:
    print(_ended(client, job_id)["fine_tuned_model"])


def _ended(client: Client, job_id: str) -> Json:
    """Shows a job until it ends, and returns it. Raises CommandError unless it has succeeded."""
    from cli.watch import watch_job

    job = watch_job(client, job_id)
    if job["status"] != "succeeded":
        reason = (job.get("error") or {}).get("message")
        raise CommandError(f"{job_id} {job['status']}{f': {reason}' if reason else ''}")
    return job


def _dry_run(client: Client, body: Json) -> None:
    """Prints what a job would take. Raises CommandError if its files are invalid or a stage does not fit."""
    from cli.report.estimate import print_estimate

    estimate = _ended(client, client.post(_JOBS, body)["id"])["estimate"]
    print_estimate(estimate)
    if estimate["fits"] is False:
        raise CommandError("the job does not fit on the training workers")
