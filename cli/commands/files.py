"""`heft files`: training files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import target

app = typer.Typer(help="Training files.", no_args_is_help=True)


@app.command()
def upload(
    context: typer.Context, path: Annotated[Path, typer.Argument(help="A JSONL file, one row per line.")]
) -> None:
    """Upload a file and print its id."""
    with target(context).client() as client:
        print(client.upload(path)["id"])


@app.command(name="list")
def list_files(context: typer.Context) -> None:
    """List all files, newest first."""
    from cli.render import moment, table

    with target(context).client() as client:
        rows = [
            (file["id"], file["filename"], file["bytes"], moment(file["created_at"]))
            for file in client.get_all("/v1/files")
        ]
    table(["id", "name", "bytes", "created"], rows)


@app.command()
def delete(context: typer.Context, file_id: str) -> None:
    """Delete a file. Jobs that use it keep its content until they end."""
    with target(context).client() as client:
        client.delete(f"/v1/files/{file_id}")
    print(f"deleted {file_id}")
