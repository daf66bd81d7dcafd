"""Each kind of leftover is found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from harness.leftovers import left_behind

from cli.stack.home import Home
from cli.stack.process import locked

_WAITS = "import sys; print('here', flush=True); sys.stdin.read()"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a stopped stack leaves it: caches, and locks that nobody holds."""
    for name in ("cache/workers/train-0", "artifacts/.incomplete", "artifacts/jobs", "logs"):
        (tmp_path / "home" / name).mkdir(parents=True)
    for name in ("heft.lock", "postgres.lock", "cache/workers/lock", "cache/workers/train-0/lock"):
        (tmp_path / "home" / name).touch()
    return tmp_path


def found(folder: Path, *seen: psutil.Process) -> list[str]:
    return left_behind(Home.at(folder / "home"), folder, seen, timeout=0.1)


@contextmanager
def stray(*arguments: str, cwd: Path = Path("/")) -> Iterator[psutil.Process]:
    command = [sys.executable, "-c", _WAITS, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd) as child:
        assert child.stdout is not None
        child.stdout.readline()  # a process that only just begins has no command line yet
        yield psutil.Process(child.pid)
        child.communicate()


def test_a_stack_that_stopped_well_leaves_nothing(folder: Path) -> None:
    with stray(), stray(str(folder.parent)):  # somebody else's
        assert found(folder) == []


def test_a_process_that_was_seen(folder: Path) -> None:
    with stray() as process:
        assert f"process {process.pid}" in found(folder, process)[0]
    assert found(folder, process) == []


def test_a_process_that_nobody_saw(folder: Path) -> None:
    with stray(f"--data={folder}/home/postgres") as by_its_command:
        assert f"process {by_its_command.pid}" in found(folder)[0]
    with stray(cwd=folder / "home") as by_where_it_works:
        assert f"process {by_where_it_works.pid}" in found(folder)[0]


@pytest.mark.parametrize("name", ["heft.lock", "postgres.lock", "cache/workers/train-0/lock"])
def test_a_lock_that_is_held(folder: Path, name: str) -> None:
    with locked(folder / "home" / name, wait_seconds=0, busy=""):
        assert f"{name}: held" in found(folder)[0]


@pytest.mark.parametrize(
    "name",
    [
        "cache/workers/train-0/files", "artifacts/.incomplete/5c1", "artifacts/jobs/manifest.json.partial",
        "cache/.model.tmp", "stack.json",
    ],
)  # fmt: skip
def test_a_file_or_folder_that_stayed(folder: Path, name: str) -> None:
    (folder / "home" / name).touch()
    assert found(folder) == [str(folder / "home" / name)]


def test_the_folder_of_its_sockets(folder: Path) -> None:
    run = Home.at(folder / "home").run
    run.mkdir()
    try:
        assert found(folder) == [str(run)]
    finally:
        run.rmdir()
