"""The engine as a child process: events on stdout, failures as the last of them, an end with its parent."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from heft_engine.errors import EngineError, Stopped
from heft_engine.events import ErrorData, Event, FailedData

_PR_SET_PDEATHSIG = 1
#: Exit codes.
STOPPED = 75  #: EX_TEMPFAIL: a checkpoint was written, try again
RANK_LOST = 76  #: another process of the same run has ended


def die_with_parent() -> None:
    """Ends this process when the parent closes stdin's pipe or dies (on Linux also through the kernel).

    Both, because the kernel's signal follows the thread that started the child, and is missing elsewhere; and the pipe
    is not noticed while the interpreter is stuck in native code.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait_for_end() -> None:
        while os.read(0, 4_096):
            pass
        os._exit(1)

    threading.Thread(target=wait_for_end, name="die-with-parent", daemon=True).start()


def dump_stacks_on_signal() -> None:
    """Makes SIGUSR1 write every thread's stack to stderr, to see what a stalled run is doing."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def print_event(event: Event) -> None:
    sys.stdout.write(event.to_json() + "\n")
    sys.stdout.flush()


@contextmanager
def report_failures(is_reporter: Callable[[EngineError], bool] = lambda error: True) -> Iterator[None]:
    """Prints an EngineError, and a lack of memory as one, as a FAILED event, and raises it on.

    is_reporter: called once; False where another process of the run reports the failure.
    """
    try:
        yield
    except Stopped:
        raise
    except EngineError as error:
        if is_reporter(error):
            _print_failure(error)
        raise
    except (MemoryError, RuntimeError) as error:
        from heft_engine.runtime.out_of_memory import is_out_of_memory  # torch takes seconds to import

        if not is_out_of_memory(error):
            raise
        message = (
            "the machine ran out of memory: lower max_length (rows this long fill a forward pass alone), choose "
            "a smaller model, or give the worker more memory"
        )
        failure = EngineError(message, param="max_length", code="out_of_memory")
        if is_reporter(failure):
            _print_failure(failure)
        raise failure from error


@contextmanager
def errors_on_stdout() -> Iterator[None]:
    """Prints an EngineError as the line {"error"}, which the worker reads, and raises it on."""
    try:
        yield
    except EngineError as error:
        print(json.dumps({"error": error_data(error)}), flush=True)
        raise


def error_data(error: EngineError) -> ErrorData:
    return {"code": error.code, "message": error.message, "param": error.param}


def _print_failure(error: EngineError) -> None:
    data = FailedData(error=error_data(error))
    print_event(Event(code="FAILED", message=error.message, level="error", data=data))
