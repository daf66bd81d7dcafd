"""The C library's heap, where torch's tensors on a CPU lie.

By itself glibc gives what a pass has freed back to the system and asks for it again in the next one, which has the
kernel fill it with zeros page by page. How often depends on the order in which a process happened to free things: of
equal processes that scored equal rows some had 14,000 page faults and others 430,000, and were a fifth slower
(SmolLM2-135M, 40 rows, 2 cores). So a process whose work is passes keeps what it has freed.

It does NOT know tensors. Where the C library is another one, nothing happens.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

#: mallopt's parameters (malloc.h), and what they are set to: larger blocks than the first are mapped one by one, more
#: than the second is given back from a heap's end, and a thread's heap of 64 MB goes as a whole, once it is empty, only
#: where the third is less than what it holds.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_SETTINGS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 512 << 20, _TOP_PAD: 128 << 20}


def retain_freed_memory() -> None:
    """From now on freed memory stays with the process, but for `trim`. For a process's start.

    Whoever has set glibc's own variables (MALLOC_…, GLIBC_TUNABLES) has decided otherwise.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter, value in _SETTINGS.items():
            library.mallopt(parameter, value)


def trim() -> None:
    """Hands the heap's free pages back to the system: what is gone for good leaves holes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
