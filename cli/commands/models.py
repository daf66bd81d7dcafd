"""`heft models`: base models and fine-tuned ones."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from cli.options import target

app = typer.Typer(help="Base models and fine-tuned ones.", no_args_is_help=True)


class Format(StrEnum):
    BUNDLE = "bundle"
    MERGED = "merged"
    PEFT = "peft"
    PYREFT = "pyreft"


@app.command(name="list")
def list_models(context: typer.Context) -> None:
    """List base models and fine-tuned models."""
    from cli.render import moment, table

    with target(context).client() as client:
        rows = [
            (model["id"], model["owned_by"], moment(model["created"]))
            for model in client.get("/v1/models")["data"]
        ]
    table(["id", "owned by", "created"], rows)


@app.command()
def delete(context: typer.Context, model: str) -> None:
    """Delete a fine-tuned model."""
    with target(context).client() as client:
        client.delete(f"/v1/models/{quote(model, safe='')}")
    print(f"deleted {model}")


@app.command()
def export(
    context: typer.Context,
    model: str,
    out: Annotated[Path, typer.Option(help="The tar file to write.")],
    file_format: Annotated[Format, typer.Option("--format", help="Its contents.")] = Format.BUNDLE,
) -> None:
    """Download a model as a tar: HEFT's bundle, a merged model, a PEFT adapter, or pyreft's interventions."""
    with target(context).client() as client:
        client.download(f"/v1/models/{quote(model, safe='')}/export", out, {"format": file_format})
    print(out)
