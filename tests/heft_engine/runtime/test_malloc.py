"""Memory that passes free stays with a process that retains it, until it is trimmed; each case in its own process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

#: A program whose thread fills and frees memory over and over, as passes do.
PROGRAM = """
import json, resource, sys, threading
import psutil, torch
from heft_engine.runtime.malloc import trim, retain_freed_memory

if sys.argv[1] == "keep":
    retain_freed_memory()
measured = {}

def passes(count):
    for _ in range(count):
        blocks = [torch.empty(size << 20, dtype=torch.uint8).fill_(1) for size in (30, 20, 10, 30, 25)]
        del blocks

def work():
    passes(3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    passes(10)
    measured["faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    before = psutil.Process().memory_info().rss
    trim()
    measured["trimmed"] = before - psutil.Process().memory_info().rss

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps(measured))
"""
#: Pages that one pass fills.
PAGES = (115 << 20) // os.sysconf("SC_PAGE_SIZE")


def measured(mode: str, **more: str) -> dict[str, int]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], env=clean | more, check=True, capture_output=True, text=True
    )
    result: dict[str, int] = json.loads(done.stdout)
    return result


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is not glibc's"),
    pytest.mark.skipif(
        HUGE.exists() and "[always]" in HUGE.read_text(), reason="pages have other sizes here"
    ),
]


def test_what_was_freed_is_there_for_the_next_pass() -> None:
    assert measured("as it is")["faults"] > PAGES // 2
    retained = measured("keep")
    assert retained["faults"] < PAGES // 10
    assert retained["trimmed"] > 48 << 20


def test_who_has_set_the_heap_up_is_left_alone() -> None:
    assert measured("keep", MALLOC_ARENA_MAX="8")["faults"] > PAGES // 2
