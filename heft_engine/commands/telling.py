"""Events on stdout, one JSON line each, and how a fault becomes the last of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from heft_engine.errors import EngineError, Stopped
from heft_engine.events import Event

#: torch says it in several classes and words, on the CPU and on a GPU.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def print_event(event: Event) -> None:
    sys.stdout.write(event.to_json() + "\n")
    sys.stdout.flush()


@contextmanager
def telling_faults() -> Iterator[None]:
    """A fault of the body is printed as a FAILED event and raised on, always as EngineError."""
    try:
        yield
    except Stopped:
        raise
    except EngineError as error:
        _print_failure(error)
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
            words in str(error).lower() for words in _OUT_OF_MEMORY
        ):
            raise
        message = (
            "the machine ran out of memory: lower max_length (rows this long fill a forward pass alone), choose "
            "a smaller model, or give the worker more memory"
        )
        fault = EngineError(message, param="max_length", code="out_of_memory")
        _print_failure(fault)
        raise fault from error


def _print_failure(error: EngineError) -> None:
    fault = {"code": error.code, "message": error.message, "param": error.param}
    print_event(Event(code="FAILED", message=error.message, level="error", data={"error": fault}))
