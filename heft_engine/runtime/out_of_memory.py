"""Running out of memory: recognised on any device, freed, and the work done in smaller pieces."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from heft_engine.errors import OutOfMemory
from heft_engine.runtime import malloc

T = TypeVar("T")
R = TypeVar("R")

#: Of torch's exceptions, which have several classes and messages for it, on a CPU and on a GPU.
_MESSAGES = ("out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True if a device or the machine had no memory for an operation."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MESSAGES)


def free_memory(device: torch.device) -> None:
    """Returns all memory that is no longer used to the device and to the system.

    Call it outside of the `except` block: the exception's frames hold the tensors of the failed operation.
    """
    gc.collect()
    malloc.trim()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_twice(work: Callable[[], R], device: torch.device, what: str) -> R:
    """Returns what `work` returns, the second time if memory runs out the first time.

    The work can be repeated. what: "to …", for the message. Raises OutOfMemory if memory runs out again.
    """
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler: the exception holds the tensors of the failed work.
    free_memory(device)
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    free_memory(device)
    raise OutOfMemory(f"the device has no memory {what}")


def run_in_halves(work: Callable[[Sequence[T]], R], rows: Sequence[T], device: torch.device) -> list[R]:
    """Returns what `work` returns for all rows, or, where memory runs out, for parts of them, in order.

    The work can be repeated. Raises OutOfMemory if one row alone does not fit.
    """
    try:
        return [work(rows)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler: the exception holds the tensors of the failed pass.
    free_memory(device)
    if len(rows) == 1:
        raise OutOfMemory("the device ran out of memory in a pass over one row alone: lower max_length")
    middle = len(rows) // 2
    return [*run_in_halves(work, rows[:middle], device), *run_in_halves(work, rows[middle:], device)]
