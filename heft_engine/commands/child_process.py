"""A child that ends with its starter, however the starter ends."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ends this process when the starter closes stdin's pipe or dies (on Linux also through the kernel).

    Both: the kernel's signal follows the thread that started the child, and is missing elsewhere; the pipe is not
    noticed while the interpreter is stuck in native code.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait_for_end() -> None:
        while os.read(0, 4_096):
            pass
        os._exit(1)

    threading.Thread(target=wait_for_end, name="lifeline", daemon=True).start()


def dump_stacks_on_signal() -> None:
    """SIGUSR1 writes every thread's stack to stderr: what a stalled run was doing."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
