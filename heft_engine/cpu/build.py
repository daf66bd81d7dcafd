"""Compiles the C++ of csrc/ for this machine's processor and registers its operators with PyTorch.

It takes two seconds without AMX and six with it, once on a machine: the library is kept in the user's cache. Each
operator's schema, checks and kernel stand in one file, csrc/fused_ops.cpp or csrc/amx_*.cpp.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from heft_engine.runtime.devices import cpp_compiler
from heft_engine.runtime.threads import openmp_runtime

log = logging.getLogger(__name__)

CSRC = Path(__file__).parent / "csrc"
_TORCH = Path(torch.__file__).parent
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", f"-I{_TORCH / 'include'}"),
    # No contraction: a fused multiply-add has other bits than a product that is rounded and added.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Compilers use half the width by default, for processors that once ran slower with all of it.
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
_TIMEOUT_S = 120


class BuildError(Exception):
    """Raised where the operators can't be compiled; its text says why."""


def load(directory: Path, namespace: str = "heft", flags: Sequence[str] = ()) -> Any:
    """Returns torch.ops.<namespace> with the operators, compiled into `directory` unless they are there.

    A namespace is loaded once a process. `flags` go to the compiler. Raises BuildError, OSError and SubprocessError.
    """
    operators = getattr(torch.ops, namespace)
    if hasattr(operators, "rms_norm"):
        return operators
    # OpenMP's symbols are resolved in the runtime that torch has loaded. A second runtime beside it would have threads
    # of its own, which spin while torch's want to compute.
    if openmp_runtime() is None:
        raise BuildError("torch has no OpenMP runtime, or several")
    compiler = cpp_compiler()
    if compiler is None:
        raise BuildError("there is no C++ compiler")
    command = [compiler, *_FLAGS, f"-DHEFT_NAMESPACE={namespace}", *flags]
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError(f"other users can write to {directory}")
        torch.ops.load_library(compiled_library(command, directory))  # type: ignore[no-untyped-call]
    except OSError as error:
        log.info("compiled kernels can't be kept, and are compiled for this process alone: %s", error)
        with tempfile.TemporaryDirectory(prefix="heft-kernels-") as scratch:
            torch.ops.load_library(compiled_library(command, Path(scratch)))  # type: ignore[no-untyped-call]
    return operators


def compiled_library(command: Sequence[str], directory: Path) -> Path:
    """Returns the library that a compiler's command makes of csrc/, compiled into `directory` unless it is there."""
    library = directory / f"{_cache_key(command)}.so"
    if not library.is_file():
        # Compiled elsewhere and renamed: other processes find the whole file or none.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            _compile(command, Path(scratch) / "kernels.so").replace(library)
    return library


def _cache_key(command: Sequence[str]) -> str:
    """Returns a hash of sources, command, compiler, torch and processor: machines may share a home directory."""
    with open("/proc/cpuinfo") as info:
        processor = [line for line in info if line.startswith(("model", "flags", "Features", "CPU part"))][:4]
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, check=True, timeout=_TIMEOUT_S
    ).stdout
    sources = [path.name.encode() + path.read_bytes() for path in sorted(CSRC.iterdir())]
    parts = (*sources, version, repr((command, torch.__version__, processor)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _compile(command: Sequence[str], library: Path) -> Path:
    # In one translation unit: PyTorch's headers take longer than all the kernels.
    text = "".join(f'#include "{source}"\n' for source in sorted(CSRC.glob("*.cpp")))
    arguments = [*command, "-shared", "-x", "c++", "-", "-x", "none", f"-L{_TORCH / 'lib'}", "-ltorch_cpu"]
    ended = subprocess.run(
        [*arguments, "-o", str(library)],
        input=text,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if ended.returncode:
        raise BuildError(f"{command[0]} failed: {ended.stderr.strip()[-500:]}")
    return library
