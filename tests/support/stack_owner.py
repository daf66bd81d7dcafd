"""Owner processes of an embedded stack that may be killed, and checks that nothing of one is left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psycopg

import cli
from cli.stack.home import Home, can_traverse
from cli.stack.process import User, locked

NOBODY = User(uid=65534, gid=65534)

#: Another user can run the servers' binaries where they are installed.
INSTALLATION_IS_OPEN = can_traverse(Path(cli.__file__), NOBODY) and can_traverse(
    Path(psycopg.__file__), NOBODY
)

#: Starts a stack, says so on stdout, and keeps it until its stdin ends. It may become an ordinary user first, but
#: after its imports: that user may not be able to read this Python.
_OWNER = """
import os, sys
from pathlib import Path
import psycopg
from cli.stack.embedded import embedded_stack
from cli.stack.home import Home
if sys.argv[2:]:
    os.setgroups([])
    os.setgid(int(sys.argv[3]))
    os.setuid(int(sys.argv[2]))
with embedded_stack(Home.at(Path(sys.argv[1]))):
    print("ready", flush=True)
    sys.stdin.read()
"""

StartOwner = Callable[..., "subprocess.Popen[str]"]


def start_owner(
    home: Home, *, user: User | None = None, packages: Path | None = None
) -> subprocess.Popen[str]:
    """Starts a process that runs the stack of `home`. `packages` come before the installed ones."""
    python_path = [str(packages)] if packages else []
    python_path.append(os.environ["PYTHONPATH"])
    environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(python_path)}
    return subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(home.path), *([str(user.uid), str(user.gid)] if user else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd="/",
    )


def is_ready(owner: subprocess.Popen[str]) -> bool:
    """Waits for the line "ready"; False if the process ended without it."""
    assert owner.stdout is not None
    return owner.stdout.readline() == "ready\n"


def nothing_is_left(home: Home) -> bool:
    """Waits until no process of either server lives: each of them holds its server's lock."""
    with ExitStack() as locks:
        for name in ("postgres.lock", "valkey.lock"):
            locks.enter_context(locked(home.path / name, wait_seconds=20, busy=f"{name} is held"))
    return True


def servers_on(home: Home) -> list[bytes]:
    """Command lines of the servers of this home: Postgres' helper processes show other titles."""
    commands = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if os.fsencode(home.path) in command and (
            b"bin/postgres\0" in command or b"valkey-server" in command
        ):
            commands.append(command)
    return sorted(commands)
