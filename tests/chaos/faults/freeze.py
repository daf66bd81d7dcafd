"""Processes that stand still for a while. It does NOT choose which."""

from __future__ import annotations

import signal
from contextlib import suppress

import psutil


class stopped:
    """SIGSTOP for as long as the body runs."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = processes

    def __enter__(self) -> None:
        self._send(signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
