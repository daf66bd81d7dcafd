"""Starts the processes ("ranks") of a run on this machine, and ends them together. Imports no torch.

Each is `python -m heft_engine train` with the environment variables of torchrun. torchrun itself starts its ranks in
sessions of their own, out of reach of whoever kills this process and its group; these stay in the group, and end with
this process too (--die-with-parent).

The ranks of several machines meet at a port of machine 0, and admit each other by a secret, which is in the environment
of this process. On one machine the secret is made here.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from heft_engine.commands.child_process import RANK_LOST, STOPPED
from heft_engine.config.run_file import LISTEN_FD, SECRET, RunFile
from heft_engine.errors import ConfigError, RankLost, Stopped

#: Seconds that ranks have to end by themselves once one of them has ended early.
_GRACE_SECONDS = 10.0
#: Seconds that they have once the first of them has ended as it should.
_END_SECONDS = 120.0
_LOOPBACK = "127.0.0.1"
_TRAIN = (sys.executable, "-P", "-m", "heft_engine", "train")


def is_rank() -> bool:
    """Returns True in a process that was started as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_ranks(run_file: RunFile, path: Path, stop: threading.Event) -> None:
    """Runs the ranks of this machine to their end. `path`: of the run file. `stop`: set by a request before.

    SIGTERM and SIGINT end the run at its next step, with a checkpoint; SIGUSR1 shows the stacks of every rank.
    Raises Stopped, RankLost if a rank ended without a result, SystemExit(1) if one has reported why it failed, and
    ConfigError for machines that can't meet.
    """
    if stop.is_set():
        raise Stopped("stopped before training began, as requested")
    command = [*_TRAIN, "--run-file", str(path), "--die-with-parent"]
    meet = _on_loopback() if run_file.nodes == 1 else _between_machines(run_file)
    with meet as (network, descriptors):
        ranks = _Ranks(command, _environments(run_file, network), descriptors)
    endings = ranks.wait()
    codes = {ending.code for ending in endings}
    if codes == {0}:
        return
    if codes <= {0, STOPPED}:
        raise Stopped("stopped at a checkpoint, as requested")
    if 1 in codes or ranks.stopping:
        raise SystemExit(1)
    # A rank that lost another one knows less than the end of that one.
    first = next((ending for ending in endings if ending.code != RANK_LOST), endings[0])
    raise RankLost(_lost_message(first, run_file))


def _environments(run_file: RunFile, network: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns the variables of each rank on this machine. network: those by which they find each other."""
    processes = run_file.processes
    common = {
        **network,
        "WORLD_SIZE": str(run_file.nodes * processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _processors() // processes))),
    }
    return [
        {**common, "RANK": str(run_file.node_rank * processes + local_rank), "LOCAL_RANK": str(local_rank)}
        for local_rank in range(processes)
    ]


_Meeting = Iterator[tuple[dict[str, str], tuple[int, ...]]]


@contextmanager
def _on_loopback() -> _Meeting:
    """Yields the variables of ranks on one machine, which meet at a listening socket, and its descriptor."""
    with socket.create_server((_LOOPBACK, 0)) as server:
        address, port = server.getsockname()
        network = {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            LISTEN_FD: str(server.fileno()),
            # Other users of the machine reach the port too.
            SECRET: secrets.token_hex(32),
        }
        if sys.platform == "linux":
            # Gradients are not encrypted, and whoever reaches the port can send some.
            network |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        yield network, (server.fileno(),)


@contextmanager
def _between_machines(run_file: RunFile) -> _Meeting:
    """Yields the variables of ranks on several machines, and the descriptors that they inherit.

    Machine 0 listens from here on, unless the process that has started this one listens already. Raises ConfigError.
    """
    address, _, port = (run_file.rendezvous or "").rpartition(":")
    if not address or not port.isdigit():
        message = "rendezvous: several machines need HOST:PORT of machine 0, the same on each"
        raise ConfigError(message, param="rendezvous")
    if run_file.node_rank >= run_file.nodes:
        message = f"node_rank: {run_file.nodes} machines have the numbers 0 to {run_file.nodes - 1}"
        raise ConfigError(message, param="node_rank")
    if SECRET not in os.environ:
        message = (
            f"rendezvous: several machines need {SECRET} in their environment, the same on each and a new one for each "
            "run: the output of `openssl rand -hex 32`"
        )
        raise ConfigError(message, param="rendezvous")
    network = {"MASTER_ADDR": address, "MASTER_PORT": port}
    if run_file.node_rank > 0:
        yield network, ()
    elif LISTEN_FD in os.environ:
        yield network, (int(os.environ[LISTEN_FD]),)
    else:
        with listen(int(port)) as server:
            yield {**network, LISTEN_FD: str(server.fileno())}, (server.fileno(),)


def listen(port: int) -> socket.socket:
    """Returns a socket that listens on all of this machine's addresses; port 0: a port that is free.

    Raises ConfigError if the port is taken.
    """
    with suppress(OSError, ValueError):  # without IPv6
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    try:
        return socket.create_server(("", port))
    except OSError as error:
        message = f"rendezvous: port {port} of this machine can't be listened on: {error}"
        raise ConfigError(message, param="rendezvous") from error


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _lost_message(ending: _Ending, run_file: RunFile) -> str:
    if ending.code == -signal.SIGKILL:
        how = "was killed (SIGKILL), most likely because memory ran out"
    elif ending.code < 0:
        how = f"was ended by signal {-ending.code}"
    elif ending.code == RANK_LOST:
        how = "lost a process on another machine"
    else:
        how = f"ended with exit code {ending.code}"
    size = run_file.nodes * run_file.processes
    return f"Process {ending.rank} of the {size} that train this job {how}. Its log says more."


@dataclass(frozen=True)
class _Ending:
    rank: int
    code: int  #: negative: the signal that ended it


class _Ranks:
    """Running ranks. Signals that this process gets go to all of them."""

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        descriptors: Sequence[int] = (),
    ) -> None:
        """descriptors: of open sockets that the ranks inherit."""
        self.stopping = False  #: a stop was requested
        self._first_rank = int(environments[0]["RANK"])
        self._processes: list[subprocess.Popen[bytes]] = []
        self._endings: queue.SimpleQueue[_Ending] = queue.SimpleQueue()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_dump)
        for environment in environments:
            process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.PIPE, pass_fds=descriptors
            )
            self._processes.append(process)
            arguments = (process, int(environment["RANK"]))
            threading.Thread(target=self._await_end, args=arguments, daemon=True).start()
        if self.stopping:  # a request that came before they were there
            self._send(signal.SIGTERM)

    def wait(self) -> list[_Ending]:
        """Waits for all ranks. Returns their ends in order; kills those that outlive a failed one for too long.

        The machine's first rank ends last of all that have work to do: one that outlives it hangs in its own end.
        """
        endings: list[_Ending] = []
        grace = 0.0
        while not grace and len(endings) < len(self._processes):
            endings.append(self._endings.get())
            if endings[-1].code not in (0, STOPPED):
                grace = _GRACE_SECONDS
            elif endings[-1].rank == self._first_rank:
                grace = _END_SECONDS
        deadline = time.monotonic() + grace
        while len(endings) < len(self._processes):
            try:
                endings.append(self._endings.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
        self._send(signal.SIGKILL)  # nothing is sent to those that have ended
        return endings + [self._endings.get() for _ in range(len(self._processes) - len(endings))]

    def _await_end(self, process: subprocess.Popen[bytes], rank: int) -> None:
        self._endings.put(_Ending(rank, process.wait()))

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        self._send(signal.SIGTERM)

    def _on_dump(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGUSR1)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)
