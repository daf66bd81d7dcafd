"""Compiles device.cpp against the installed torch, once for each version of both."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).with_name("device.cpp")
_COMPILER = shutil.which(os.environ.get("CXX", "g++"))

#: Marks tests that run on a pretended GPU.
requires_pretended_gpu = pytest.mark.skipif(
    torch.version.cuda is not None or _COMPILER is None, reason="needs torch's CPU build and a C++ compiler"
)


def load() -> None:
    """Puts the guard and the hooks in place for this process. Raises RuntimeError where torch has CUDA of its own."""
    if not ctypes.CDLL(str(library())).pretend_cuda():
        raise RuntimeError("this torch is built with CUDA: the pretence needs the CPU build")


def library() -> Path:
    """Returns the path of the compiled library. Raises CalledProcessError if it can't be compiled."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"heft-pretended-gpu-{os.geteuid()}" / f"{key}.so"
    if not target.is_file():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _compile(target)
    return target


def _compile(target: Path) -> None:
    """Compiles under another name first: whoever looks for the target meanwhile does not find half of it."""
    root = Path(torch.__file__).parent
    includes = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    links = [f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
    options = ["-O1", "-std=c++20", "-shared", "-fPIC", abi, *includes]
    compiled = target.with_suffix(f".{os.getpid()}")
    assert _COMPILER is not None
    subprocess.run([_COMPILER, *options, str(SOURCE), *links, "-o", str(compiled)], check=True)
    compiled.replace(target)
