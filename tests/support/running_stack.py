"""`heft up` as a process of a test, and the processes that it has started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil
from typer.testing import CliRunner, Result

from cli.main import app
from cli.stack.home import Home
from cli.stack.process import wait_until
from cli.stack.up import RunningStack, running_stack


class HeftUp:
    """A running `heft up`. `with heft_up(home) as stack`: ready when the body runs, gone after it."""

    def __init__(self, home: Home, process: subprocess.Popen[str], given_key: str | None) -> None:
        self.home = home
        self._given_key = given_key
        self.process = process
        #: every descendant process seen so far
        self.seen: dict[int, psutil.Process] = {}

    @property
    def record(self) -> RunningStack:
        record = running_stack(self.home)
        assert record is not None
        return record

    @property
    def key(self) -> str:
        return self._given_key or self.home.key_file.read_text().strip()

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.record.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def descendants(self) -> list[psutil.Process]:
        processes = psutil.Process(self.process.pid).children(recursive=True)
        self.seen |= {process.pid: process for process in processes}
        return processes

    def named(self, *words: str) -> list[psutil.Process]:
        """Its descendants whose command line holds all these words."""
        return [process for process in self.descendants() if all(word in _command(process) for word in words)]

    def nothing_is_left(self) -> bool:
        """Waits until no process that was ever seen lives."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=20)
        return not alive

    def run(self, *arguments: str) -> Result:
        """Runs another `heft` command for this home, in this process."""
        return heft("--home", str(self.home.path), "--api-key", self.key, *arguments)


def heft(*arguments: str) -> Result:
    """Runs a `heft` command in this process, without the HEFT_ variables of the environment."""
    cleared: dict[str, str | None] = {name: None for name in os.environ if name.startswith("HEFT_")}
    return CliRunner().invoke(app, list(arguments), env=cleared)


def start(home: Home, *options: str, **environment: str) -> subprocess.Popen[str]:
    """Starts `heft up` on a free port; the caller reads its stdout and stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEFT_")}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cli", "--home", str(home.path), "up", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | environment,
        cwd="/",
    )


@contextmanager
def heft_up(home: Home, *options: str, **environment: str) -> Iterator[HeftUp]:
    home.state_file.unlink(missing_ok=True)  # a killed stack leaves its state file
    process = start(home, *options, **environment)
    stack = HeftUp(home, process, environment.get("HEFT_API_KEY"))
    try:
        wait_until(lambda: process.poll() is not None or running_stack(home) is not None, seconds=120)
        if process.poll() is not None:
            raise AssertionError("\n".join(process.communicate()))
        stack.descendants()
        yield stack
    finally:
        process.terminate()
        process.communicate(timeout=100)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
