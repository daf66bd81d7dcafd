"""Homes for the tests of the command, and processes that own their stacks and end with the test."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import stack_owner
from scripted_service import Service, scripted_service
from stack_owner import StartOwner

from cli.stack.home import Home
from cli.stack.process import User


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path that other users can traverse; pytest's are private."""
    path = Path(tempfile.mkdtemp(prefix="heft-test-", dir="/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def home(folder: Path) -> Home:
    return Home.at(folder / "home")


@pytest.fixture
def start_owner() -> Iterator[StartOwner]:
    started: list[subprocess.Popen[str]] = []

    def start(home: Home, *, user: User | None = None, packages: Path | None = None) -> subprocess.Popen[str]:
        started.append(stack_owner.start_owner(home, user=user, packages=packages))
        return started[-1]

    yield start
    for process in started:
        process.communicate(timeout=60)  # stdin ends: it stops its servers


@pytest.fixture
def service() -> Iterator[Service]:
    with scripted_service() as service:
        yield service
