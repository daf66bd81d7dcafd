"""glibc's malloc, which holds torch's tensors on a CPU: keep freed memory in the process, or return it.

By default glibc returns memory that a forward pass has freed to the kernel and requests it again in the next pass;
the kernel then zeroes it page by page. How often this happens depends on the order in which a process frees its blocks:
of equal processes that scored equal rows, some had 14,000 page faults and others 430,000, and were a fifth slower
(SmolLM2-135M, 40 rows, 2 cores). Processes that run forward passes therefore retain freed memory.

Both functions do nothing where the C library is not glibc.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

#: Parameters of mallopt (malloc.h). Blocks above the mmap threshold are mapped one by one; free memory above the trim
#: threshold is returned from a heap's end; a thread's empty heap of 64 MB is returned whole unless the top pad is
#: larger than it.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_SETTINGS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 512 << 20, _TOP_PAD: 128 << 20}


def retain_freed_memory() -> None:
    """Keeps freed memory in the process until `trim`. Call it at the start of a process.

    Does nothing if malloc was configured through the environment (MALLOC_…, GLIBC_TUNABLES).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter, value in _SETTINGS.items():
            library.mallopt(parameter, value)


def trim() -> None:
    """Returns the heap's free pages to the system, also those between blocks in use."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
