"""The stack under test: `heft up` with timeouts of seconds, its processes by role, and what remains after it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis
from harness.leftovers import left_behind

from cli.stack.home import Home
from cli.stack.postgres import database_url
from cli.stack.process import spawn, wait_until
from store.storage.artifacts import Artifacts

HERE = Path(__file__).parent
ROLES = ("train", "train-2", "prepare")
#: In seconds. What takes a minute in production takes two seconds here, in proportion.
QUICK_SETTINGS = {
    "HEFT_LEASE_SECONDS": "2.5",
    "HEFT_LEASE_GRACE_SECONDS": "0.3",
    "HEFT_HEARTBEAT_SECONDS": "0.4",
    "HEFT_CONTROL_SECONDS": "0.15",
    "HEFT_SWEEP_SECONDS": "0.5",
    "HEFT_STALL_SECONDS": "120",  # a busy machine must not count as a stalled trainer; no fault freezes one that long
    "HEFT_CANCEL_GRACE_SECONDS": "1",
    "HEFT_CHECKPOINT_GRACE_SECONDS": "3",
    "HEFT_CHECKPOINT_SECONDS": "0.1",
    "HEFT_DEATH_PAUSE_SECONDS": "0.1",
    "HEFT_MAX_LOST_LEASES": "200",
    "HEFT_MAX_TRAINER_DEATHS": "5",
}
LEASE = float(QUICK_SETTINGS["HEFT_LEASE_SECONDS"])
STORAGE_MB = 96


class ChaosStack:
    """Starts and stops the stack. Call its methods from the main thread, which starts the children."""

    def __init__(self, *, settings: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="heft-chaos-", dir="/tmp"))
        self.folder.chmod(0o711)
        self.home = Home.at(self.folder / "home")
        self.control = self.folder / "control"
        (self.control / "proxy").mkdir(parents=True)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = "heft_chaos_" + os.urandom(16).hex()
        self._settings = QUICK_SETTINGS if settings is None else settings
        self._owner: subprocess.Popen[bytes] | None = None
        self._proxy: subprocess.Popen[bytes] | None = None
        #: Every process that was ever seen below an owner, by pid and start time.
        self.seen: dict[tuple[int, float], psutil.Process] = {}
        self.starts = 0
        self.has_small_storage = self._mount_storage()

    @property
    def database_url(self) -> str:
        """The URL of the server itself, not of the proxy."""
        return database_url(self.home.run / "postgres")

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(f"file://{self.home.artifacts}")

    def redis(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.home.run / "valkey" / "socket"), socket_timeout=2)

    def start(self) -> None:
        """Starts the parts that do not run; does not wait for them."""
        if self._proxy is None or self._proxy.poll() is not None:
            self._proxy = self._spawn(
                "pg_proxy.py",
                self.control / "proxy",
                self.home.run / "postgres",
                self.control / "commit.armed",
            )
        if self._owner is None or self._owner.poll() is not None:
            self._owner = self._spawn("owner.py", self.control, self.home.path, self.port)
            self.starts += 1

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def wait_until_ready(self, seconds: float = 120) -> None:
        def ready() -> bool:
            self.start()
            return self.ready()

        if not wait_until(ready, seconds=seconds):
            raise AssertionError(f"the stack did not become ready:\n{self.logs()}")

    def owner(self) -> psutil.Process | None:
        return None if self._owner is None else _process(self._owner.pid)

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Returns its processes by role: up, api, train, train-2, prepare, engine, postgres, valkey, other."""
        by_role: dict[str, list[psutil.Process]] = {}
        owner = self.owner()
        if owner is None:
            return by_role
        try:
            descendants = owner.children(recursive=True)
        except psutil.Error:
            return by_role
        for process in [owner, *descendants]:
            try:
                command = process.cmdline()
                self.seen[process.pid, process.create_time()] = process
            except psutil.Error:
                continue
            if command:
                by_role.setdefault(_role(command), []).append(process)
        return by_role

    def servers(self, name: str) -> list[psutil.Process]:
        """Returns the processes of a server and their children."""
        processes: list[psutil.Process] = []
        for process in self.processes().get(name, []):
            processes.append(process)
            try:
                processes += process.children(recursive=True)
            except psutil.Error:
                continue
        return processes

    def stop(self) -> int | None:
        """Sends SIGTERM; returns the exit status, or None if it had to be killed."""
        assert self._owner is not None
        self.processes()
        self._owner.terminate()
        try:
            return self._owner.wait(90)
        except subprocess.TimeoutExpired:
            self._owner.kill()
            self._owner.wait()
            return None

    def left_behind(self) -> list[str]:
        """Returns the processes, locks and temporary files that remain after it has stopped."""
        proxy = set() if self._proxy is None else {self._proxy.pid}
        return left_behind(self.home, self.folder, self.seen.values(), exempt=proxy)

    def close(self) -> None:
        """Kills what still runs and removes its folder."""
        for process in (self._owner, self._proxy):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=15)
        for process in alive:
            process.kill()
        if self.has_small_storage:
            subprocess.run(["umount", "--lazy", str(self.home.artifacts)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def logs(self) -> str:
        """Returns the end of every log."""
        parts = []
        for path in [*sorted(self.home.logs.glob("*.log")), *sorted(self.folder.glob("*.log"))]:
            lines = path.read_text(errors="replace").splitlines()[-25:]
            parts.append(f"--- {path.name}\n" + "\n".join(lines))
        return "\n".join(parts)

    def _spawn(self, script: str, *arguments: Any) -> subprocess.Popen[bytes]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEFT_")}
        stack_environment = {
            "HEFT_API_KEY": self.key,
            "HEFT_MODEL_DIR": str(self.folder / "models"),
            "OMP_NUM_THREADS": "1",
            **self._settings,
        }
        (self.folder / "models").mkdir(exist_ok=True)
        return spawn(
            [sys.executable, "-P", HERE / script, *arguments],
            log=self.folder / f"{script.removesuffix('.py')}.log",
            environment=inherited | stack_environment,
            death_signal=signal.SIGKILL,
        )

    def _mount_storage(self) -> bool:
        """Mounts a small tmpfs for the storage; returns False if this user may not."""
        self.home.path.mkdir(mode=0o711)
        self.home.path.chmod(0o711)
        self.home.artifacts.mkdir(mode=0o700)
        if os.geteuid() != 0 or shutil.which("mount") is None:
            return False
        command = ["mount", "-t", "tmpfs", "-o", f"size={STORAGE_MB}m,mode=0700", "tmpfs"]
        return subprocess.run([*command, str(self.home.artifacts)], capture_output=True).returncode == 0


def _role(command: list[str]) -> str:
    text = " ".join(command)
    if "owner.py" in text:
        return "up"
    if "launch.py" in text:
        position = next(index for index, word in enumerate(command) if word.endswith("launch.py"))
        return command[position + 2]
    if "bin/postgres" in command[0]:
        return "postgres"
    return "valkey" if "valkey-server" in command[0] else "other"


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
