"""The `heft` command. Commands import what they need when they run, so that `heft --help` is fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli.commands import files, jobs, keys, models, predict, service, studies
from cli.errors import CommandError
from cli.options import Target
from cli.stack.home import Home, default_home


class _Group(TyperGroup):
    """Prints a CommandError as one line and exits with code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CommandError as error:
            print(f"heft: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def heft(
    context: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(
            envvar="HEFT_HOME", help="Folder for this machine's data.", show_default=str(default_home())
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            envvar="HEFT_URL", help="URL of the service.", show_default="the one running in HEFT_HOME"
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HEFT_API_KEY", help="API key.", show_default="the first key in HEFT_HOME"),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="HEFT_DATABASE_URL", help="URL of a Postgres.", show_default="a private one in HEFT_HOME"
        ),
    ] = None,
) -> None:
    """Fine-tune language models coarse to fine (LoRA, then LoReFT) on your own machines."""
    context.obj = Target(
        home=Home.at(home or default_home()),
        url=url or None,
        api_key=api_key or None,
        database_url=database_url or None,
    )


service.register(app)
app.command()(predict.predict)
app.add_typer(jobs.app, name="jobs")
app.add_typer(studies.app, name="studies")
app.add_typer(files.app, name="files")
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
