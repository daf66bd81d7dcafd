"""One engine process: a minimal environment, JSON lines on stdout, and an end that leaves nothing behind.

The engine runs in a child because a forking parent must never touch CUDA, and because the kernel's out-of-memory
killer then ends the child and not the worker. The thread that starts a child must outlive it, since PR_SET_PDEATHSIG
follows the thread: `train_job` starts, supervises and reaps it in one call.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

#: The variables of the worker's environment that a child gets: paths, locale, hub access, proxies, devices and thread
#: counts. The service's addresses, passwords and keys are not among them.
_INHERITED = {
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "TZ",
    "TMPDIR",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "CC",
    "CXX",
    "HEFT_BATCH_INVARIANT",
    "HEFT_DEVICE",
    "HEFT_KERNELS",
    "GLIBC_TUNABLES",
}
_INHERITED_PREFIXES = (
    "LC_",
    "XDG_",
    "HF_",
    "CUDA_",
    "NVIDIA_",
    "PYTORCH_",
    "TORCH",
    "NCCL_",
    "GLOO_",
    "TRITON_",
    "CUBLAS_",
    "OMP_",
    "GOMP_",
    "MKL_",
    "OPENBLAS_",
)
_PROXY_VARIABLES = {"http_proxy", "https_proxy", "no_proxy", "ssl_cert_file", "requests_ca_bundle"}

#: Threads of OpenMP spin only briefly before they sleep. With the default, two busy processes on two cores took several
#: times as long as one after the other; without any spinning a process that is alone takes twice as long.
_SHORT_SPIN = {"GOMP_SPINCOUNT": "30000"}
#: Activations are large and are allocated in every layer: with huge pages training is 4 to 8 % faster.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

#: In bytes; longer lines of stderr are logged in pieces.
_MAX_LINE = 8_192


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a child: a few variables of the worker's own, and defaults for performance."""
    inherited = {
        name: value
        for name, value in environment.items()
        if name in _INHERITED or name.startswith(_INHERITED_PREFIXES) or name.lower() in _PROXY_VARIABLES
    }
    return _SHORT_SPIN | _HUGE_PAGES | inherited | _QUIET | {"PYTHONUNBUFFERED": "1"}


class Child:
    """A process in its own group that writes one JSON object a line to stdout. Its stderr is logged, line by line.

    Its stdin is a pipe that only this process holds: end-of-file there means that the worker is gone. As a context
    manager it kills the child if the body raises, and waits for its end in any case.
    """

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, descriptors: Sequence[int] = ()
    ) -> None:
        """descriptors: of this process, that the child inherits."""
        #: monotonic time of its last line on stdout; the supervisor reads it from another thread
        self.last_line_at = time.monotonic()
        self.has_output = False
        self._process = subprocess.Popen(
            argv,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            pass_fds=descriptors,
        )
        self.pid = self._process.pid
        self._reap_lock = threading.Lock()
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=copy_context().run, args=(read,), name=f"read-{self.pid}", daemon=True)
            for read in (self._read_stdout, self._read_stderr)
        ]
        for reader in self._readers:
            reader.start()
        self._group_killer = threading.Thread(
            target=self._kill_group_at_end, name=f"end-{self.pid}", daemon=True
        )
        self._group_killer.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        self.wait()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yields the JSON objects that it writes, in order, until it has ended. Other output is logged."""
        while (line := self._lines.get()) is not None:
            yield line

    def wait(self) -> int:
        """Waits for its end and returns the exit code; a negative one is the signal that ended it.

        No process of its group is left then.
        """
        self._group_killer.join()
        for reader in self._readers:
            reader.join()
        with self._reap_lock:
            code = self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        return code

    def terminate(self) -> None:
        """Asks it to write a checkpoint and exit (SIGTERM). Its own children stay: it may need them for that."""
        self._send(os.kill, signal.SIGTERM)

    def kill(self) -> None:
        """Ends its whole process group (SIGKILL)."""
        self._send(os.killpg, signal.SIGKILL)

    def dump_stacks(self) -> None:
        """Makes it write the stacks of all its threads to stderr (SIGUSR1)."""
        self._send(os.kill, signal.SIGUSR1)

    def _send(self, kill: Callable[[int, int], None], number: signal.Signals) -> None:
        # Until it is reaped, the pid belongs to it and its group alone.
        with self._reap_lock:
            if self._process.returncode is None:
                kill(self.pid, number)

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                self.last_line_at, self.has_output = time.monotonic(), True
                try:
                    value = json.loads(line)
                except ValueError:
                    value = None
                if isinstance(value, dict):
                    self._lines.put(value)
                else:
                    log.info("child %d wrote: %s", self.pid, line[:200].decode(errors="replace").rstrip())
        self._lines.put(None)

    def _read_stderr(self) -> None:
        """Logs its warnings, tracebacks and stacks, with the ids of its job and attempt."""
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in iter(partial(stderr.readline, _MAX_LINE), b""):
                text = line.decode(errors="replace").rstrip()
                if text:
                    log.warning("child %d: %s", self.pid, text)

    def _kill_group_at_end(self) -> None:
        """Ends the processes that the child has left: they would keep its stdout open, and the GPU busy."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.kill()
