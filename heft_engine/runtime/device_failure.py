"""Failures after which a process can't use its device any more."""

from __future__ import annotations

import torch

from heft_engine.runtime.out_of_memory import is_out_of_memory


def is_device_failure(error: BaseException) -> bool:
    """Returns True for an error of the device itself, such as an illegal memory access.

    CUDA reports it at every later call of the process, so only a new process can go on. A lack of memory is none.
    """
    is_reported_by_device = isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and "CUDA error:" in str(error)
    )
    return is_reported_by_device and not is_out_of_memory(error)
