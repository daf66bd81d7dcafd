"""One engine process: started with little, listened to line by line, ended with everything that it started.

The engine runs in a child because a forking parent must never touch CUDA, and because an out-of-memory kill
then takes the child and not the worker. The thread that starts a child must outlive it: PR_SET_PDEATHSIG
follows the thread. So `train_job` starts, supervises and reaps it in one call, on one thread.

It does NOT know what the events mean, nor why a child is ended.
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
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from store.logs import in_context

log = logging.getLogger(__name__)

#: What a child may see of the worker's environment: paths, locale, hub access, proxies, devices and thread
#: counts. The service's addresses, passwords and keys are not among them.
PASSED_ON = {
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
    "HEFT_KERNELS",
    "GLIBC_TUNABLES",
}
PASSED_ON_PREFIXES = (
    "LC_",
    "XDG_",
    "HF_",
    "CUDA_",
    "NVIDIA_",
    "PYTORCH_",
    "TORCH",
    "OMP_",
    "GOMP_",
    "MKL_",
    "OPENBLAS_",
)
PROXIES = {"http_proxy", "https_proxy", "no_proxy", "ssl_cert_file", "requests_ca_bundle"}


#: torch's threads soon sleep while they wait for each other. Spinning as long as they like, two busy processes on two
#: cores were several times slower than one after the other; sleeping at once doubles the time of one that is alone.
SHORT_SPIN = {"GOMP_SPINCOUNT": "30000"}
#: Activations are large and come and go with every layer: in huge pages training is 4 to 8 % quicker.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The few variables that a child gets, out of the worker's own."""
    passed = {
        name: value
        for name, value in environment.items()
        if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES) or name.lower() in PROXIES
    }
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return SHORT_SPIN | HUGE_PAGES | passed | quiet | {"PYTHONUNBUFFERED": "1"}


#: Bytes; what is longer is logged in pieces.
_LONGEST_LINE = 8_192


class Child:
    """A process in its own group whose stdout is one JSON object a line. Its stderr is logged, line by line.

    Its stdin is a pipe that only this process holds: end-of-file there means that the worker is gone. As a
    context manager: killed if the body fails, and gone in any case afterwards.
    """

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> None:
        #: monotonic time of its last sign of life on stdout; the stall watchdog reads it from another thread
        self.last_line_at = time.monotonic()
        self.has_spoken = False
        self._process = subprocess.Popen(
            argv,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        self.pid = self._process.pid
        self._reap_lock = threading.Lock()
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=in_context(read), name=f"read-{self.pid}", daemon=True)
            for read in (self._read, self._read_stderr)
        ]
        for reader in self._readers:
            reader.start()
        self._ender = threading.Thread(target=self._end_stragglers, name=f"end-{self.pid}", daemon=True)
        self._ender.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        self.wait()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every JSON object it wrote, in order, until it has ended. Other output is logged and left out."""
        while (line := self._lines.get()) is not None:
            yield line

    def wait(self) -> int:
        """Its exit code, when it has ended; negative: the signal that did it. Nothing of its group is
        left."""
        self._ender.join()
        for reader in self._readers:
            reader.join()
        with self._reap_lock:
            code = self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        return code

    def terminate(self) -> None:
        """Ask it to write a checkpoint and go (SIGTERM). Its own helpers stay, it may need them for that."""
        self._send(os.kill, signal.SIGTERM)

    def kill(self) -> None:
        """End its whole process group now (SIGKILL)."""
        self._send(os.killpg, signal.SIGKILL)

    def dump_stacks(self) -> None:
        """Have it write the stacks of all its threads to stderr (SIGUSR1)."""
        self._send(os.kill, signal.SIGUSR1)

    def _send(self, kill: Callable[[int, int], None], number: signal.Signals) -> None:
        # While it is not reaped, the pid names it and its group, and nobody else's.
        with self._reap_lock:
            if self._process.returncode is None:
                kill(self.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                self.last_line_at, self.has_spoken = time.monotonic(), True
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
        """Its warnings, tracebacks and stacks, with the ids of what it works on."""
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in iter(partial(stderr.readline, _LONGEST_LINE), b""):
                said = line.decode(errors="replace").rstrip()
                if said:
                    log.warning("child %d: %s", self.pid, said)

    def _end_stragglers(self) -> None:
        """When the child ends, so does what it started: a straggler would hold its stdout, and the GPU."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.kill()
