"""The engine's own C++, compiled on the spot: csrc/fused_ops.cpp and csrc/amx_gemm.cpp, for this machine's processor.

It takes three seconds, once on a machine. Where there is no compiler, or the operator has turned it off, there is no
library, and torch's own operations run. It does NOT know what the functions do: see heft_engine.cpu.fused_ops and
heft_engine.cpu.amx.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from platformdirs import user_cache_path

from heft_engine.runtime.devices import cpp_compiler, kernels_enabled
from heft_engine.runtime.threads import openmp_runtime

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent / "csrc"
SOURCES = (_HERE / "fused_ops.cpp", _HERE / "amx_gemm.cpp")
_HEADERS = (_HERE / "vectors.h", _HERE / "norms.h")
#: No contraction: a product that is added without being rounded has other bits. OpenMP is not linked in: `_library`.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-c", f"-I{_HERE}"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Compilers keep to half the width on processors that once ran slower with all of it.
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
_SECONDS = 120


@lru_cache(maxsize=1)
def library(cache_dir: Path | None = None) -> ctypes.CDLL | None:
    """The functions, compiled if need be; None where that can't be, which is logged once.

    `cache_dir` None means the user's own cache.
    """
    if not kernels_enabled():
        return None
    try:
        return _library((cache_dir or user_cache_path("heft")) / "kernels")
    except (OSError, subprocess.SubprocessError, _Unfit) as error:
        log.info("no compiled kernels, torch's own operations instead: %s", error)
        return None


class _Unfit(Exception):
    """What stands against kernels on this machine."""


def _library(directory: Path) -> ctypes.CDLL:
    """Raises OSError, SubprocessError and _Unfit."""
    # The kernels find the runtime that torch has. A second one beside it would have threads of its own, which wait
    # awake where torch's want to compute.
    if openmp_runtime() is None:
        raise _Unfit("torch has no OpenMP runtime, or several")
    found = cpp_compiler()
    if found is None:
        raise _Unfit("there is no C++ compiler")
    name = f"{_key(found)}.so"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = directory.stat()
        if place.st_uid != os.geteuid() or place.st_mode & 0o022:
            raise PermissionError(f"others may leave code in {directory}")
        return _compiled(found, directory / name)
    except OSError as error:
        log.info("compiled kernels can't be kept, and are compiled for this process alone: %s", error)
    with tempfile.TemporaryDirectory(prefix="heft-kernels-") as scratch:
        return _compiled(found, Path(scratch) / name)


def _compiled(compiler: str, target: Path) -> ctypes.CDLL:
    if not target.is_file():
        _compile(compiler, target)
    return ctypes.CDLL(str(target))


def _key(compiler: str) -> str:
    """Of the machine too: a home directory may be shared by several kinds."""
    with open("/proc/cpuinfo") as info:
        processor = [line for line in info if line.startswith(("model", "flags", "Features", "CPU part"))][:4]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_SECONDS
    ).stdout
    sources = [source.read_bytes() for source in (*SOURCES, *_HEADERS)]
    parts = (*sources, version, repr((_FLAGS, processor)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _compile(compiler: str, target: Path) -> None:
    """Under another name first: whoever finds the target finds it whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled, linked = [], Path(scratch) / "kernels.so"
        for source in SOURCES:
            target_of_one = str(Path(scratch) / f"{source.stem}.o")
            try:
                _run([compiler, *_FLAGS, str(source), "-o", target_of_one])
            except _Unfit as error:
                if source == SOURCES[0]:
                    raise
                # Kernels do without AMX.
                log.info("%s is left out: %s", source.name, error)
                continue
            compiled.append(target_of_one)
        _run([compiler, "-shared", *compiled, "-o", str(linked)])
        linked.replace(target)


def _run(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if ended.returncode:
        raise _Unfit(f"{command[0]} failed: {ended.stderr.strip()[-500:]}")
