"""`heft keys`: API keys. Works on the database directly, because the API needs a key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cli.errors import CommandError
from cli.options import target

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

app = typer.Typer(help="API keys.", no_args_is_help=True)


@app.command()
def create(
    context: typer.Context,
    owner: Annotated[
        str, typer.Option(help="The owner whose files, jobs and models it gives access to.")
    ] = "default",
    name: Annotated[str, typer.Option(help="A description.")] = "",
) -> None:
    """Create a key and print it. It can't be shown again."""
    from store import keys

    with _session(context) as session:
        key = keys.create(session, owner_id=owner, name=name)
    print(key)


@app.command(name="list")
def list_keys(context: typer.Context) -> None:
    """List all keys by their public ids."""
    from cli.render import table
    from store import keys

    with _session(context) as session:
        rows = [
            (
                key.id,
                key.owner_id,
                key.name,
                f"{key.created_at:%Y-%m-%d %H:%M}",
                "revoked" if key.revoked_at else "valid",
            )
            for key in keys.list_keys(session)
        ]
    table(["id", "owner", "name", "created", "state"], rows)


@app.command()
def revoke(
    context: typer.Context, key_id: Annotated[str, typer.Argument(help="The id in `heft keys list`.")]
) -> None:
    """Revoke a key."""
    from store import keys

    with _session(context) as session:
        keys.revoke(session, key_id=key_id)
    print(f"revoked {key_id}")


@contextmanager
def _session(context: typer.Context) -> Iterator[Session]:
    from cli.stack.database import database_of
    from migrations import upgrade
    from store.db.session import make_engine, session_factory, transaction
    from store.errors import StoreError

    options = target(context)
    with database_of(options.home, options.database_url) as url:
        engine = make_engine(url, pool_size=1)
        try:
            upgrade(url)
            with transaction(session_factory(engine)) as session:
                yield session
        except StoreError as error:
            raise CommandError(error.message) from None
        finally:
            engine.dispose()
