"""Child processes that end with their parent, and file locks that end with their process.

Linux only: children end by the kernel's parent-death signal, also when their parent is killed with SIGKILL.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cli.errors import AlreadyRunning

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.02
_LOG_BYTES = 16 * 1024**2


@dataclass(frozen=True, kw_only=True)
class User:
    """The user that a child runs as."""

    uid: int
    gid: int


def spawn(
    command: Sequence[str | Path],
    *,
    log: Path,
    environment: Mapping[str, str],
    death_signal: signal.Signals,
    user: User | None = None,
    keep_open: Sequence[int] = (),
    directory: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a child in its own session, which a terminal's Ctrl-C does not reach. Its output is appended to `log`.

    The child gets `death_signal` when this process dies. Call it from the main thread: the kernel sends the signal when
    the *thread* that started the child ends.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("spawn must be called from the main thread, whose end sends the death signal")
    with open_log(log) as output:
        return subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            cwd=directory,
            start_new_session=True,
            pass_fds=tuple(keep_open),
            user=None if user is None else user.uid,
            group=None if user is None else user.gid,
            extra_groups=None if user is None else (),
            # Popen calls this after the change of user, which clears the death signal.
            preexec_fn=_die_with_parent(death_signal),
        )


def _die_with_parent(death_signal: signal.Signals) -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def in_child() -> None:
        # An inherited signal mask could block the death signal.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        libc.prctl(_PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)

    return in_child


def end(process: subprocess.Popen[bytes], steps: Sequence[tuple[signal.Signals, float]]) -> int:
    """Sends each signal and waits its seconds, then kills the process group. Returns the exit status."""
    for number, seconds in steps:
        if process.poll() is not None:
            break
        process.send_signal(number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    kill_group(process)
    return process.wait()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGKILL to all remaining processes of the session that `spawn` started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def runs_on(pid: int, directory: Path) -> bool:
    """Returns whether `pid` is a live process whose command line contains `directory`, since ids are reused.

    A zombie has no command line.
    """
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return os.fsencode(directory) in command.split(b"\0")


def parent_of(pid: int) -> int | None:
    """Returns the parent of a process, or None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # After the command's name, which may contain any character: state, parent.
    return int(status.rpartition(")")[2].split()[1])


@contextmanager
def locked(path: Path, *, wait_seconds: float, busy: str) -> Iterator[int]:
    """Takes an exclusive flock on `path` and yields its descriptor. Raises AlreadyRunning(`busy`) after the wait.

    A child that inherits the descriptor keeps the lock until its last process has ended.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise AlreadyRunning(busy) from None
                time.sleep(_POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def wait_until(ready: Callable[[], bool], *, seconds: float) -> bool:
    """Polls until `ready()`. Returns False on timeout."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


@contextmanager
def open_log(path: Path) -> Iterator[int]:
    """Yields a descriptor that appends to `path`; a large log is renamed to `<path>.1` first."""
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_name(path.name + ".1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def last_lines(path: Path, count: int = 12) -> str:
    """Returns the last lines of a log, for a message."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])
