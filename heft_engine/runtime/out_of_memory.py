"""Running out of memory: recognised on any device, and what can be freed before a smaller attempt."""

from __future__ import annotations

import gc

import torch

from heft_engine.runtime import malloc

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
