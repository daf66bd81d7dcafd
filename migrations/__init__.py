"""Migrations of the database to the tables of `store.db`. They run from the installed package, in any folder."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, NullPool, create_engine, text

#: Several processes may start at once; one migrates, the others wait and find the work done.
_LOCK = 0x4845465400

_ANSWER_SECONDS = 10


def upgrade(url: str, *, revision: str = "head") -> None:
    """Apply the missing revisions up to `revision`, in one transaction.

    Raises sqlalchemy's OperationalError when the database is away.
    """
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": _ANSWER_SECONDS})
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    finally:
        engine.dispose()


def is_current(engine: Engine) -> bool:
    """True when the database has exactly the revisions of this code."""
    with engine.connect() as connection:
        applied = MigrationContext.configure(connection).get_current_heads()
    return set(applied) == set(ScriptDirectory.from_config(_config()).get_heads())


def _config() -> Config:
    config = Config()
    # ConfigParser reads % as the start of a variable.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
