"""Runs the real `heft up` with four changes.

Its programs start through `launch`, so they have crash points. There are two training workers and no inference worker.
The database is reached through `pg_proxy`. A program that dies is restarted after half a second each time.

`owner.py <control folder> <home> <port>`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cli.stack import supervise, up
from cli.stack.postgres import Postgres, database_url
from cli.stack.supervise import Program

LAUNCH = Path(__file__).with_name("launch.py")
ROLES = {"train": "training worker", "train-2": "second training worker", "prepare": "prepare worker"}


def main() -> None:
    control, home, port = sys.argv[1:]

    def program(*, command: list[str], **rest: Any) -> Program:
        words = command[command.index("-m") + 1 :]
        role, arguments = ("api", words[1:]) if words[0] == "cli" else (words[1], [])
        launched = [sys.executable, "-P", LAUNCH, control, role, *arguments]
        return Program(command=launched, **rest)

    class ProxiedPostgres(Postgres):
        @property
        def url(self) -> str:
            return database_url(Path(control) / "proxy")

    up.Program = program
    up.Postgres = ProxiedPostgres
    up._WORKERS = ROLES
    supervise._MAX_PAUSE_SECONDS = supervise._FIRST_PAUSE_SECONDS

    from cli.main import app

    app(["--home", home, "up", "--port", port])


if __name__ == "__main__":
    main()
